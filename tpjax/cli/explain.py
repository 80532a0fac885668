"""``tpjax explain``."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated

import typer

from tpjax.cli.console import native_output_hidden, show_report
from tpjax.cli.loading import chosen_model, ensure
from tpjax.cli.options import (
    MODEL_HELP,
    Json,
    ModelOption,
    Plot,
    Processes,
    Sharding,
    option,
    positive_int,
    refuse,
    takes,
)
from tpjax.distributed import process_id
from tpjax.errors import RequestError
from tpjax.planning.workload import DEFAULT_CONTEXT, STEP_BATCH, STEP_PROMPT_LEN

EXAMPLES = """
  tpjax explain smollm2-135m --tp 4
  tpjax explain gemma3-270m --tp 6 --json
  tpjax explain smollm2-135m --tp 4 --plot shards.svg
  tpjax explain meta-llama/Llama-3.1-8B --tp 8
  tpjax explain --config llama-3-8b/config.json --tp 8
  tpjax explain llama-3-8b --topology v5e:2x4 --context 1024
  tpjax explain llama-3-8b --topology v5e:2x4 --attention tpu --batch 64 --prompt-len 2048
  tpjax explain smollm2-135m --tp 2 --pp 2
  tpjax explain llama-3.1-70b --topology v5e:4x4 --pp 2
"""


@takes(sharding=Sharding, processes=Processes)
def run(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} Or a published model's name.")
    ] = None,
    model_option: ModelOption = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config", metavar="FILE", help="A config.json in MODEL's place: no weights are needed."
        ),
    ] = None,
    topology: Annotated[
        str | None,
        typer.Option(
            "--topology",
            metavar="NAME:GRID",
            help="Compile for chips that are not here, such as v5e:2x4 or h200:8; a wrong name lists all.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        option(
            "--context",
            help="With --topology: tokens in the cache of each sequence, for a TPU's estimated time "
            f"({DEFAULT_CONTEXT}).",
            parser=positive_int("tokens"),
            metavar="N",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        option(
            "--batch",
            help=f"With --topology: sequences of the decode step ({STEP_BATCH}).",
            parser=positive_int("sequences"),
            metavar="N",
        ),
    ] = None,
    prompt_len: Annotated[
        int | None,
        option(
            "--prompt-len",
            help=f"With --topology: tokens of the prefill step ({STEP_PROMPT_LEN}), filled up to its chunks.",
            parser=positive_int("tokens"),
            metavar="N",
        ),
    ] = None,
    as_json: Json = False,
    plot: Plot = None,
    *,
    sharding: Sharding,
    processes: Processes,
) -> None:
    """Show how a model is sharded, and why: specs, bytes, KV cache, memory, and each step's collectives."""
    if topology is None:
        steps = {"--context": context, "--batch": batch, "--prompt-len": prompt_len}
        refuse({name: given is not None for name, given in steps.items()}, "means nothing without --topology")
    if (model is None and model_option is None) == (config is None):
        raise RequestError("give either MODEL or --config FILE")
    name = config or chosen_model(model, model_option)
    if plot is not None and sharding.pp > 1:
        raise RequestError(f"--plot draws the shards of one mesh, and --pp {sharding.pp} has several")
    if plot is not None:
        from tpjax.planning.plots import check_plot

        check_plot(plot)
    if topology is not None:
        if plot is not None:
            raise RequestError("--plot draws what --topology does not look at: leave one out")
        if processes.several:
            raise RequestError("--topology looks at no device here, thus at none of other processes either")
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is run: leave accelerators alone
        with native_output_hidden():
            from tpjax.inspect.program import explain_topology
            from tpjax.inspect.topology import parse_topology

            chips = parse_topology(topology)
            compiled = explain_topology(
                name,
                chips,
                context=context or DEFAULT_CONTEXT,
                batch=batch or STEP_BATCH,
                prompt_len=prompt_len or STEP_PROMPT_LEN,
                **asdict(sharding),
            )
        show_report(compiled, as_json=as_json)
        return
    processes.join()
    ensure(name, sharding.tp, sharding.dp, sharding.pp, configuration=True)
    from tpjax.inspect.explain import explain_model
    from tpjax.inspect.explain_report import Report

    report = explain_model(name, **asdict(sharding))
    if process_id():
        return
    if plot is not None and isinstance(report, Report):
        from tpjax.planning.plots import save

        save(report.figure(), plot)
    show_report(report, as_json=as_json)
