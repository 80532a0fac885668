"""The ``tpjax`` command.

Bad input ends with exit status 2 and one line on stderr; ``--debug`` shows the traceback. Text goes to
stdout, figures and remarks to stderr. JAX is imported inside the verbs only: ``--help`` stays quick, and
devices can still be faked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from tpjax import __version__
from tpjax.config import ExpertSharding
from tpjax.errors import ConfigError, EngineError, RequestError, TpjaxError

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
    args = _parse(sys.argv[1:] if argv is None else argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`tpjax generate ... | head -1`): let the interpreter's last flush go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except EngineError as error:
        return _fail(str(error), EXIT_INTERNAL, args)
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

    params = SamplingParams(**_sampling(args), stop=args.stop, ignore_eos=args.ignore_eos)
    text = _read_stdin() if args.prompt == "-" else args.prompt
    start = time.perf_counter()
    llm = _load(args, generation_config=args.generation_config)
    _remark_defaults(llm)
    prompt = _chat_prompt(llm, text) if args.chat else text
    loaded = time.perf_counter()
    llm.prepare(prompt, params)  # so that tokens/s does not count the compiler
    figures = Figures(load_s=loaded - start, compile_s=time.perf_counter() - loaded)
    _print_stream(llm.stream(prompt, params), figures)
    device = llm.mesh.devices.flat[0]
    print(f"tpjax: {figures.line()}, tp={llm.mesh.size}, {device.device_kind}", file=sys.stderr)


def _chat(args: argparse.Namespace) -> None:
    from tpjax.sampling_params import SamplingParams
    from tpjax.terminal import chat

    params = SamplingParams(**_sampling(args))
    llm = _load(args, max_slots=1, generation_config=args.generation_config)
    _remark_defaults(llm)
    print(f"tpjax: {args.model} at tp={llm.mesh.size}; /help shows the commands", file=sys.stderr)
    chat(llm, params, args.system)


def _serve(args: argparse.Namespace) -> None:
    try:
        from tpjax.server.run import Options, serve
    except ImportError as error:
        raise ConfigError(f"serving needs more packages ({error}): pip install 'tpjax[serve]'") from error
    keys = [*args.api_key, *(line for path in args.api_key_file for line in _read_keys(path))]
    if args.protect_metrics and not keys:
        raise ConfigError("--protect-metrics needs a key: give --api-key or --api-key-file")
    options = Options(
        model=args.served_model_name or Path(args.model).name,
        host=args.host,
        port=args.port,
        api_keys=tuple(keys),
        protect_metrics=args.protect_metrics,
        allow_origins=tuple(args.allow_origin),
        max_queue=args.max_queue,
        max_body_bytes=args.max_body_mib << 20,
        drain_s=args.drain_s,
    )
    _devices(args)

    def load() -> LLM:
        llm = _load(args, max_slots=args.max_slots, generation_config=args.generation_config)
        llm.warm_up()
        return llm

    serve(load, options, lambda what: print(f"tpjax: {what}", file=sys.stderr, flush=True))


def _read_keys(path: Path) -> list[str]:
    try:
        keys = path.read_text().split()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not keys:
        raise ConfigError(f"{path}: no key in it")
    return keys


def _bench_serve(args: argparse.Namespace) -> None:
    from tpjax.server import bench

    load = bench.Load(
        base_url=args.base_url,
        model=args.model,
        num_prompts=args.num_prompts,
        input_len=args.input_len,
        output_len=args.output_len,
        range_ratio=args.range_ratio,
        max_concurrency=args.max_concurrency,
        seed=args.seed,
        api_key=args.api_key,
    )
    results = bench.sweep(load, args.request_rate, dict(args.goodput))
    for result in results:
        print(result.table())
    if args.json is not None:
        try:
            args.json.write_text(json.dumps([result.summary() for result in results], indent=2) + "\n")
        except OSError as error:
            raise RequestError(f"{args.json}: {error.strerror}") from error
    if args.plot is not None:
        bench.plot(results, args.plot)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that ``generate`` and ``chat`` share."""
    return {
        name: getattr(args, name) for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
    }


def _remark_defaults(llm: LLM) -> None:
    """Says which sampling parameters the model itself brings."""
    if llm.sampling_defaults:
        print(f"tpjax: where no option says otherwise, {llm.describe_defaults()}", file=sys.stderr)


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


