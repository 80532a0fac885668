"""``tpjax bench serve``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tpjax.cli.console import show
from tpjax.cli.options import (
    MOST_TOKENS,
    Goodput,
    Json,
    MaxConcurrency,
    NumPrompts,
    Plot,
    RangeRatio,
    any_int,
    option,
    positive_int,
    rates,
)

EXAMPLES = """
  tpjax bench serve --num-prompts 64 --input-len 256 --output-len 128
  tpjax bench serve --request-rate 1 2 4 8 inf --goodput ttft:500 tpot:100 --plot rates.svg
"""


def run(
    base_url: Annotated[
        str, typer.Option("--base-url", metavar="URL", help="Of the server, with or without /v1.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option("--model", metavar="M", help="Its name in the API (the first one listed).")
    ] = None,
    num_prompts: NumPrompts = 64,
    input_len: Annotated[
        int,
        option(
            "--input-len",
            help="Tokens of each prompt.",
            parser=positive_int("tokens", MOST_TOKENS),
            metavar="N",
        ),
    ] = 128,
    output_len: Annotated[
        int,
        option(
            "--output-len",
            help="Tokens of each response.",
            parser=positive_int("tokens", MOST_TOKENS),
            metavar="N",
        ),
    ] = 64,
    range_ratio: RangeRatio = 0.0,
    request_rate: Annotated[
        list[float] | None, rates("--request-rate", "inf, the default, sends all at once")
    ] = None,
    max_concurrency: MaxConcurrency = None,
    goodput: Goodput = None,
    seed: Annotated[int, option("--seed", help="Of prompts and arrivals.", parser=any_int, metavar="S")] = 0,
    api_key: Annotated[str | None, typer.Option("--api-key", metavar="KEY", help="Of the server.")] = None,
    as_json: Json = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the figures as JSON.")
    ] = None,
    plot: Plot = None,
) -> None:
    """Measure a running server: latencies, throughput, goodput over request rates."""
    from tpjax.cli import serving_benchmark as benchmark
    from tpjax.cli.console import check_writable, write_text

    if output is not None:
        check_writable(output)
    if plot is not None:
        from tpjax.planning.plots import check_plot

        check_plot(plot)
    profile = benchmark.LoadProfile(
        base_url=base_url,
        model=model,
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        range_ratio=range_ratio,
        max_concurrency=max_concurrency,
        seed=seed,
        api_key=api_key,
    )
    results = benchmark.sweep(profile, request_rate or [float("inf")], dict(goodput or ()))  # type: ignore[arg-type]
    figures = json.dumps([result.summary() for result in results], indent=2)
    if as_json:
        show(figures)
    else:
        for result in results:
            show(result.table())
    if output is not None:
        write_text(output, figures + "\n")
    if plot is not None:
        from tpjax.planning.serving_figures import plot as draw

        draw(results, plot)
