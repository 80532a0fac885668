"""``tpjax serve``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tpjax.cli.console import note, read_text
from tpjax.cli.loading import chosen_model, ensure, load
from tpjax.cli.options import (
    GenerationConfig,
    MaxNumBatchedTokens,
    MaxSlots,
    Model,
    ModelOption,
    Processes,
    Sharding,
    number,
    option,
    port,
    positive_int,
    takes,
)
from tpjax.distributed import process_id
from tpjax.errors import ConfigError

if TYPE_CHECKING:
    from tpjax.llm import LLM

EXAMPLES = """
  tpjax serve smollm2-135m --tp 4
  tpjax serve smollm2-135m --dp 2 --tp 2
  tpjax serve smollm2-135m --pp 2 --tp 2
  tpjax serve ./Llama-3.1-8B-Instruct --tp 8 --host 0.0.0.0 --api-key-file keys.txt
"""


def origin(text: str) -> str:
    """Parses an origin: ``*``, or scheme, host and port as a browser sends them."""
    if text == "*" or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+", text):
        return text
    raise typer.BadParameter(f"{text!r} is no origin: use * or scheme://host[:port], without a path")


def key(text: str) -> str:
    """Parses a key: that of a variable that is not set would let nobody in, or everybody."""
    if not text.strip():
        raise typer.BadParameter("a key is empty")
    return text


@takes(sharding=Sharding, processes=Processes)
def run(
    model: Model = None,
    model_option: ModelOption = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, option("--port", help="0 takes a free one.", parser=port, metavar="N")] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            "--served-model-name",
            metavar="NAME",
            help="The model's name in the API (M; of a path its last part).",
        ),
    ] = None,
    max_slots: MaxSlots = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    max_queue: Annotated[
        int,
        option("--max-queue", help="Requests that may wait.", parser=positive_int("requests"), metavar="N"),
    ] = 256,
    api_key: Annotated[
        list[str] | None,
        option(
            "--api-key",
            parser=key,
            metavar="KEY",
            help="Ask for this key everywhere but at /health, /ping, /ready and /metrics; may be repeated; "
            "shows in the process list. The page asks its user for it.",
        ),
    ] = None,
    api_key_file: Annotated[
        list[Path] | None, typer.Option("--api-key-file", metavar="FILE", help="The same, keys from a file.")
    ] = None,
    protect_metrics: Annotated[
        bool, typer.Option("--protect-metrics", help="Ask for the key at /metrics too.")
    ] = False,
    allow_origin: Annotated[
        list[str] | None,
        option(
            "--allow-origin",
            help="Let pages of this origin use the server from a browser, * any; may be repeated.",
            parser=origin,
            metavar="ORIGIN",
        ),
    ] = None,
    max_body_mib: Annotated[
        int, option("--max-body-mib", help="Largest request, MiB.", parser=positive_int("MiB"), metavar="N")
    ] = 4,
    drain_s: Annotated[
        float,
        option(
            "--drain-s",
            help="Seconds that running requests get to finish after SIGTERM.",
            parser=number("a number of seconds, 0 or more", 0.0, 1e6),
            metavar="S",
        ),
    ] = 30.0,
    generation_config: GenerationConfig = "auto",
    *,
    sharding: Sharding,
    processes: Processes,
) -> None:
    """Serve a model to many: the OpenAI API, metrics, and a web page at /."""
    try:
        from tpjax.server.run import Options, serve
        from tpjax.server.service import name_in_api
    except ImportError as error:
        raise ConfigError(f"serving needs more packages ({error}): pip install 'tpjax[serve]'") from error
    name = chosen_model(model, model_option)
    keys = [*(api_key or ()), *(one for file in api_key_file or () for one in _keys(file))]
    if protect_metrics and not keys:
        raise ConfigError("--protect-metrics needs a key: give --api-key or --api-key-file")
    options = Options(
        model=served_model_name or name_in_api(name),
        host=host,
        port=port,
        api_keys=tuple(keys),
        protect_metrics=protect_metrics,
        allow_origins=tuple(allow_origin or ()),
        max_queue=max_queue,
        max_body_bytes=max_body_mib << 20,
        drain_s=drain_s,
    )
    processes.join()
    ensure(name, sharding.tp, sharding.dp, sharding.pp)

    def loaded() -> LLM:
        return load(
            name,
            sharding,
            max_slots=max_slots,
            generation_config=generation_config,
            max_num_batched_tokens=max_num_batched_tokens,
        )

    if process_id():
        loaded()  # follows process 0, which has the server
    serve(loaded, options, note)


def _keys(file: Path) -> list[str]:
    keys = read_text(file).split()
    if not keys:
        raise ConfigError(f"{file}: no key in it")
    return keys