def _convert(args: argparse.Namespace) -> None:
    from tpjax.checkpoints import hub

    path = hub.resolve(args.model)
    import jax.numpy as jnp

    from tpjax.checkpoints.convert import convert

    convert(path, Path(args.target), None if args.dtype == "stored" else jnp.dtype(args.dtype))
    print(args.target)


def _doctor(args: argparse.Namespace) -> None:
    from tpjax.inspect import doctor

    facts = doctor.examine()
    _show(json.dumps(facts, indent=2) if args.json else doctor.render(facts))


def _explain(args: argparse.Namespace) -> None:
    if (args.model is None) == (args.config is None):
        raise RequestError("give either MODEL or --config FILE")
    args.model = args.model or args.config
    if args.plot is not None:
        from tpjax.inspect.plots import check_plot

        check_plot(args.plot)
    if args.topology is not None:
        if args.plot is not None:
            raise RequestError("--plot draws what --topology does not look at: leave one out")
        _explain_topology(args)
        return
    from tpjax.inspect.explain import explain_model

    _devices(args, configuration=True)
    report = explain_model(
        args.model,
        tp=args.tp,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        expert_sharding=args.expert_sharding,
    )
    if args.plot is not None:
        from tpjax.inspect.plots import save

        save(report.figure(), args.plot)
    _show(json.dumps(report.to_dict(), indent=2) if args.json else report)


def _plan(args: argparse.Namespace) -> None:
    from tpjax.inspect import plan, plan_report, plots
    from tpjax.inspect.hardware import parse_hardware
    from tpjax.inspect.shapes import find_shape
    from tpjax.inspect.strategies import compare

    if args.plot is not None:
        plots.check_plot(args.plot)
    if args.measure == (args.hardware is not None):
        raise RequestError("give either --hardware NAME:CHIPS or --measure")
    shape = find_shape(args.model)
    traffic = _traffic(args, "float32" if args.measure else "bf16")
    comparison = None
    if args.measure:
        from tpjax.inspect.measure import measured_hardware

        tps = [args.tp] if args.tp else list(range(1, 5))
        plans = [plan.make_plan(shape, measured_hardware(tp, fresh=True), tp, tp, traffic) for tp in tps]
    else:
        hardware, chips = parse_hardware(args.hardware, args.hardware_file)
        tps = [args.tp] if args.tp else plan.divisors(chips)
        plans = [plan.make_plan(shape, hardware, chips, tp, traffic) for tp in tps]
    if args.tp is None:
        best, reason = plan.recommend(plans)
        if not args.measure:
            comparison = compare(shape, hardware, chips, traffic)
    else:
        best, reason = plans[0], f"tp={args.tp} as asked; most of a step is {plans[0].decode.bound}"
        if not best.fits and not args.json:  # the JSON says so itself
            raise RequestError(plan.does_not_fit(best))
    report = plan_report.PlanReport(plans, best, reason, comparison)
    if args.plot is not None:
        plan_report.plot_frontier(plans, args.plot)
    _show(json.dumps(report.to_dict(), indent=2) if args.json else report)


def _bench(args: argparse.Namespace) -> None:
    from tpjax.checkpoints import hub
    from tpjax.inspect import bench
    from tpjax.inspect.measure import measured_hardware
    from tpjax.inspect.plan import make_plan
    from tpjax.inspect.shapes import Shape

    hub.resolve(args.model)  # before anything is measured: a misspelt name is reported at once
    hardware = measured_hardware(args.tp)  # in a process of its own, before this one starts JAX
    traffic = _traffic(args, "float32")
    args.dtype, args.max_model_len = traffic.dtype, bench.longest(traffic)
    llm = _load(args)
    plan = make_plan(Shape.from_config(llm.config, args.model), hardware, args.tp, args.tp, traffic)
    report = bench.run(llm.runner, plan)
    _show(json.dumps(report.to_dict(), indent=2) if args.json else report)


def _traffic(args: argparse.Namespace, dtype: str) -> Any:
    from tpjax.inspect.plan import Traffic

    prompt_len = args.prompt_len or min(args.context, 1024)
    return Traffic(
        getattr(args, "batch", 1),
        args.context,
        prompt_len,
        getattr(args, "dtype", None) or dtype,
        getattr(args, "cache_dtype", "auto"),
    )


