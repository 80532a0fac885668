"""Probes what a chat template accepts by rendering small conversations, since templates are code.

Each probe holds words that occur nowhere else. A template accepts a conversation if it renders it and every
word is in the result: raising an error and silently dropping a message then count the same.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tpjax.server.error_responses import ApiError
from tpjax.server.json_types import Json, JsonObject

Render = Callable[[JsonObject], Awaitable[str]]

_WORDS = ("qzalpha", "qzbravo", "qzcharlie", "qzdelta", "qzecho", "qzfoxtrot")
_A, _B, _C, _D, _E, _F = _WORDS
LONG_ID, SHORT_ID = "call_0123456789abcdef01234567", "qz1234567"


@dataclass(frozen=True)
class Traits:
    """What one template accepts.

    Attributes:
        parts: roles whose content may be a list of text parts.
        system: accepts a system message at the start.
        systems: accepts several system messages at the start.
        late_system: accepts a system message in the middle.
        developer: accepts the role ``developer``.
        alternation: needs user and assistant in turn: adjacent messages of one role are refused or dropped.
        tools: renders descriptions of tools.
        tool_messages: renders calls and results, with roles and fields of their own.
        none_content: needs ``None`` as the content of a message with calls, not an empty text.
        text_and_calls: accepts text and calls in one message.
        parallel_calls: accepts several calls in one message.
        object_arguments: needs the arguments of a call as an object, not as JSON in a string.
        short_ids: needs ids of nine letters and digits for calls (Mistral).
        reasoning_with_text: accepts reasoning and text in one message with calls.
    """

    parts: frozenset[str] = frozenset()
    system: bool = True
    systems: bool = True
    late_system: bool = True
    developer: bool = False
    alternation: bool = False
    tools: bool = False
    tool_messages: bool = False
    none_content: bool = False
    text_and_calls: bool = True
    parallel_calls: bool = True
    object_arguments: bool = True
    short_ids: bool = False
    reasoning_with_text: bool = True


async def traits_of(render: Render, source: str, *, with_tools: bool = False) -> Traits:
    """Probes a template.

    Args:
        render: renders the arguments of ``ChatTemplates.render``; raises ``ApiError`` if it fails.
        source: Jinja source; a template knows a role only if its source has the name of the role.
        with_tools: the template is for conversations with tools, so each probe has a tool.

    Raises:
        ApiError: the server is too busy, or the template too slow.
    """
    probe = _Probe(render, [_tool("qzhotel")] if with_tools else None)
    user, answer = _message("user", _A), _message("assistant", _B)
    if not await probe.accepts([user], _A):  # then no other probe could say anything either
        return Traits(tools="tools" in source, tool_messages="tools" in source)
    four = [user, answer, _message("user", _C), _message("user", _D)]
    found: JsonObject = {
        "parts": await _parts(probe),
        "system": await probe.accepts([_message("system", _C), user], _C, _A),
        "developer": "developer" in source and await probe.accepts([_message("developer", _C), user], _C, _A),
        "alternation": not await probe.accepts(four, *_WORDS[:4]),
        "tools": "tools" in source and await probe.accepts([user], _F, tools=[_tool(_F)]),
    }
    if found["system"]:
        system, more = _message("system", _C), _message("system", _D)
        found["systems"] = await probe.accepts([system, more, user], _C, _D, _A)
        found["late_system"] = await probe.accepts([user, answer, more, _message("user", _E)], _A, _B, _D, _E)
    else:
        found["systems"] = found["late_system"] = False
    if "tool" in source:
        found |= await _tool_traits(probe)
    return Traits(**found)


async def _parts(probe: _Probe) -> frozenset[str]:
    """Returns the roles whose content may be a list without losing text. Tool results are always text."""
    parts = [{"type": "text", "text": _A}, {"type": "text", "text": _B}]
    user, listed = _message("user", _C), await probe.accepts([_message("user", parts)], _A, _B)
    tried = {
        "user": listed,
        "system": listed and await probe.accepts([_message("system", parts), user], _A, _B, _C),
        "assistant": listed and await probe.accepts([user, _message("assistant", parts), user], _A, _B, _C),
    }
    return frozenset(role for role, taken in tried.items() if taken)


async def _tool_traits(probe: _Probe) -> dict[str, bool]:
    """Returns how calls and results are rendered: the first of the usual forms that keeps all of them."""
    for content in ("", None):
        for as_object in (True, False):
            for id_ in (LONG_ID, SHORT_ID):
                shape: JsonObject = {"content": content, "as_object": as_object}
                if not await probe.accepts(_exchange((id_,), **shape), _A, _B, _C, _D, _E):
                    continue
                two = _exchange((id_, id_[::-1]), **shape)
                # without a final answer after them: gpt-oss keeps what led to a call only until there is one
                both = _exchange((id_,), **shape | {"content": _F})[:3]
                thought = _exchange((id_,), **shape | {"content": _F}, reasoning="qzgolf")[:3]
                whole = await probe.accepts(both, _A, _B, _C, _D, _F)
                return {
                    "tool_messages": True,
                    "none_content": content is None,
                    "object_arguments": as_object,
                    "short_ids": id_ == SHORT_ID,
                    "text_and_calls": whole,
                    "parallel_calls": await probe.accepts(
                        two, _A, _B + "0", _B + "1", _D + "0", _D + "1", _E
                    ),
                    "reasoning_with_text": not whole or await probe.accepts(thought, _A, _B, _C, _D, _F),
                }
    return {"tool_messages": False}


class _Probe:
    def __init__(self, render: Render, tools: list[JsonObject] | None) -> None:
        self._render = render
        self._tools = tools

    async def accepts(
        self, messages: Sequence[JsonObject], *words: str, tools: list[JsonObject] | None = None
    ) -> bool:
        """Returns whether the messages render and all words are in the result."""
        call = {"messages": list(messages), "tools": tools or self._tools, "add_generation_prompt": True}
        try:
            text = await self._render(call)
        except ApiError as error:
            # the server is busy, or the template exceeds its time limit: no result, and no further probes
            if error.status >= 429 or "took over" in error.message:
                raise
            return False
        # a template that prints a list of parts as Python does has not accepted it
        return all(word in text for word in words) and "{'type'" not in text


def _message(role: str, content: Json, **more: Json) -> JsonObject:
    return {"role": role, "content": content, **more}


def _exchange(
    ids: tuple[str, ...], *, content: str | None, as_object: bool, reasoning: str | None = None
) -> list[JsonObject]:
    """Returns a question, calls, their results and a response."""
    mark = [str(i) for i in range(len(ids))] if len(ids) > 1 else [""]
    arguments: Json = {_C: 1} if as_object else f'{{"{_C}": 1}}'
    calls = [
        {"id": id_, "type": "function", "function": {"name": _B + i, "arguments": arguments}}
        for i, id_ in zip(mark, ids, strict=True)
    ]
    thoughts = {} if reasoning is None else reasoning_fields(reasoning)
    results = [_message("tool", _D + i, tool_call_id=id_) for i, id_ in zip(mark, ids, strict=True)]
    assistant = _message("assistant", content, tool_calls=calls, **thoughts)
    return [_message("user", _A), assistant, *results, _message("assistant", _E), _message("user", "so")]


def reasoning_fields(text: str) -> dict[str, str]:
    """Returns an assistant's reasoning under each of the names that templates read."""
    return {"reasoning_content": text, "reasoning": text, "thinking": text}


def _tool(name: str) -> JsonObject:
    parameters = {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}
