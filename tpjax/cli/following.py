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
from tpjax.distributed import is_joining, num_processes, process_id, report_failure, shut_down

if TYPE_CHECKING:
    from tpjax.llm import LLM


def handle_signals() -> None:
    """Ends the subcommand at SIGTERM as at Ctrl-C: the other processes are told then."""

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)


def interrupt() -> None:
    """Ends this process's subcommand as a signal does: another process was asked to end."""
    os.kill(os.getpid(), signal.SIGTERM)


def keep_stdout() -> None:
    """Sends what libraries write to stdout, such as gloo, to stderr: stdout is for the text."""
    encoding: dict[str, Any] = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors}
    own = os.fdopen(os.dup(sys.stdout.fileno()), "w", **encoding)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = own


def abandon(why: str, status: int) -> None:
    """After an error, tells the processes that wait for this one, and does not wait for them."""
    if num_processes() > 1 and is_joining():
        report_failure(why)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def attend(llm: LLM) -> None:
    """In a follower: follows process 0 to its end, then ends the subcommand. Elsewhere returns at once.

    A launcher may signal all processes or one: either way it is process 0 that finishes what runs, and then
    ends all. A second signal ends this process at once.
    """
    if llm.role.leader is not None:
        llm.role.leader.on_drain = interrupt
    follower = llm.role.follower
    if follower is None:
        return
    asked = threading.Event()

    def ask(signum: int, frame: FrameType | None) -> None:
        if asked.is_set():
            os._exit(128 + signum)
        asked.set()
        threading.Thread(target=follower.ask_to_drain, daemon=True).start()

    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, ask)
    note(f"process {process_id()} follows process 0")
    llm.follow()
    shut_down()
    sys.stdout.flush()
    sys.stderr.flush()
    if follower.compiling:
        os._exit(0)  # a thread is in the compiler: the interpreter could not finalise
    raise typer.Exit
