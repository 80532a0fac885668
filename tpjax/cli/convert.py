"""``tpjax convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tpjax.cli.options import MODEL_HELP, ModelOption, option
from tpjax.errors import RequestError

EXAMPLES = """
  tpjax convert gemma3-270m gemma3-270m-bf16 --dtype bfloat16
  tpjax convert ./Llama-3.1-8B-Instruct llama-3.1-8b-orbax
"""


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
) -> None:
    """Write a model as an Orbax directory, dequantised: it loads at any --tp."""
    if target is None and model_option is not None:
        model, target = model_option, model
    if target is None:
        raise RequestError("no target is given: convert MODEL TARGET, a directory that does not exist yet")
    from tpjax.checkpoints import hub

    path = hub.resolve(model)
    import jax.numpy as jnp

    from tpjax.checkpoints.convert import convert

    convert(path, Path(target), None if dtype == "stored" else jnp.dtype(dtype))
    print(target)
