"""What a chat template takes: found by rendering small conversations, since templates are code.

Each probe holds words that occur nowhere else. A template takes a conversation if it renders it and every
word comes out: one that refuses and one that drops a message in silence are then the same.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tpjax.server.error_responses import ApiError

Render = Callable[[dict[str, Any]], Awaitable[str]]

_WORDS = ("qzalpha", "qzbravo", "qzcharlie", "qzdelta", "qzecho", "qzfoxtrot")
_A, _B, _C, _D, _E, _F = _WORDS
LONG_ID, SHORT_ID = "call_0123456789abcdef01234567", "qz1234567"


@dataclass(frozen=True)
class Traits:
    """What one template takes.

    Attributes:
        parts: roles whose content may be a list of text parts.
        system: a system message at the start.
        systems: several at the start.
        late_system: one in the middle.
        developer: the role, by that name.
        alternation: only user and assistant in turn: neighbours of one role are refused or dropped.
        tools: descriptions of tools.
        tool_messages: calls and their results, in roles and fields of their own.
        none_content: a message with calls has no content, as opposed to an empty one.
        text_and_calls: text and calls in one message.
        parallel_calls: several calls in one message.
        object_arguments: a call's arguments as an object, as opposed to JSON in a string.
        short_ids: calls have ids of nine letters and digits (Mistral's).
        reasoning_with_text: reasoning and text in one message with calls.
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
        render: renders the arguments of ``ChatTemplates.render``, and raises ``ApiError`` where it cannot.
        source: of the template; a role's name has to stand in it for the role to be known.
        with_tools: it is the one for conversations with tools, so each probe has some.

    Raises:
        ApiError: the server is too busy, or the template too slow.
    """
    probe = _Probe(render, [_tool("qzhotel")] if with_tools else None)
    user, answer = _message("user", _A), _message("assistant", _B)
    if not await probe.takes([user], _A):  # then no other probe could say anything either
        return Traits(tools="tools" in source, tool_messages="tools" in source)
    four = [user, answer, _message("user", _C), _message("user", _D)]
    found: dict[str, Any] = {
        "parts": await _parts(probe),
        "system": await probe.takes([_message("system", _C), user], _C, _A),
        "developer": "developer" in source and await probe.takes([_message("developer", _C), user], _C, _A),
        "alternation": not await probe.takes(four, *_WORDS[:4]),
        "tools": "tools" in source and await probe.takes([user], _F, tools=[_tool(_F)]),
    }
    if found["system"]:
        system, more = _message("system", _C), _message("system", _D)
        found["systems"] = await probe.takes([system, more, user], _C, _D, _A)
        found["late_system"] = await probe.takes([user, answer, more, _message("user", _E)], _A, _B, _D, _E)
    else:
        found["systems"] = found["late_system"] = False
    if "tool" in source:
        found |= await _tool_traits(probe)
    return Traits(**found)


async def _parts(probe: _Probe) -> frozenset[str]:
    """Roles whose content may be a list, of which nothing is lost. A tool's is text everywhere."""
    parts = [{"type": "text", "text": _A}, {"type": "text", "text": _B}]
    user, listed = _message("user", _C), await probe.takes([_message("user", parts)], _A, _B)
    tried = {
        "user": listed,
        "system": listed and await probe.takes([_message("system", parts), user], _A, _B, _C),
        "assistant": listed and await probe.takes([user, _message("assistant", parts), user], _A, _B, _C),
    }
    return frozenset(role for role, taken in tried.items() if taken)


async def _tool_traits(probe: _Probe) -> dict[str, bool]:
    """How calls and results are written, if at all: the first of the usual ways that keeps all of it."""
    for content in ("", None):
        for as_object in (True, False):
            for id_ in (LONG_ID, SHORT_ID):
                shape: dict[str, Any] = {"content": content, "as_object": as_object}
                if not await probe.takes(_exchange((id_,), **shape), _A, _B, _C, _D, _E):
                    continue
                two = _exchange((id_, id_[::-1]), **shape)
                # without a final answer after them: gpt-oss keeps what led to a call only until there is one
                both = _exchange((id_,), **shape | {"content": _F})[:3]
                thought = _exchange((id_,), **shape | {"content": _F}, reasoning="qzgolf")[:3]
                whole = await probe.takes(both, _A, _B, _C, _D, _F)
                return {
                    "tool_messages": True,
                    "none_content": content is None,
                    "object_arguments": as_object,
                    "short_ids": id_ == SHORT_ID,
                    "text_and_calls": whole,
                    "parallel_calls": await probe.takes(two, _A, _B + "0", _B + "1", _D + "0", _D + "1", _E),
                    "reasoning_with_text": not whole or await probe.takes(thought, _A, _B, _C, _D, _F),
                }
    return {"tool_messages": False}


class _Probe:
    def __init__(self, render: Render, tools: list[dict[str, Any]] | None) -> None:
        self._render = render
        self._tools = tools

    async def takes(
        self, messages: Sequence[dict[str, Any]], *words: str, tools: list[dict[str, Any]] | None = None
    ) -> bool:
        """Whether the messages render and the words come out."""
        call = {"messages": list(messages), "tools": tools or self._tools, "add_generation_prompt": True}
        try:
            text = await self._render(call)
        except ApiError as error:
            # the server is busy, or the template takes for ever: nothing is known of it, and no more is tried
            if error.status >= 429 or "took over" in error.message:
                raise
            return False
        # a template that prints a list of parts as Python does has not taken it
        return all(word in text for word in words) and "{'type'" not in text


def _message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _exchange(
    ids: tuple[str, ...], *, content: str | None, as_object: bool, reasoning: str | None = None
) -> list[dict[str, Any]]:
    """A question, calls, their results and an answer."""
    mark = [str(i) for i in range(len(ids))] if len(ids) > 1 else [""]
    arguments: Any = {_C: 1} if as_object else f'{{"{_C}": 1}}'
    calls = [
        {"id": id_, "type": "function", "function": {"name": _B + i, "arguments": arguments}}
        for i, id_ in zip(mark, ids, strict=True)
    ]
    thoughts = {} if reasoning is None else reasoning_fields(reasoning)
    results = [_message("tool", _D + i, tool_call_id=id_) for i, id_ in zip(mark, ids, strict=True)]
    assistant = _message("assistant", content, tool_calls=calls, **thoughts)
    return [_message("user", _A), assistant, *results, _message("assistant", _E), _message("user", "so")]


def reasoning_fields(text: str) -> dict[str, str]:
    """An assistant's reasoning under each name that templates read it by."""
    return {"reasoning_content": text, "reasoning": text, "thinking": text}


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}
