"""Reading and printing, for all subcommands."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpjax.errors import RequestError

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it

debug = False  # whether --debug was given


def note(text: str) -> None:
    """Prints a remark to stderr."""
    print(f"tpjax: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def native_output_hidden() -> Iterator[None]:
    """Hides what native libraries write to stderr, unless ``--debug`` was given. Python's own lines show.

    Plugins of JAX and their compilers log to file descriptor 2 and take no word for it.
    """
    try:
        own = sys.stderr.fileno()
    except (AttributeError, io.UnsupportedOperation):  # stderr has been replaced: whoever did it has it
        own = -1
    if debug or own != 2:
        yield
        return
    kept, python = os.dup(own), sys.stderr
    python.flush()
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), own)
        options: dict[str, Any] = {
            "encoding": python.encoding,
            "errors": "backslashreplace",
            "closefd": False,
        }
        with open(kept, "w", buffering=1, **options) as shown:
            sys.stderr = shown
            yield
    finally:
        sys.stderr = python
        os.dup2(kept, own)
        os.close(kept)


def show(what: Any) -> None:
    """Prints a string as it is, anything else through rich."""
    if isinstance(what, str):
        print(what)
        return
    from rich.console import Console

    piped = None if sys.stdout.isatty() else 100  # rich would take 80 columns where there is no terminal
    Console(width=piped).print(what)


def show_report(report: Any, *, as_json: bool) -> None:
    """Prints a report as tables, or its ``to_dict()`` as JSON."""
    show(json.dumps(report.to_dict(), indent=2) if as_json else report)


def read_text(file: Path) -> str:
    """Reads a file; ``-`` is stdin, without the newline at its end that ``echo`` and editors add.

    A byte order mark, which editors on Windows put first, is left out.

    Raises:
        RequestError: the file cannot be read, or is not text.
    """
    try:
        text = sys.stdin.read().removesuffix("\n") if str(file) == "-" else file.read_text()
        return text.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        where = "the prompt on stdin" if str(file) == "-" else str(file)
        raise RequestError(f"{where} is not valid {error.encoding}: {error.reason}") from error
    except OSError as error:
        raise RequestError(f"{file}: {error.strerror or error}") from error


def read_lines(file: Path) -> list[tuple[int, str]]:
    """Reads the lines of a file that are not blank, with their numbers from 1.

    Only line feeds end them: JSON and prompts may hold other characters at which ``str.splitlines`` splits.

    Raises:
        RequestError: as for :func:`read_text`.
    """
    lines = enumerate(read_text(file).split("\n"), start=1)
    return [(number, line) for number, line in lines if line.strip()]


def decoded(line: str, place: str) -> Any:
    """Decodes a line of JSON; ``place`` is where it stands.

    Raises:
        RequestError: it is not JSON, or nested too deep.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place} is not JSON: {error}") from error


def check_writable(file: Path) -> None:
    """Checks that a file can be written, before the work whose results it is for.

    Raises:
        RequestError: it cannot be written.
    """
    try:
        file.open("a").close()
    except OSError as error:
        raise RequestError(f"{file}: {error.strerror or error}") from error


def write_text(file: Path, text: str) -> None:
    """Writes a file.

    Raises:
        RequestError: the file cannot be written.
    """
    try:
        file.write_text(text)
    except OSError as error:
        raise RequestError(f"{file}: {error.strerror or error}") from error