def _explain_topology(args: argparse.Namespace) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is run: leave accelerators alone
    from tpjax.inspect.program import explain_topology
    from tpjax.inspect.topology import parse_topology

    report = explain_topology(
        args.model,
        parse_topology(args.topology),
        tp=args.tp,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        expert_sharding=args.expert_sharding,
        context=args.context,
    )
    _show(json.dumps(report.to_dict(), indent=2) if args.json else report)


def _load(args: argparse.Namespace, **options: Any) -> LLM:
    """Finds the model, sees to the devices, and loads the one onto the others."""
    _devices(args)
    from tpjax import LLM

    return LLM(
        args.model,
        tp=args.tp,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        expert_sharding=args.expert_sharding,
        **options,
    )


def _devices(args: argparse.Namespace, *, configuration: bool = False) -> None:
    """Sees to it that there are as many devices as asked for; ``configuration``: weights are not needed."""
    from tpjax.checkpoints import hub
    from tpjax.inspect.published import is_published

    # before JAX starts: a misspelt name is reported at once
    if not (configuration and is_published(args.model)):
        hub.resolve(args.model, configuration=configuration)
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
    if figures.finish_reason == "error":
        raise EngineError(delta.error)
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


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    words = list(argv)
    verb = next((i for i, word in enumerate(words) if not word.startswith("-")), 0)
    if words[verb : verb + 2] == ["bench", "serve"]:  # a verb of two words
        words[verb : verb + 2] = ["bench serve"]
    return _parser().parse_args(words)


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
    _add_chat(verbs)
    _add_serve(verbs)
    _add_bench_serve(verbs)
    _add_pull(verbs)
    _add_convert(verbs)
    _add_explain(verbs)
    _add_plan(verbs)
    _add_bench(verbs)
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
    _add_sampling_options(verb)
    verb.add_argument(
        "--stop", action="append", default=[], metavar="STR", help="end before this text; may be repeated"
    )
    verb.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-text token")


def _add_chat(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        "chat",
        _chat,
        "talk with a model; Ctrl-C stops an answer, /help shows the commands",
        """
        tpjax chat --model smollm2-135m --tp 4
        tpjax chat --model ./Llama-3.2-1B-Instruct --system "Answer in one sentence." --temperature 0.7
        """,
    )
    verb.add_argument("--model", required=True, metavar="M", help=_MODEL_HELP)
    _add_sharding_options(verb)
    verb.add_argument("--system", metavar="TEXT", help="the system message")
    _add_sampling_options(verb)
    verb.set_defaults(max_tokens=1024)


def _add_serve(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        "serve",
        _serve,
        "serve a model to many: the OpenAI API, metrics, and a web page at /",
        """
        tpjax serve --model smollm2-135m --tp 4
        tpjax serve --model ./Llama-3.1-8B-Instruct --tp 8 --host 0.0.0.0 --api-key-file keys.txt
        """,
    )
    verb.add_argument("--model", required=True, metavar="M", help=_MODEL_HELP)
    _add_sharding_options(verb)
    _add_generation_config(verb)
    verb.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    verb.add_argument("--port", type=_port, default=8000, help="0 takes a free one (8000)")
    verb.add_argument("--served-model-name", metavar="NAME", help="the model's name in the API (M)")
    verb.add_argument(
        "--max-slots", type=_request_count, default=8, metavar="N", help="requests that run at once (8)"
    )
    verb.add_argument(
        "--max-queue", type=_request_count, default=256, metavar="N", help="requests that may wait (256)"
    )
    verb.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="ask for this key everywhere but at /health, /ping, /ready and /metrics; may be repeated; shows "
        "in the process list",
    )
    verb.add_argument(
        "--api-key-file",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="the same, keys from a file",
    )
    verb.add_argument("--protect-metrics", action="store_true", help="ask for the key at /metrics too")
    verb.add_argument(
        "--allow-origin",
        action="append",
        type=_origin,
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin use the server from a browser, * any; may be repeated (none)",
    )
    verb.add_argument(
        "--max-body-mib", type=_mib_count, default=4, metavar="N", help="largest request, MiB (4)"
    )
    verb.add_argument(
        "--drain-s",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="seconds that running requests get to finish after SIGTERM (30)",
    )


