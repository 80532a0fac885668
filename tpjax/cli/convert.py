"""``tpjax convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tpjax.cli.loading import chosen_model, ensure
from tpjax.cli.options import MODEL_HELP, ModelOption, Processes, option, takes
from tpjax.config import Quantize
from tpjax.distributed import process_id
from tpjax.errors import RequestError

EXAMPLES = """
  tpjax convert gemma3-270m gemma3-270m-bf16 --dtype bfloat16
  tpjax convert ./Llama-3.1-8B-Instruct llama-3.1-8b-orbax
  tpjax convert ./Llama-3.1-8B-Instruct llama-3.1-8b-int8 --quantize int8 --format safetensors
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
    quantize: Annotated[
        Quantize | None,
        option("--quantize", help="Round the weights to 8 bits or 4, as generate and serve do at load."),
    ] = None,
    target_format: Annotated[
        Literal["orbax", "safetensors"],
        option(
            "--format",
            help="safetensors: a quantised Hugging Face directory, as compressed-tensors stores it.",
        ),
    ] = "orbax",
    *,
    processes: Processes,
) -> None:
    """Write a model as a directory that loads at any --tp: dequantised, or quantised anew."""
    if target is None and model_option is not None:
        model, target = model_option, model
    model = chosen_model(model, model_option)
    if target_format == "safetensors" and quantize is None:
        raise RequestError("--format safetensors needs --quantize: int8, fp8 or int4")
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
    with together(facts | {"quantize": quantize, "format": target_format}) as role:
        role.share(dict)  # from now on a process that fails ends the others
        kind = None if dtype == "stored" else jnp.dtype(dtype)
        convert(path, Path(target), kind, quantize, target_format)
    if not process_id():
        print(target)
