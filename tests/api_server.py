"""A server of the tiny model, started once a session, for tests of what clients may ask of the API."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
from serving import Running, load_tiny, running, tiny_checkpoint

from tpjax import LLM
from tpjax.text.tokenizer import Tokenizer

HI: Any = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
LOOK: Any = {"name": "look", "parameters": SCHEMA}
LEAVE: Any = {"name": "leave", "parameters": SCHEMA}
TOOL: Any = {"type": "function", "function": LOOK}
BOS = 0


@dataclass(frozen=True)
class Api:
    """A running server and what its tests hold it against.

    Attributes:
        directory: the checkpoint; its tokenizer puts a BOS before each text.
        server: the server, which allows pages of https://a.example.
        client: the official client.
        http: a plain client.
        offline: the same model without a server.
        tokenizer: its tokenizer.
    """

    directory: Path
    server: Running
    client: openai.OpenAI
    http: httpx.Client
    offline: LLM
    tokenizer: Tokenizer


@contextlib.contextmanager
def api_of(directory: Path) -> Iterator[Api]:
    """Writes the tiny model into a directory and serves it until the block ends."""
    tiny_checkpoint(directory)
    library = json.loads((directory / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    library["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [BOS], "tokens": ["<|bos|>"]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(library))
    offline = load_tiny(directory)
    assert offline.tokenizer is not None
    with (
        running(lambda: load_tiny(directory), allow_origins=("https://a.example",)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        server.client() as http,
    ):
        yield Api(directory, server, client, http, offline, offline.tokenizer)


def bytes_of(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token a byte."""
    own = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [own[bytes([byte])] for byte in data]
