"""``tpjax pull``."""

from __future__ import annotations

from typing import Annotated

import typer

from tpjax.cli.loading import chosen_model
from tpjax.cli.options import Model, ModelOption
from tpjax.errors import RequestError

EXAMPLES = """
  tpjax pull smollm2-135m
  tpjax pull gemma3-270m --verify
  tpjax pull HuggingFaceTB/SmolLM2-360M-Instruct
"""


def run(
    model: Model = None,
    model_option: ModelOption = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the file again and compare its digest.")
    ] = False,
) -> None:
    """Fetch a model into the cache and print its path."""
    from tpjax.checkpoints import hub

    name = chosen_model(model, model_option)
    if verify and name not in hub.ALIASES:
        aliases = ", ".join(hub.ALIASES)
        raise RequestError(f"--verify knows the digests of built-in aliases ({aliases}), not of {name!r}")
    path = hub.resolve(name)
    if verify:
        hub.verify(name)
    print(path)