def _add_bench_serve(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        "bench serve",
        _bench_serve,
        "measure a running server: latencies, throughput, goodput over request rates",
        """
        tpjax bench serve --num-prompts 64 --input-len 256 --output-len 128
        tpjax bench serve --request-rate 1 2 4 8 inf --goodput ttft:500 tpot:100 --plot rates.png
        """,
    )
    verb.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="of the server")
    verb.add_argument("--model", metavar="M", help="its name in the API (the first there is)")
    verb.add_argument("--num-prompts", type=_request_count, default=64, metavar="N", help="requests (64)")
    verb.add_argument("--input-len", type=_token_count, default=128, metavar="N", help="tokens each (128)")
    verb.add_argument("--output-len", type=_token_count, default=64, metavar="N", help="tokens each (64)")
    verb.add_argument(
        "--range-ratio", type=_fraction, default=0.0, metavar="R", help="lengths vary by this share (0)"
    )
    verb.add_argument(
        "--request-rate",
        type=_rate,
        nargs="+",
        default=[float("inf")],
        metavar="R",
        help="requests a second, one run for each; inf sends all at once (inf)",
    )
    verb.add_argument("--max-concurrency", type=_request_count, metavar="N", help="requests at once (any)")
    verb.add_argument(
        "--goodput",
        type=_goal,
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="count requests that keep to ttft, tpot and e2el, milliseconds",
    )
    verb.add_argument("--seed", type=int, default=0, metavar="S", help="of prompts and arrivals (0)")
    verb.add_argument("--api-key", metavar="KEY", help="of the server")
    verb.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of latency and throughput by rate")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write the figures")


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


def _add_convert(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        "convert",
        _convert,
        "write a model as an Orbax directory, dequantised: it loads at any --tp",
        """
        tpjax convert gemma3-270m gemma3-270m-bf16 --dtype bfloat16
        tpjax convert ./Llama-3.1-8B-Instruct llama-3.1-8b-orbax
        """,
    )
    verb.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    verb.add_argument("target", metavar="TARGET", help="a directory that does not exist yet")
    verb.add_argument(
        "--dtype",
        choices=("stored", "float32", "bfloat16", "float16"),
        default="stored",
        help="of the weights (stored: as the checkpoint has them; quantised ones become float32)",
    )


def _add_explain(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        "explain",
        _explain,
        "show how a model is cut, and why: specs, bytes, KV cache, memory, and the collectives of each step",
        """
        tpjax explain smollm2-135m --tp 4
        tpjax explain gemma3-270m --tp 6 --json
        tpjax explain smollm2-135m --tp 4 --plot shards.svg
        tpjax explain meta-llama/Llama-3.1-8B --tp 8
        tpjax explain --config llama-3-8b/config.json --tp 8
        tpjax explain llama-3-8b --topology v5e:2x4 --context 1024
        """,
    )
    verb.add_argument("model", metavar="MODEL", nargs="?", help=f"{_MODEL_HELP}; or a published model's name")
    verb.add_argument(
        "--config", metavar="FILE", help="a config.json in MODEL's place: no weights are needed"
    )
    _add_sharding_options(verb)
    verb.add_argument(
        "--topology",
        metavar="NAME:GRID",
        help="compile for chips that are not here, such as v5e:2x4 or h200:8; a wrong name lists those known",
    )
    verb.add_argument(
        "--context",
        type=int,
        default=2048,
        metavar="N",
        help="tokens in the cache of each sequence, for a TPU's estimated time (default: %(default)s)",
    )
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the shards over the mesh: .png, .svg or .pdf"
    )


