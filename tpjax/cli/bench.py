"""``tpjax bench``."""

from __future__ import annotations

from typing import Annotated

from tpjax.cli.console import show_report
from tpjax.cli.loading import chosen_model, load
from tpjax.cli.options import Json, Model, ModelOption, Rounds, Sharding, option, whole

EXAMPLES = """
  tpjax bench smollm2-135m --tp 2
  tpjax bench smollm2-135m --context 128 --prompt-len 128 --rounds 3 --json
"""


def run(
    model: Model = None,
    model_option: ModelOption = None,
    tp: Annotated[
        int, option("--tp", help="Devices to shard over.", parser=whole("devices"), metavar="N")
    ] = 1,
    context: Annotated[
        int, option("--context", help="Tokens in the cache.", parser=whole("tokens"), metavar="C")
    ] = 256,
    prompt_len: Annotated[
        int | None,
        option("--prompt-len", help="Tokens of a prompt (the context).", parser=whole("tokens"), metavar="P"),
    ] = None,
    rounds: Rounds = None,
    as_json: Json = False,
) -> None:
    """Measure decode and prefill here, in float32, next to what plan predicts."""
    from tpjax.checkpoints import hub
    from tpjax.planning import bench
    from tpjax.planning.counts import Counts
    from tpjax.planning.measure import measured_hardware
    from tpjax.planning.plan import Workload, make_plan

    name = chosen_model(model, model_option)
    hub.resolve(name)  # before anything is measured: a misspelt name is reported at once
    hardware = measured_hardware(tp, rounds=rounds)  # in a process of its own, before this one starts JAX
    workload = Workload(1, context, prompt_len or min(context, 1024), "float32")
    llm = load(name, Sharding(tp=tp, dtype="float32", max_model_len=bench.longest(workload)))
    plan = make_plan(Counts(name, llm.config), hardware, tp, tp, workload)
    show_report(bench.run(llm.runner, plan, rounds), as_json=as_json)
