"""Waiting for the compiler: the terminal shows it, and Ctrl-C ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tpjax.cli.console import EXIT_INTERRUPTED
from tpjax.cli.following import abandon_interrupted, end_now

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tpjax.llm import LLM
    from tpjax.sampling_params import SamplingParams

_UNSEEN_S = 0.5  # waits shorter than this are not shown


def compile_for(llm: LLM, prompt: str | Sequence[int], params: SamplingParams) -> float:
    """Compiles the programs that a prompt needs and returns the seconds that took.

    Raises:
        RequestError: the prompt or a parameter is invalid.
    """
    start = time.perf_counter()
    wait_for(lambda: llm.prepare(prompt, params), f"compiling decode and prefill for {llm.layout}")
    return time.perf_counter() - start


def wait_for(call: Callable[[], None], what: str) -> None:
    """Runs a call on a thread, with a line about it and its seconds on stderr if that is a terminal.

    XLA does not return to Python while it compiles: a call on the main thread could not be interrupted.
    Ctrl-C ends the process at once, since a thread in XLA cannot be stopped.
    """
    from rich.console import Console

    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    start = time.perf_counter()
    try:
        thread.start()
        thread.join(_UNSEEN_S)
        if thread.is_alive():
            with Console(stderr=True).status(what) as status:
                while thread.is_alive():
                    thread.join(0.2)
                    status.update(f"{what}, {time.perf_counter() - start:.0f} s")
    except KeyboardInterrupt:
        abandon_interrupted(EXIT_INTERRUPTED)
        end_now(EXIT_INTERRUPTED)
    if errors:
        raise errors[0]
