"""The ``tpjax`` command: subcommands, exit statuses, and one-line errors."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from tpjax._version import __version__
from tpjax.cli import (
    batch,
    bench,
    bench_serve,
    chat,
    console,
    convert,
    doctor,
    explain,
    generate,
    models,
    plan,
    pull,
    serve,
)
from tpjax.cli.console import EXIT_INTERRUPTED
from tpjax.cli.following import abandon, abandon_interrupted
from tpjax.cli.options import goal, rate, token_bias
from tpjax.errors import EngineError, LostProcessError, TpjaxError
from tpjax.inspect.accelerators import leave_out_absent
from tpjax.old_spellings import translate_arguments

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
EXIT_INTERNAL = 1
EXIT_BAD_INPUT = 2
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

# name on the command line -> module
SUBCOMMANDS = {
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "batch": batch,
    "models": models,
    "pull": pull,
    "convert": convert,
    "explain": explain,
    "plan": plan,
    "bench": bench,
    "bench serve": bench_serve,
    "doctor": doctor,
}


class _ReaderLeft(Exception):
    """The reader of stdout has closed it."""


# Options that several values may follow: ``--request-rate 1 2 4``. What the parser of one does not take is
# the next argument. After an option that takes any text, it would be one more of that: the model, a key.
_OF_SEVERAL = {"--goodput": goal, "--logit-bias": token_bias, "--rate": rate, "--request-rate": rate}


class _Subcommand(TyperCommand):
    """A subcommand, some of whose options several values may follow."""

    def invoke(self, ctx: Any) -> Any:
        """Runs it. Typer would end a broken pipe itself, with a status that shells do not use."""
        # before any subcommand imports JAX
        leave_out_absent(compilers=ctx.params.get("topology") is not None)
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError as error:
            raise _ReaderLeft from error
        return result

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the words after the subcommand's name."""
        words: list[str] = []
        option = None
        for word in args:
            if word.startswith("--"):
                option = word if word in _OF_SEVERAL else None
            elif option is not None and words[-1] != option:
                if _takes(_OF_SEVERAL[option], word):
                    words.append(option)
                else:
                    option = None
            words.append(word)
        return list(super().parse_args(ctx, words))


def _takes(parser: Callable[[str], object], word: str) -> bool:
    try:
        parser(word)
    except typer.BadParameter:
        return False
    return True


class _Root(TyperGroup):
    """Joins the two words of ``bench serve`` to one subcommand."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the words after ``tpjax``."""
        first = next((i for i, word in enumerate(args) if not word.startswith("-")), 0)
        if args[first : first + 2] == ["bench", "serve"]:
            args = [*args[:first], "bench serve", *args[first + 2 :]]
        return list(super().parse_args(ctx, args))


app = typer.Typer(
    name="tpjax",
    cls=_Root,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _module in SUBCOMMANDS.items():
    app.command(_name, cls=_Subcommand, epilog=f"Examples:\n\n{textwrap.dedent(_module.EXAMPLES).strip()}")(
        _module.run
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tpjax {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, and what compilers print.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Tensor-parallel LLM inference in JAX. `tpjax SUBCOMMAND --help` has examples."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    Args:
        argv: the arguments after ``tpjax``; ``None``: those of this process.
    """
    if argv is None:
        warnings.showwarning = _show_warning
        if isinstance(
            sys.stdout, io.TextIOWrapper
        ):  # a terminal without some character must not end the work
            sys.stdout.reconfigure(errors="replace")
    words, renamed = translate_arguments(sys.argv[1:] if argv is None else argv)
    for message in renamed:
        print(f"tpjax: warning: {message}", file=sys.stderr)
    console.debug = debug = "--debug" in words
    try:
        status = app([word for word in words if word != "--debug"], prog_name="tpjax", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        abandon_interrupted(EXIT_INTERRUPTED)
        return EXIT_INTERRUPTED
    except _ReaderLeft:
        _discard_stdout()  # the reader has gone: `tpjax generate ... | head -1`
        return EXIT_BROKEN_PIPE
    except TyperException as error:
        return _usage_error(error)
    except (EngineError, LostProcessError) as error:
        return _fail(str(error), EXIT_INTERNAL, debug)
    except TpjaxError as error:
        return _fail(str(error), EXIT_BAD_INPUT, debug)
    except OSError as error:
        if error.errno in _DISK_FULL:
            _discard_stdout()
            return _fail(f"{error.filename or 'the output'}: {error.strerror}", EXIT_BAD_INPUT, debug)
        if error.filename is None:
            return _fail(f"{type(error).__name__}: {error}", EXIT_INTERNAL, debug)
        return _fail(f"{error.filename}: {error.strerror}", EXIT_BAD_INPUT, debug)
    except Exception as error:
        hint = "" if debug else " (a bug, or the machine's; --debug shows where)"
        return _fail(f"{type(error).__name__}: {error}{hint}", EXIT_INTERNAL, debug)
    if status == EXIT_INTERRUPTED:  # that is what typer makes of an interrupt
        abandon_interrupted(EXIT_INTERRUPTED)
    return status if isinstance(status, int) else 0


def _show_warning(message: Warning | str, *place: Any, **_: Any) -> None:
    """Prints a warning of a library as one line."""
    print(f"tpjax: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _usage_error(error: Any) -> int:
    """Prints a usage error as one line; nothing if the help has just been shown."""
    message = " ".join(error.format_message().split()).replace("Value error, ", "")
    message = re.sub(r"\(Possible options: (.*)\)", r"(did you mean \1?)", message)
    if message:
        command = error.ctx.command_path if getattr(error, "ctx", None) else "tpjax"
        print(f"tpjax: error: {message} (see `{command} --help`)", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _discard_stdout() -> None:
    """Lets the last flush of the interpreter go nowhere: it would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int, debug: bool) -> int:
    """Prints an error as one line, whatever a library's has."""
    if debug:
        traceback.print_exc()
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    print(f"tpjax: error: {line}", file=sys.stderr)
    abandon(line, status)
    return status
