"""Tool calls as the API has them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from tpjax.server.parsing.incremental import ParsedDelta


def call_id() -> str:
    """A new id for a call."""
    return f"call_{uuid.uuid4().hex[:24]}"


def whole_calls(pieces: Sequence[ParsedDelta]) -> list[dict[str, Any]]:
    """The calls of an answer."""
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if piece.call is None:
            continue
        if piece.name is not None:
            function = {"name": piece.name, "arguments": ""}
            calls.append({"id": call_id(), "type": "function", "function": function})
        calls[piece.call]["function"]["arguments"] += piece.text
    return calls


def delta(piece: ParsedDelta) -> dict[str, Any]:
    """A piece of an answer as a chunk has it: a call's name and id come once, with its first."""
    if piece.reasoning:
        return {"reasoning": piece.text, "reasoning_content": piece.text}  # vLLM's new name and its old
    if piece.call is None:
        return {"content": piece.text}
    call: dict[str, Any] = {"index": piece.call, "function": {"arguments": piece.text}}
    if piece.name is not None:
        call |= {"id": call_id(), "type": "function"}
        call["function"]["name"] = piece.name
    return {"tool_calls": [call]}
