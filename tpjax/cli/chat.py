"""``tpjax chat``."""

from __future__ import annotations

from typing import Annotated

import typer

from tpjax.cli.console import note
from tpjax.cli.loading import chosen_model, load
from tpjax.cli.options import Model, ModelOption, Sampling, Sharding, takes

EXAMPLES = """
  tpjax chat smollm2-135m --tp 4
  tpjax chat ./Llama-3.2-1B-Instruct --system "Answer in one sentence." --temperature 0.7
"""
MAX_TOKENS = 1024
TEMPERATURE = 0.7  # where neither the command line nor the model has one


@takes(sharding=Sharding, sampling=Sampling)
def run(
    model: Model = None,
    model_option: ModelOption = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="The system message.")
    ] = None,
    *,
    sharding: Sharding,
    sampling: Sampling,
) -> None:
    """Talk with a model; Ctrl-C stops an answer, /help shows the commands."""
    from tpjax.cli.terminal import chat, check_template

    name = chosen_model(model, model_option)
    params = sampling.params(max_tokens=MAX_TOKENS)
    check_template(name)  # before the weights are read
    llm = load(name, sharding, max_slots=1)
    note(f"{name} at tp={llm.mesh.size}; /help shows the commands")
    chat(llm, params, system)
