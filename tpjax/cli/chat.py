"""``tpjax chat``."""

from __future__ import annotations

import dataclasses
import signal
import sys
from typing import Annotated, NoReturn

import typer

from tpjax.cli.console import EXIT_INTERRUPTED, note
from tpjax.cli.loading import chosen_model, ensure, load, note_defaults
from tpjax.cli.options import GenerationConfig, Model, ModelOption, Processes, Sampling, Sharding, takes
from tpjax.distributed import process_id

EXAMPLES = """
  tpjax chat smollm2-135m --tp 4
  tpjax chat ./Llama-3.2-1B-Instruct --system "Answer in one sentence." --temperature 0.7
"""
MAX_TOKENS = 1024
TEMPERATURE = 0.7  # where neither the command line nor the model has one


@takes(sharding=Sharding, sampling=Sampling, processes=Processes)
def run(
    model: Model = None,
    model_option: ModelOption = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="The system message.")
    ] = None,
    generation_config: GenerationConfig = "auto",
    *,
    sharding: Sharding,
    sampling: Sampling,
    processes: Processes,
) -> None:
    """Talk with a model; Ctrl-C stops an answer, /help shows the commands."""
    from tpjax.cli.terminal import chat, check_template

    name = chosen_model(model, model_option)
    params = sampling.params(max_tokens=MAX_TOKENS)
    processes.join()
    if process_id():
        load(name, sharding, max_slots=1, generation_config=generation_config)  # follows process 0
    if processes.several:
        ensure(name, sharding.tp, sharding.dp, sharding.pp)
    check_template(name)  # before the weights are read
    llm = load(name, sharding, max_slots=1, generation_config=generation_config)
    note_defaults(llm)
    if processes.several:  # Ctrl-C stops an answer, SIGTERM, of this process or another, all of them
        signal.signal(signal.SIGTERM, _end)
    if params.temperature is None and "temperature" not in llm.sampling_defaults:
        params = dataclasses.replace(params, temperature=TEMPERATURE)
    note(f"{name} at {llm.layout}; /help shows the commands")
    chat(llm, params, system)


def _end(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one more, from another process, changes nothing
    sys.exit(EXIT_INTERRUPTED)
