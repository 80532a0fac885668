"""``tpjax plan``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tpjax.cli.console import show_report
from tpjax.cli.loading import chosen_model
from tpjax.cli.options import (
    Goodput,
    Json,
    MaxConcurrency,
    ModelOption,
    NumPrompts,
    Plot,
    RangeRatio,
    Rounds,
    any_int,
    option,
    positive_int,
    rates,
    refuse,
    takes,
)
from tpjax.errors import RequestError
from tpjax.planning.workload import (
    DEFAULT_CONTEXT,
    LONGEST_DEFAULT_PROMPT,
    CacheDtype,
    WeightDtype,
    Workload,
)

EXAMPLES = """
  tpjax plan llama-3-8b --hardware h100-sxm:8
  tpjax plan llama-3.1-70b --hardware v5e:16 --tp 16 --batch 32 --context 8192 --dtype int8 --json
  tpjax plan mixtral-8x7b --hardware h200:8 --batch 256 --plot frontier.svg
  tpjax plan ./my-model/config.json --hardware mine:4 --hardware-file chips.toml
  tpjax plan smollm2-135m --measure --tp 2
  tpjax plan llama-3.1-8b --hardware v6e:4 --serve --rate 1 2 4 8 inf --lengths 1024:256
  tpjax plan qwen3-32b --hardware v6e:8 --serve --trace requests.jsonl --goodput ttft:500 tpot:40 --json
