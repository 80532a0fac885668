"""Tool calls as messages and deltas of the OpenAI API."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from tpjax.server.json_types import JsonObject
from tpjax.server.parsing.incremental import ParsedDelta


def call_id() -> str:
    """Returns a new id for a call."""
    return f"call_{uuid.uuid4().hex[:24]}"


def tool_calls(parts: Sequence[ParsedDelta]) -> list[JsonObject]:
    """Returns the tool calls of a response."""
    calls: list[JsonObject] = []
    for piece in parts:
        if piece.call is None:
            continue
        if piece.name is not None:
            function = {"name": piece.name, "arguments": ""}
            calls.append({"id": call_id(), "type": "function", "function": function})
        calls[piece.call]["function"]["arguments"] += piece.text
    return calls


def delta(piece: ParsedDelta) -> JsonObject:
    """Returns a part of a response as a chunk's delta; the first part of a call has its name and id."""
    if piece.reasoning:
        return {"reasoning": piece.text, "reasoning_content": piece.text}  # vLLM's new name and its old
    if piece.call is None:
        return {"content": piece.text}
    call: JsonObject = {"index": piece.call, "function": {"arguments": piece.text}}
    if piece.name is not None:
        call |= {"id": call_id(), "type": "function"}
        call["function"]["name"] = piece.name
    return {"tool_calls": [call]}
