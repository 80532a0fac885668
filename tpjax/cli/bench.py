"""``tpjax bench``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from tpjax.cli.console import show_report
from tpjax.cli.following import attend
from tpjax.cli.loading import chosen_model, ensure, load, load_everywhere
from tpjax.cli.options import (
    Json,
    Model,
    ModelOption,
    Processes,
    Rounds,
    Sharding,
    mesh_devices,
    option,
    positive_int,
    takes,
)
from tpjax.errors import RequestError
from tpjax.mesh import devices_of_stages
from tpjax.planning.workload import LONGEST_DEFAULT_PROMPT, Workload

EXAMPLES = """
  tpjax bench smollm2-135m --tp 2
  tpjax bench smollm2-135m --dp 2
  tpjax bench smollm2-135m --tp 2 --pp 2
  tpjax bench smollm2-135m --tp 3,1 --pp 2
  tpjax bench smollm2-135m --context 128 --prompt-len 128 --rounds 3 --json
"""


@takes(processes=Processes)
def run(
    model: Model = None,
    model_option: ModelOption = None,
    tp: Annotated[
        Any,  # an integer, or one for each stage
        option(
            "--tp",
            help="Devices to shard over; for different pipeline stages those of each: 3,1.",
            parser=mesh_devices,
            metavar="N",
        ),
    ] = 1,
    dp: Annotated[
        int,
        option(
            "--dp",
            help="Replicas at once, a sequence each.",
            parser=positive_int("replicas"),
            metavar="N",
        ),
    ] = 1,
    pp: Annotated[
        int,
        option(
            "--pp",
            help="Pipeline stages, each measured alone on --tp devices.",
            parser=positive_int("stages"),
            metavar="N",
        ),
    ] = 1,
    context: Annotated[
        int, option("--context", help="Tokens in the cache.", parser=positive_int("tokens"), metavar="C")
    ] = 256,
    prompt_len: Annotated[
        int | None,
        option(
            "--prompt-len",
            help=f"Tokens of a prompt (the context, at most {LONGEST_DEFAULT_PROMPT}).",
            parser=positive_int("tokens"),
            metavar="P",
        ),
    ] = None,
    rounds: Rounds = None,
    as_json: Json = False,
    *,
    processes: Processes,
) -> None:
    """Measure decode and prefill here, in float32, next to what plan predicts."""
    from tpjax.checkpoints import hub
    from tpjax.checkpoints.opening import read_config
    from tpjax.planning import step_benchmark
    from tpjax.planning.measure import measured_hardware
    from tpjax.planning.plan import make_plan
    from tpjax.runtime.counts import Counts

    name = chosen_model(model, model_option)
    processes.join()
    if dp > 1 and pp > 1:
        raise RequestError(f"--dp {dp} and --pp {pp} are measured one at a time: leave one out")
    tps = devices_of_stages(tp, pp)
    if processes.several:
        ensure(name, tp, dp, pp)
    workload = Workload(dp, context, prompt_len or min(context, LONGEST_DEFAULT_PROMPT), "float32")
    # before anything is measured: a misspelt name and a context too long are reported at once
    needed, longest = step_benchmark.longest(workload), read_config(hub.resolve(name)).longest_context
    if needed > longest:
        raise RequestError(
            f"--context {context} and --prompt-len {workload.prompt_len} need sequences of "
            f"{needed} tokens, over the model's {longest}"
        )
    sharding = Sharding(tp=tp, dp=dp, pp=pp, dtype="float32", max_model_len=needed)
    # before this process starts JAX, if it is the only one: measuring has one of its own
    if pp > 1:
        show_stages(name, sharding, tps, workload, rounds, as_json=as_json)
        return
    hardware = measured_hardware(tps[0] * dp, rounds=rounds)
    llm = load(name, sharding)
    plan = make_plan(Counts(name, llm.config), hardware, tps[0] * dp, tps[0], workload)
    first, *others = (engine.runner for engine in llm.engines)
    show_report(step_benchmark.run(first, plan, rounds, others), as_json=as_json)


def show_stages(
    name: str,
    sharding: Sharding,
    tps: Sequence[int],
    workload: Workload,
    rounds: int | None,
    *,
    as_json: bool,
) -> None:
    """Measures pipeline stages of ``tps`` devices; of several processes each its own."""
    from tpjax.planning import stage_benchmark
    from tpjax.planning.measure import measured_stages

    lengths = {"context": workload.context, "prompt_len": workload.prompt_len}
    hardware = measured_stages(tps, lengths, rounds=rounds)
    llm = load_everywhere(name, sharding)
    with llm.role.telling():
        report = stage_benchmark.run(llm.runner, name, llm.config, hardware, workload, rounds)
    attend(llm)
    show_report(report, as_json=as_json)