"""

DEFAULT_GOALS = {"ttft": 1000.0, "tpot": 100.0}  # milliseconds
_LENGTHS, _NUM_PROMPTS = "1024:1024", 256


def in_and_out(text: str) -> tuple[int, int]:
    """Parses ``IN:OUT``, tokens of prompts and of answers."""
    prompt, colon, answer = str(text).partition(":")
    if not colon:
        raise typer.BadParameter(f"{text!r} is not IN:OUT, tokens of a prompt and of its answer")
    tokens = positive_int("tokens")
    return tokens(prompt), tokens(answer)


@dataclass
class SimulatedLoad:
    """The requests that ``--serve`` simulates."""

    rate: Annotated[list[float] | None, rates("--rate", "inf, the default, is all at once")] = None
    lengths: Annotated[
        Any,  # of prompts and answers
        option("--lengths", help="Tokens of prompts and answers.", parser=in_and_out, metavar="IN:OUT"),
    ] = _LENGTHS
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="FILE", help="Requests of a trace: Mooncake's JSON lines or Azure's CSV."
        ),
    ] = None
    num_prompts: NumPrompts = _NUM_PROMPTS
    range_ratio: RangeRatio = 0.0
    max_concurrency: MaxConcurrency = None
    max_slots: Annotated[
        int | None,
        option(
            "--max-slots",
            help="Requests that run at once (as many as fit, up to 256; 8 with --measure).",
            parser=positive_int("slots"),
            metavar="N",
        ),
    ] = None
    goodput: Goodput = None
    seed: Annotated[int, option("--seed", help="Of lengths and arrivals.", parser=any_int, metavar="S")] = 0

    def check(self, serve: bool) -> None:
        """Checks that no option is given that would change nothing.

        Raises:
            RequestError: one is.
        """
        sampled = {
            "--lengths": self.lengths != in_and_out(_LENGTHS),
            "--num-prompts": self.num_prompts != _NUM_PROMPTS,
            "--range-ratio": self.range_ratio != 0.0,
        }
        if not serve:
            served = {
                "--rate": self.rate is not None,
                "--trace": self.trace is not None,
                "--max-concurrency": self.max_concurrency is not None,
                "--max-slots": self.max_slots is not None,
                "--goodput": self.goodput is not None,
                "--seed": self.seed != 0,
            }
            refuse(served | sampled, "means nothing without --serve")
        if self.trace is not None:
            refuse(sampled, "means nothing with --trace, which has its own requests")


@takes(load=SimulatedLoad)
def run(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint, a config.json, a Hugging Face id, or a published model's name.",
        ),
    ] = None,
    model_option: ModelOption = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware", metavar="NAME:CHIPS", help="Such as h100-sxm:8 or v5e:2x4; a wrong name lists all."
        ),
    ] = None,
    hardware_file: Annotated[
        Path | None,
        typer.Option("--hardware-file", metavar="FILE", help="JSON or TOML with figures of further chips."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine instead, and predict that.")
    ] = False,
    tp: Annotated[
        int | None,
        option(
            "--tp",
            help="Devices a replica (each that divides them all).",
            parser=positive_int("devices"),
            metavar="N",
        ),
    ] = None,
    batch: Annotated[
        int,
        option(
            "--batch", help="Sequences at once, all replicas.", parser=positive_int("sequences"), metavar="B"
        ),
    ] = 1,
    context: Annotated[
        int | None,
        option(
            "--context",
            help=f"Tokens in the cache ({DEFAULT_CONTEXT}, or as many as a sequence may have).",
            parser=positive_int("tokens"),
            metavar="C",
        ),
    ] = None,
    prompt_len: Annotated[
        int | None,
        option(
            "--prompt-len",
            help=f"Tokens of a prompt (the context, at most {LONGEST_DEFAULT_PROMPT}).",
            parser=positive_int("tokens"),
            metavar="P",
        ),
    ] = None,
    dtype: Annotated[
        WeightDtype | None,
        option("--dtype", help="Of the weights (bf16; of a quantised checkpoint: stored)."),
    ] = None,
    cache_dtype: Annotated[
        CacheDtype,
        option("--kv-dtype", "--cache-dtype", help="Of keys and values; auto: as the weights."),
    ] = "auto",
    serve: Annotated[
        bool, typer.Option("--serve", help="Simulate a server under load: latencies, goodput, cache use.")
    ] = False,
    rounds: Rounds = None,
    as_json: Json = False,
    plot: Plot = None,
    *,
    load: SimulatedLoad,
) -> None:
    """Say what a model will cost before it runs: memory, time, tokens/s, the best tp; --serve: under load."""
    from tpjax.hardware import parse_hardware
    from tpjax.planning.plan import does_not_fit, make_plan, make_plans, recommend
    from tpjax.planning.plots import check_plot
    from tpjax.planning.published import find_named
    from tpjax.planning.report import PlanReport, plot_frontier
    from tpjax.planning.serving_figures import plot as plot_figures
    from tpjax.planning.serving_report import ServingLoad, serve_load
    from tpjax.planning.strategies import compare
    from tpjax.runtime.counts import Counts

    if plot is not None:
        check_plot(plot)
    if measure == (hardware is not None):
        raise RequestError("give either --hardware NAME:CHIPS or --measure")
    load.check(serve)
    if serve:
        lengths = {"--context": context is not None, "--prompt-len": prompt_len is not None}
        refuse(lengths, "means nothing with --serve, whose requests have lengths of their own")
    if measure:
        refuse({"--hardware-file": hardware_file is not None}, "means nothing with --measure")
    else:
        refuse({"--rounds": rounds is not None}, "means nothing without --measure")
    known = find_named(chosen_model(model, model_option))
    most = known.config.longest_context
    for name, tokens in (("--context", context), ("--prompt-len", prompt_len)):
        if tokens is not None and tokens > most:
            raise RequestError(f"{name} {tokens} is over the {most} tokens of a sequence of this model")
    context = context or min(DEFAULT_CONTEXT, most)
    counts = Counts(known.name, known.config, known.format_of)
    stored = known.stored_bytes
    requests = None
    if serve:
        requests = ServingLoad(load.trace, load.lengths, load.num_prompts, load.range_ratio, load.seed)
        context = requests.longest  # of the plan that chooses tp
    prompt = prompt_len or min(context, LONGEST_DEFAULT_PROMPT)
    dtype = dtype or ("stored" if stored is not None else "float32" if measure else "bf16")
    workload = Workload(batch, context, prompt, dtype, cache_dtype, stored)
    comparison = None
    if hardware is None:
        from tpjax.planning.measure import measured_hardware

        tps = [tp] if tp else list(range(1, 5))
        plans = [
            make_plan(counts, measured_hardware(n, fresh=True, rounds=rounds), n, n, workload) for n in tps
        ]
    else:
        chip, chips = parse_hardware(hardware, hardware_file)
        plans = (
            [make_plan(counts, chip, chips, tp, workload)]
            if tp
            else make_plans(counts, chip, chips, workload)
        )
    if requests is not None:
        best = plans[0] if tp else recommend(plans)[0]
        goals = dict(load.goodput or DEFAULT_GOALS)  # type: ignore[arg-type]  # parsed
        report = serve_load(best, requests, load.rate, goals, load.max_slots, load.max_concurrency)
        if plot is not None:
            plot_figures([run.result for run in report.runs], plot)
        show_report(report, as_json=as_json)
        return
    if tp is None:
        best, reason = recommend(plans)
        if hardware is not None:
            comparison = compare(counts, chip, chips, workload)
    else:
        best, reason = plans[0], f"tp={tp} as asked; most of a step is {plans[0].decode.bound}"
        if not best.fits and not as_json:  # the JSON says so itself
            raise RequestError(does_not_fit(best))
    if plot is not None:
        plot_frontier(plans, plot)
    show_report(PlanReport(plans, best, reason, comparison), as_json=as_json)
