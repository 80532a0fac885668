"""``tpjax bench``."""

from __future__ import annotations

from typing import Annotated

from tpjax.cli.console import show_report
from tpjax.cli.loading import chosen_model, load
from tpjax.cli.options import Json, Model, ModelOption, Rounds, Sharding, option, positive_int
from tpjax.errors import RequestError
from tpjax.planning.workload import LONGEST_DEFAULT_PROMPT, Workload

EXAMPLES = """
  tpjax bench smollm2-135m --tp 2
  tpjax bench smollm2-135m --context 128 --prompt-len 128 --rounds 3 --json
"""


def run(
    model: Model = None,
    model_option: ModelOption = None,
    tp: Annotated[
        int, option("--tp", help="Devices to shard over.", parser=positive_int("devices"), metavar="N")
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
) -> None:
    """Measure decode and prefill here, in float32, next to what plan predicts."""
    from tpjax.checkpoints import hub
    from tpjax.checkpoints.load import read_config
    from tpjax.planning import step_benchmark
    from tpjax.planning.measure import measured_hardware
    from tpjax.planning.plan import make_plan
    from tpjax.runtime.counts import Counts

    name = chosen_model(model, model_option)
    workload = Workload(1, context, prompt_len or min(context, LONGEST_DEFAULT_PROMPT), "float32")
    # before anything is measured: a misspelt name and a context too long are reported at once
    longest = read_config(hub.resolve(name)).longest_context
    if step_benchmark.longest(workload) > longest:
        raise RequestError(
            f"--context {context} and --prompt-len {workload.prompt_len} need sequences of "
            f"{step_benchmark.longest(workload)} tokens, over the model's {longest}"
        )
    hardware = measured_hardware(tp, rounds=rounds)  # in a process of its own, before this one starts JAX
    llm = load(name, Sharding(tp=tp, dtype="float32", max_model_len=step_benchmark.longest(workload)))
    plan = make_plan(Counts(name, llm.config), hardware, tp, tp, workload)
    show_report(step_benchmark.run(llm.runner, plan, rounds), as_json=as_json)
