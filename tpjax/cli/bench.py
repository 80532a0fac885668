"""``tpjax bench``."""

from __future__ import annotations

from typing import Annotated

from tpjax.cli.console import show_report
from tpjax.cli.loading import chosen_model, ensure, load
from tpjax.cli.options import (
    Json,
    Model,
    ModelOption,
    Processes,
    Rounds,
    Sharding,
    option,
    positive_int,
    takes,
)
from tpjax.distributed import num_processes
from tpjax.errors import RequestError
from tpjax.planning.workload import LONGEST_DEFAULT_PROMPT, Workload

EXAMPLES = """
  tpjax bench smollm2-135m --tp 2
  tpjax bench smollm2-135m --dp 2
  tpjax bench smollm2-135m --tp 2 --pp 2
  tpjax bench smollm2-135m --context 128 --prompt-len 128 --rounds 3 --json
"""


@takes(processes=Processes)
def run(
    model: Model = None,
    model_option: ModelOption = None,
    tp: Annotated[
        int, option("--tp", help="Devices to shard over.", parser=positive_int("devices"), metavar="N")
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
            help="Tokens of a prompt (the context).",
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
    from tpjax.checkpoints.load import read_config
    from tpjax.planning import stage_benchmark, step_benchmark
    from tpjax.planning.measure import measured_hardware
    from tpjax.planning.plan import make_plan
    from tpjax.runtime.counts import Counts

    name = chosen_model(model, model_option)
    processes.join()
    if dp > 1 and pp > 1:
        raise RequestError(f"--dp {dp} and --pp {pp} are measured one at a time: leave one out")
    if pp > 1 and num_processes() > 1:
        raise RequestError(f"--pp {pp}: stages are measured in one process, and there are {num_processes()}")
    if processes.several:
        ensure(name, tp, dp)
    workload = Workload(dp, context, prompt_len or min(context, LONGEST_DEFAULT_PROMPT), "float32")
    # before anything is measured: a misspelt name and a context too long are reported at once
    needed, longest = step_benchmark.longest(workload), read_config(hub.resolve(name)).longest_context
    if needed > longest:
        raise RequestError(
            f"--context {context} and --prompt-len {workload.prompt_len} need sequences of "
            f"{needed} tokens, over the model's {longest}"
        )
    # before this process starts JAX, if it is the only one: measuring has one of its own
    hardware = measured_hardware(tp * dp, rounds=rounds)
    llm = load(name, Sharding(tp=tp, dp=dp, pp=pp, dtype="float32", max_model_len=needed))
    if pp > 1:
        stages = stage_benchmark.run(llm.runner, name, llm.config, hardware, workload, rounds)
        show_report(stages, as_json=as_json)
        return
    plan = make_plan(Counts(name, llm.config), hardware, tp * dp, tp, workload)
    first, *others = (engine.runner for engine in llm.engines)
    show_report(step_benchmark.run(first, plan, rounds, others), as_json=as_json)