def _add_plan(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        "plan",
        _plan,
        "say what a model will cost before it runs: memory, time, tokens/s, the best tp",
        """
        tpjax plan llama-3-8b --hardware h100-sxm:8
        tpjax plan llama-3.1-70b --hardware v5e:16 --tp 16 --batch 32 --context 8192 --dtype int8 --json
        tpjax plan mixtral-8x7b --hardware h200:8 --batch 256 --plot frontier.svg
        tpjax plan ./my-model/config.json --hardware mine:4 --hardware-file chips.toml
        tpjax plan smollm2-135m --measure --tp 2
        """,
    )
    verb.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint, a config.json, a Hugging Face id, or a published model's name",
    )
    verb.add_argument("--hardware", metavar="NAME:CHIPS", help="such as h100-sxm:8; a wrong name lists all")
    verb.add_argument(
        "--hardware-file", type=Path, metavar="FILE", help="JSON or TOML with figures of further chips"
    )
    verb.add_argument("--measure", action="store_true", help="measure this machine instead, and predict that")
    verb.add_argument(
        "--tp", type=_device_count, metavar="N", help="chips a replica (each that divides them)"
    )
    verb.add_argument(
        "--batch", type=_sequence_count, default=1, metavar="B", help="sequences at once, all replicas (1)"
    )
    _add_lengths(verb, 2048)
    verb.add_argument("--dtype", choices=("bf16", "int8", "fp8", "float32"), help="of the weights (bf16)")
    verb.add_argument(
        "--cache-dtype",
        choices=("auto", "bf16", "int8", "fp8", "float32"),
        default="auto",
        help="of keys and values (auto: as the weights)",
    )
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw throughput over latency: .png, .svg or .pdf"
    )


def _add_bench(verbs: Any) -> None:
    verb = _add_verb(
        verbs,
        "bench",
        _bench,
        "measure decode and prefill here, in float32, next to what plan predicts",
        """
        tpjax bench smollm2-135m --tp 2
        tpjax bench smollm2-135m --context 128 --prompt-len 128 --json
        """,
    )
    verb.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    verb.add_argument("--tp", type=_device_count, default=1, metavar="N", help="devices to shard over (1)")
    _add_lengths(verb, 256)
    verb.add_argument("--json", action="store_true", help="print JSON")


def _add_lengths(verb: argparse.ArgumentParser, context: int) -> None:
    verb.add_argument(
        "--context", type=_token_count, default=context, metavar="C", help=f"tokens in the cache ({context})"
    )
    verb.add_argument(
        "--prompt-len",
        type=_token_count,
        metavar="P",
        help=f"tokens of a prompt (the context, at most {min(context, 1024)})",
    )


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


def _add_sampling_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="most tokens to generate (128)"
    )
    verb.add_argument(
        "--temperature", type=float, metavar="T", help="0 takes the likeliest (the model's, or 1.0)"
    )
    verb.add_argument(
        "--top-k", type=int, metavar="K", help="keep the K likeliest; 0 keeps all (the model's, or 0)"
    )
    verb.add_argument(
        "--top-p", type=float, metavar="P", help="keep this much probability (the model's, or 1.0)"
    )
    verb.add_argument(
        "--min-p", type=float, metavar="P", help="as likely as the best times P (the model's, or 0)"
    )
    verb.add_argument("--seed", type=int, metavar="S", help="the same seed draws the same tokens, at any tp")
    _add_generation_config(verb)


def _add_generation_config(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--generation-config",
        default="auto",
        metavar="auto|none|PATH",
        help="the sampling defaults of the model's generation_config.json, of none, or of PATH (auto)",
    )


def _device_count(text: str) -> int:
    return _whole(text, "of devices")


def _token_count(text: str) -> int:
    return _whole(text, "of tokens")


def _sequence_count(text: str) -> int:
    return _whole(text, "of sequences")


def _request_count(text: str) -> int:
    return _whole(text, "of requests")


def _mib_count(text: str) -> int:
    return _whole(text, "of MiB")


def _origin(text: str) -> str:
    """``*``, or scheme, host and port as a browser sends them."""
    if text == "*" or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no origin: use * or scheme://host[:port], without a path")


def _port(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return number


def _seconds(text: str) -> float:
    return _number(text, "a number of seconds, 0 or more", 0.0, 1e6)


def _fraction(text: str) -> float:
    return _number(text, "a fraction, 0 to 1", 0.0, 1.0)


def _rate(text: str) -> float:
    return _number(text, "a rate above 0, or inf", 1e-6, float("inf"))


def _number(text: str, what: str, low: float, high: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return number


def _goal(text: str) -> tuple[str, float]:
    name, _, ms = text.partition(":")
    if name not in ("ttft", "tpot", "e2el"):
        raise argparse.ArgumentTypeError(f"{text!r} is not ttft:MS, tpot:MS or e2el:MS")
    return name, _number(ms, "a number of milliseconds", 0.0, 1e9)


def _whole(text: str, of_what: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {of_what}, 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
