"""The ``tpjax`` command.

Bad input ends with exit status 2 and one line on stderr; ``--debug`` shows the traceback. Text goes to
stdout, figures and remarks to stderr. JAX is imported inside the verbs only: ``--help`` stays quick, and
devices can still be faked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from tpjax import __version__
from tpjax.config import ExpertSharding
from tpjax.errors import RequestError, TpjaxError

if TYPE_CHECKING:
    from tpjax.llm import LLM

DTYPES = ("auto", "float32", "bfloat16", "float16")  # as in runner.py, which imports JAX

EXIT_BAD_INPUT = 2
EXIT_INTERNAL = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    Args:
        argv: the arguments after the command's name; ``None`` takes the process's own.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`tpjax generate ... | head -1`): let the interpreter's last flush go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except TpjaxError as error:
        return _fail(str(error), EXIT_BAD_INPUT, args)
    except Exception as error:
        hint = "" if args.debug else " (a bug, or the machine's; --debug shows where)"
        return _fail(f"{type(error).__name__}: {error}{hint}", EXIT_INTERNAL, args)
    return 0


def _fail(message: str, status: int, args: argparse.Namespace) -> int:
    if args.debug:
        traceback.print_exc()
    print(f"tpjax: error: {message}", file=sys.stderr)
    return status


# --- verbs -------------------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> None:
    from tpjax.sampling_params import SamplingParams

    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        stop=args.stop,
        ignore_eos=args.ignore_eos,
    )
    text = _read_stdin() if args.prompt == "-" else args.prompt
    start = time.perf_counter()
    llm = _load(args)
    prompt = _chat_prompt(llm, text) if args.chat else text
    loaded = time.perf_counter()
    llm.prepare(prompt, params)  # so that tokens/s does not count the compiler
    figures = Figures(load_s=loaded - start, compile_s=time.perf_counter() - loaded)
    _print_stream(llm.stream(prompt, params), figures)
    device = llm.mesh.devices.flat[0]
    print(f"tpjax: {figures.line()}, tp={llm.mesh.size}, {device.device_kind}", file=sys.stderr)


def _pull(args: argparse.Namespace) -> None:
    from tpjax.checkpoints import hub

    if args.verify and args.model not in hub.ALIASES:
        aliases = ", ".join(hub.ALIASES)
        raise RequestError(
            f"--verify knows the digests of built-in aliases ({aliases}), not of {args.model!r}"
        )
    path = hub.resolve(args.model)
    if args.verify:
        hub.verify(args.model)
    print(path)


def _doctor(args: argparse.Namespace) -> None:
    from tpjax.inspect import doctor

    facts = doctor.examine()
    _show(json.dumps(facts, indent=2) if args.json else doctor.render(facts))


def _explain(args: argparse.Namespace) -> None:
    from tpjax.inspect.explain import explain_model

    _devices(args, configuration=True)
    report = explain_model(
        args.model,
        tp=args.tp,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        expert_sharding=args.expert_sharding,
    )
    _show(json.dumps(report.to_dict(), indent=2) if args.json else report)


def _load(args: argparse.Namespace) -> LLM:
    """Finds the model, sees to the devices, and loads the one onto the others."""
    _devices(args)
    from tpjax import LLM

    return LLM(
        args.model,
        tp=args.tp,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        expert_sharding=args.expert_sharding,
    )


def _devices(args: argparse.Namespace, *, configuration: bool = False) -> None:
    """Sees to it that there are as many devices as asked for; ``configuration``: a config.json will do."""
    from tpjax.checkpoints import hub

    hub.resolve(
        args.model, configuration=configuration
    )  # before JAX starts: a misspelt name is reported at once
    if args.tp is not None and args.tp > 1:
        from tpjax.mesh import ensure_devices

        ensure_devices(args.tp)


def _chat_prompt(llm: LLM, text: str) -> list[int]:
    """The token ids of a conversation with one message; its template writes the special tokens itself."""
    if llm.tokenizer is None:
        raise RequestError("--chat needs a tokenizer, and this model has none")
    rendered = llm.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return llm.tokenizer.encode(rendered, add_special_tokens=False)


def _read_stdin() -> str:
    """All of stdin, without the newline that ``echo`` and editors end it with."""
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt on stdin is not valid {error.encoding}: {error.reason}") from error


@dataclass
class Figures:
    """What a generation took."""

    load_s: float
    compile_s: float = 0.0
    first_token_ms: float | None = None
    tokens: int = 0
    tokens_per_s: float | None = None
    finish_reason: str | None = None

    def line(self) -> str:
        """The figures on one line, as far as there are any."""
        parts = [f"loaded in {self.load_s:.1f} s", f"compiled in {self.compile_s:.1f} s"]
        if self.first_token_ms is not None:
            parts.append(f"first token after {self.first_token_ms:.0f} ms")
        parts.append(f"{self.tokens} token{'' if self.tokens == 1 else 's'} ({self.finish_reason})")
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tokens/s after the first")
        return ", ".join(parts)


def _print_stream(deltas: Iterable[Any], figures: Figures) -> None:
    """Writes text as it comes and fills in the figures."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without an emoji must not end the generation
    start = time.perf_counter()
    first = last = start
    first_tokens = 0
    for delta in deltas:
        last = time.perf_counter()
        figures.tokens += len(delta.token_ids)
        figures.finish_reason = delta.finish_reason
        if figures.first_token_ms is None and delta.token_ids:
            first, first_tokens = last, figures.tokens
            figures.first_token_ms = (first - start) * 1000
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if figures.tokens > first_tokens and last > first:
        figures.tokens_per_s = (figures.tokens - first_tokens) / (last - first)


