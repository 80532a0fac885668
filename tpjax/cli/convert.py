"""``tpjax convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tpjax.cli.loading import ensure
from tpjax.cli.options import MODEL_HELP, ModelOption, Processes, option, takes
from tpjax.distributed import process_id
from tpjax.errors import RequestError

EXAMPLES = """
  tpjax convert gemma3-270m gemma3-270m-bf16 --dtype bfloat16
  tpjax convert ./Llama-3.1-8B-Instruct llama-3.1-8b-orbax
"""


@takes(processes=Processes)
def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    target: Annotated[
        str | None, typer.Argument(metavar="TARGET", help="A directory that does not exist yet.")
    ] = None,
    model_option: ModelOption = None,
    dtype: Annotated[
        Literal["stored", "float32", "bfloat16", "float16"],
        option(
            "--dtype",
            help="Of the weights; stored: as in the checkpoint, quantised ones as float32.",
        ),
    ] = "stored",
    *,
    processes: Processes,
) -> None:
    """Write a model as an Orbax directory, dequantised: it loads at any --tp."""
    if target is None and model_option is not None:
        model, target = model_option, model
    if target is None:
        raise RequestError("no target is given: convert MODEL TARGET, a directory that does not exist yet")
    processes.join()
    from tpjax.checkpoints import hub

    if processes.several:
        ensure(model, 1)

    path = hub.resolve(model)
    import jax.numpy as jnp

    from tpjax.checkpoints.convert import convert
    from tpjax.checkpoints.digests import digest_of_edges
    from tpjax.runtime.role import together

    digest = digest_of_edges(path) if processes.several else None  # reads both ends of every file
    facts = {"work": "convert", "model": path.name, "checkpoint": digest, "dtype": dtype}
    with together(facts) as role:
        role.share(dict)  # from now on a process that fails ends the others
        convert(path, Path(target), None if dtype == "stored" else jnp.dtype(dtype))
    if not process_id():
        print(target)
