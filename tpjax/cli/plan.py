"""``tpjax plan``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

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


def lengths(text: str) -> tuple[int, int]:
    """Parses ``IN:OUT``, tokens of prompts and of answers."""
    prompt, colon, answer = str(text).partition(":")
    if not colon:
        raise typer.BadParameter(f"{text!r} is not IN:OUT, tokens of a prompt and of its answer")
    tokens = positive_int("tokens")
    return tokens(prompt), tokens(answer)


_parse_lengths = lengths  # a parameter of ``run`` has the name of its option


def _refuse(why: str, options: Mapping[str, bool], when: bool) -> None:
    """Raises a ``RequestError`` that names the first option that was given and would change nothing."""
    for name, given in options.items():
        if when and given:
            raise RequestError(f"{name} {why}")


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
    rate: Annotated[list[float] | None, rates("--rate", "inf, the default, is all at once")] = None,
    lengths: Annotated[
        str,
        option("--lengths", help="Tokens of prompts and answers.", parser=lengths, metavar="IN:OUT"),
    ] = _LENGTHS,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="FILE", help="Requests of a trace: Mooncake's JSON lines or Azure's CSV."
        ),
    ] = None,
    num_prompts: NumPrompts = _NUM_PROMPTS,
    range_ratio: RangeRatio = 0.0,
    max_concurrency: MaxConcurrency = None,
    max_slots: Annotated[
        int | None,
        option(
            "--max-slots",
            help="Requests that run at once (as many as fit, up to 256; 8 with --measure).",
            parser=positive_int("slots"),
            metavar="N",
        ),
    ] = None,
    goodput: Goodput = None,
    seed: Annotated[int, option("--seed", help="Of lengths and arrivals.", parser=any_int, metavar="S")] = 0,
    rounds: Rounds = None,
    as_json: Json = False,
    plot: Plot = None,
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
    sampled = {
        "--lengths": lengths != _parse_lengths(_LENGTHS),  # type: ignore[comparison-overlap]  # parsed
        "--num-prompts": num_prompts != _NUM_PROMPTS,
        "--range-ratio": range_ratio != 0.0,
    }
    of_serve = {
        "--rate": rate is not None,
        "--trace": trace is not None,
        "--max-concurrency": max_concurrency is not None,
        "--max-slots": max_slots is not None,
        "--goodput": goodput is not None,
        "--seed": seed != 0,
        **sampled,
    }
    _refuse("means nothing without --serve", of_serve, not serve)
    _refuse("means nothing with --trace, which has its own requests", sampled, trace is not None)
    lengths_given = {"--context": context is not None, "--prompt-len": prompt_len is not None}
    _refuse("means nothing with --serve, whose requests have lengths of their own", lengths_given, serve)
    _refuse("means nothing with --measure", {"--hardware-file": hardware_file is not None}, measure)
    _refuse("means nothing without --measure", {"--rounds": rounds is not None}, not measure)
    known = find_named(chosen_model(model, model_option))
    most = known.config.longest_context
    for name, tokens in (("--context", context), ("--prompt-len", prompt_len)):
        if tokens is not None and tokens > most:
            raise RequestError(f"{name} {tokens} is over the {most} tokens of a sequence of this model")
    context = context or min(DEFAULT_CONTEXT, most)
    counts = Counts(known.name, known.config, known.format_of)
    stored = known.stored_bytes
    load = None
    if serve:
        load = ServingLoad(trace, lengths, num_prompts, range_ratio, seed)  # type: ignore[arg-type]  # parsed
        context = load.longest  # of the plan that chooses tp
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
        if tp:
            plans = [make_plan(counts, chip, chips, tp, workload)]
        else:
            plans = make_plans(counts, chip, chips, workload)
    if load is not None:
        best = plans[0] if tp else recommend(plans)[0]
        goals = dict(goodput or DEFAULT_GOALS)  # type: ignore[arg-type]  # parsed
        report = serve_load(best, load, rate, goals, max_slots, max_concurrency)
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