def _show(what: Any) -> None:
    """Prints a string as it is, anything else through rich."""
    if isinstance(what, str):
        print(what)
        return
    from rich.console import Console

    piped = None if sys.stdout.isatty() else 100  # rich would take 80 columns where there is no terminal
    Console(width=piped).print(what)


# --- arguments ---------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others of this command."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"tpjax: error: {message} (see `{self.prog} --help`)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tpjax",
        description="Tensor-parallel LLM inference in JAX. `tpjax VERB --help` has examples.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tpjax {__version__}")
    parser.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_generate(verbs)
    _add_pull(verbs)
    _add_explain(verbs)
    _add_doctor(verbs)
    return parser


def _add_verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], None], help: str, examples: str
) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog="examples:\n" + "".join(f"  {line.strip()}\n" for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # Accepted after the verb too; without SUPPRESS its default would undo a --debug before the verb.
    verb.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    verb.set_defaults(run=run)
    return verb


def _add_generate(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        "generate",
        _generate,
        "continue a prompt: text on stdout as it comes, figures on stderr",
        """
        tpjax generate "The capital of France is" --model smollm2-135m --tp 4 --temperature 0
        tpjax generate "Why is the sky blue?" --model smollm2-135m --chat --max-tokens 200 --seed 1
        cat notes.txt | tpjax generate - --model ./Llama-3.2-1B --tp 8 --stop "###"
        """,
    )
    verb.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from stdin")
    verb.add_argument("--model", required=True, metavar="M", help=_MODEL_HELP)
    _add_sharding_options(verb)
    verb.add_argument(
        "--chat", action="store_true", help="send the prompt as a message, by the chat template"
    )
    verb.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="most tokens to generate (128)"
    )
    verb.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0 takes the likeliest (1.0)"
    )
    verb.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="keep the K likeliest; 0 keeps all (0)"
    )
    verb.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="keep this much probability (1.0)"
    )
    verb.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="as likely as the best times P (0)"
    )
    verb.add_argument("--seed", type=int, metavar="S", help="the same seed draws the same tokens, at any tp")
    verb.add_argument(
        "--stop", action="append", default=[], metavar="STR", help="end before this text; may be repeated"
    )
    verb.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-text token")


def _add_pull(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        "pull",
        _pull,
        "fetch a model into the cache and print its path",
        """
        tpjax pull smollm2-135m
        tpjax pull gemma3-270m --verify
        tpjax pull HuggingFaceTB/SmolLM2-360M-Instruct
        """,
    )
    verb.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    verb.add_argument(
        "--verify", action="store_true", help="read the whole file again and compare its digest"
    )


def _add_explain(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        "explain",
        _explain,
        "show how a model is cut: each tensor's spec, bytes per device, the collectives of a decode step",
        """
        tpjax explain smollm2-135m --tp 4
        tpjax explain gemma3-270m --tp 6 --json
        """,
    )
    verb.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    _add_sharding_options(verb)
    verb.add_argument("--json", action="store_true", help="print JSON")


def _add_doctor(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        "doctor",
        _doctor,
        "show the devices, versions, settings and caches tpjax sees, and what looks wrong",
        """
        tpjax doctor
        tpjax doctor --json
        """,
    )
    verb.add_argument("--json", action="store_true", help="print JSON; sizes in bytes")


_MODEL_HELP = (
    "an alias (smollm2-135m, gemma3-270m), a directory, a .gguf file or a Hugging Face id (org/name)"
)


def _add_sharding_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--tp", type=_device_count, metavar="N", help="devices to shard over (all of them)")
    verb.add_argument("--dtype", choices=DTYPES, default="auto", help="of weights and cache (auto)")
    verb.add_argument(
        "--max-model-len", type=_token_count, metavar="N", help="most tokens of prompt and answer together"
    )
    verb.add_argument(
        "--expert-sharding",
        choices=get_args(ExpertSharding),
        default="auto",
        help="whole experts on a device, or a share of each one's width (auto: as tp divides them)",
    )


def _device_count(text: str) -> int:
    return _whole(text, "of devices")


def _token_count(text: str) -> int:
    return _whole(text, "of tokens")


def _whole(text: str, of_what: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {of_what}, 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
