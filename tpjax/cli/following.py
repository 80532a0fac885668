"""What a subcommand does in one of several processes: signals, and following process 0 to its end."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from tpjax.cli.console import note
from tpjax.distributed import (
    ask_to_end,
    is_joining,
    num_processes,
    parting,
    process_id,
    report_end,
    report_failure,
    shut_down,
    when_asked_to_end,
)

if TYPE_CHECKING:
    from tpjax.llm import LLM


def handle_signals() -> None:
    """Lets a signal to any process end all of them.

    A launcher may signal all processes or one: either way it is process 0 that ends them, in which SIGTERM
    does what Ctrl-C does. A second signal ends another process at once.
    """
    signalled = threading.Event()

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        signalled.set()
        raise KeyboardInterrupt

    def ask(signum: int, frame: FrameType | None) -> None:
        if signalled.is_set():
            os._exit(128 + signum)
        signalled.set()
        threading.Thread(target=ask_to_end, daemon=True).start()

    def interrupt() -> None:
        if not signalled.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    when_asked_to_end(interrupt)
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, ask if process_id() else end)


def keep_stdout() -> None:
    """Sends what libraries write to stdout, such as gloo, to stderr: stdout is for the text."""
    encoding: dict[str, Any] = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors}
    own = os.fdopen(os.dup(sys.stdout.fileno()), "w", **encoding)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = own


def abandon(why: str, status: int) -> None:
    """After an error, ends the processes that wait for this one, and does not wait for them."""
    if num_processes() > 1 and (is_joining() or parting()):
        if not parting():
            report_failure(f"process {process_id()} failed: {why}")
        end_now(status)


def abandon_interrupted(status: int) -> None:
    """After an interrupt, ends the other processes, whatever they do, and does not wait for them."""
    if num_processes() > 1:
        report_end(f"process {process_id()} was asked to end: all end")
        end_now(status)


def end_now(status: int) -> NoReturn:
    """Ends this process without waiting for its threads or for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def attend(llm: LLM) -> None:
    """In a follower: follows process 0 to its end, then ends the subcommand. Elsewhere returns at once."""
    follower = llm.role.follower
    if follower is None:
        return
    note(f"process {process_id()} follows process 0")
    llm.follow()
    shut_down()
    if follower.compiling:
        end_now(0)  # a thread is in the compiler: the interpreter could not finalise
    raise typer.Exit
