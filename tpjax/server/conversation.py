"""Converts messages to the form that a chat template accepts, without dropping any of their content.

What the template accepts stays as it is, and renders as in transformers. The rest is converted: ``developer``
to ``system``, a system message to a prefix of the first user message, several messages of a role to one, tool
calls and tools to text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence

from tpjax.server.error_responses import bad_request
from tpjax.server.json_bodies import MAX_PARTS, parts
from tpjax.server.json_types import JsonObject, strict_json
from tpjax.server.parsing.tool_call_formats import ToolCallFormat
from tpjax.server.protocol import Message, Tool
from tpjax.server.template_traits import Traits, reasoning_fields

Turn = JsonObject

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")  # in order of preference
_ACKNOWLEDGED = "OK."  # assistant message after tool results, if a user message may not follow them
_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")
_INVALID = "invalid_arguments"  # field of the text of arguments that are no JSON object
_RESULT = "<tool_response>\n{}\n</tool_response>"

_INSTRUCTIONS = """You may call one or more functions to answer. These are their signatures:
<tools>
{tools}
</tools>
{how}"""


def conversation(
    messages: Sequence[Message], tools: Sequence[Tool] | None, traits: Traits, form: ToolCallFormat
) -> list[Turn]:
    """Returns the messages for one template.

    Args:
        messages: messages of the request.
        tools: tools that the model may call.
        traits: what the template accepts.
        form: format of tool calls, for templates that do not render them.

    Raises:
        ApiError: 400, a content part is not text, or arguments have too many parts.
    """
    _check_arguments(messages)
    turns = [_turn(message, i, traits) for i, message in enumerate(messages)]
    turns = _with_ids(turns)
    turns = list(_native_calls(turns, traits)) if traits.tool_messages else _calls_as_text(turns, form)
    if tools and not traits.tools:
        turns = _described(turns, tools, form)
    turns = _system_where_it_may_be(turns, traits)
    return _alternating(turns) if traits.alternation else turns


def _turn(message: Message, position: int, traits: Traits) -> Turn:
    turn = message.model_dump(exclude_none=True)
    role = turn["role"]
    if role == "developer" and not traits.developer:
        role = "system"
    turn["role"] = role = "tool" if role == "function" else role
    texts, thoughts = _texts(message.content, position)
    if "audio" in turn:  # the official client sends a null, which is not here
        raise bad_request(f"messages[{position}] has audio: only text is supported", "messages")
    if isinstance(refusal := turn.pop("refusal", None), str) and not any(texts):
        texts = [refusal]  # what an answer has in place of its content
    if not isinstance(message.content, list) or role not in traits.parts:
        turn["content"] = " ".join(texts)  # joined as transformers' server does
    else:
        turn["content"] = [{"type": "text", "text": text} for text in texts]
    if role == "assistant":
        named = (turn.pop(name, None) for name in _REASONING_FIELDS)
        reasoning = next((one for one in list(named) if isinstance(one, str) and one), thoughts)
        turn |= reasoning_fields(reasoning) if reasoning else {}
    for call in turn.get("tool_calls", ()):
        call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    if not turn.get("tool_calls", True):
        del turn["tool_calls"]  # templates ask only whether the list is there, and an empty one has no calls
    return turn


def message_text(message: Message) -> str:
    """Returns the text of a message."""
    return " ".join(_texts(message.content, 0)[0])


def _texts(content: str | list[JsonObject] | None, position: int) -> tuple[list[str], str]:
    """Returns the texts of a message, and the reasoning among its parts."""
    if content is None or isinstance(content, str):
        return [content or ""], ""
    texts, thoughts = [], []
    for part in content:
        kind = part.get("type")
        field = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
        if kind == "thinking" and isinstance(part.get("thinking"), str):
            thoughts.append(part["thinking"])
        elif field is not None and isinstance(part.get(field), str):
            texts.append(part[field])
        else:
            raise bad_request(
                f"messages[{position}] has a part of type {str(kind)[:40]!r}: only text is supported",
                "messages",
            )
    return texts, "\n".join(thoughts)


def _check_arguments(messages: Sequence[Message]) -> None:
    """Checks the parts of all arguments together: the limit of the body does not count what is in a string.

    A text that is no JSON may hide the parts of those after it, but these are not decoded then.
    """
    texts = (call.function.arguments for message in messages for call in message.tool_calls or ())
    if (count := parts(" ".join(texts).encode())) > MAX_PARTS:
        what = "the arguments of the tool calls"
        raise bad_request(f"{what} have {count} objects, lists and fields, over {MAX_PARTS}", "messages")


def _arguments(text: str) -> JsonObject:
    """Returns a call's arguments; those that are no JSON object as one with their text.

    Calls that ended at the token limit come back in agents' histories, with an error as their result.
    """
    try:
        arguments = {} if text in ("", "null") else strict_json(text)  # of a call without any
    except ValueError:
        arguments = None
    return arguments if isinstance(arguments, dict) else {_INVALID: text}


# --- calls and results


def _with_ids(turns: list[Turn]) -> list[Turn]:
    """Adds missing ids to calls and results; results belong to calls in their order."""
    waiting: dict[str, None] = {}  # a dict: there may be thousands, and this runs on the event loop
    for position, turn in enumerate(turns):
        if calls := turn.get("tool_calls"):
            for number, call in enumerate(calls):
                call.setdefault("id", f"call{position}x{number}")
            waiting = dict.fromkeys(call["id"] for call in calls)
        elif turn["role"] == "tool":
            id_ = turn.get("tool_call_id") or next(iter(waiting), "")
            if id_:
                turn["tool_call_id"] = id_
                waiting.pop(id_, None)
    return turns


def _native_calls(turns: list[Turn], traits: Traits) -> Iterator[Turn]:
    """Yields messages with calls in the template's fields, one call per message if it needs that."""
    carried: list[Turn] = []  # whose text, beside calls, has to move to the next assistant message
    for turn in turns if traits.parallel_calls else _one_call_each(turns):
        if traits.short_ids and turn["role"] == "tool" and "tool_call_id" in turn:
            turn = {**turn, "tool_call_id": _short(turn["tool_call_id"])}
        calls = turn.get("tool_calls")
        if not calls:
            if carried and turn["role"] == "assistant":
                text = f"{_joined(carried)}\n\n{as_text(turn['content'])}"
                turn, carried = {**turn, "content": text}, []
            yield turn
            continue
        turn = {**turn, "tool_calls": [_call(call, traits) for call in calls]}
        if turn["content"] and not traits.text_and_calls:
            if traits.alternation:
                carried.append(turn)
            else:
                yield {"role": "assistant", "content": turn["content"]}
            turn = {**turn, "content": ""}
        if turn["content"] and not traits.reasoning_with_text:
            turn = {name: value for name, value in turn.items() if name not in _REASONING_FIELDS}
        if not turn["content"] and traits.none_content:
            turn["content"] = None
        yield turn


def _call(call: Turn, traits: Traits) -> Turn:
    function = call["function"]
    arguments = function["arguments"]
    if not traits.object_arguments:
        arguments = json.dumps(arguments, ensure_ascii=False)
    id_ = _short(call["id"]) if traits.short_ids else call["id"]
    return {**call, "id": id_, "function": {**function, "arguments": arguments}}


def _short(id_: str) -> str:
    """Returns an id of nine letters and digits, the same one for the same id."""
    return id_ if _SHORT_ID.fullmatch(id_) else hashlib.sha256(id_.encode()).hexdigest()[:9]


def _one_call_each(turns: list[Turn]) -> Iterator[Turn]:
    """Yields parallel calls one after the other, each followed by its results."""
    position = 0
    while position < len(turns):
        turn = turns[position]
        position += 1
        calls = turn.get("tool_calls", ())
        if len(calls) < 2:
            yield turn
            continue
        results = list(itertools.takewhile(lambda one: one["role"] == "tool", turns[position:]))
        position += len(results)
        by_call: dict[str | None, list[Turn]] = {call["id"]: [] for call in calls}
        for one in results:
            by_call.setdefault(one.get("tool_call_id"), []).append(one)
        for number, call in enumerate(calls):
            first = turn if number == 0 else {"role": "assistant", "content": ""}
            yield {**first, "tool_calls": [call]}
            yield from by_call.pop(call["id"], ())  # of equal ids, the first call has the results
        yield from (one for one in results if one.get("tool_call_id") in by_call)


def _calls_as_text(turns: list[Turn], form: ToolCallFormat) -> list[Turn]:
    """Writes calls and results as text; the results of one message's calls are one user message."""
    plain: list[Turn] = []
    for results, group in itertools.groupby(turns, lambda turn: turn["role"] == "tool"):
        if results:
            text = "\n".join(_RESULT.format(turn["content"]) for turn in group)
            plain.append({"role": "user", "content": text})
            continue
        for turn in group:
            calls = turn.pop("tool_calls", ())
            if calls:
                functions = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
                turn["content"] = "\n".join(filter(None, [as_text(turn["content"]), form.render(functions)]))
            plain.append(turn)
    return plain


def _described(turns: list[Turn], tools: Sequence[Tool], form: ToolCallFormat) -> list[Turn]:
    signatures = [json.dumps(tool.described(), ensure_ascii=False) for tool in tools]
    text = _INSTRUCTIONS.format(tools="\n".join(signatures), how=form.instructions)
    if turns[0]["role"] in ("system", "developer"):
        content = f"{as_text(turns[0]['content'])}\n\n{text}"
        return [{**turns[0], "content": content}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


# --- roles where they may be


def _system_where_it_may_be(turns: list[Turn], traits: Traits) -> list[Turn]:
    def is_system(turn: Turn) -> bool:
        return turn["role"] in ("system", "developer")

    first = list(itertools.takewhile(is_system, turns))
    rest = turns[len(first) :]
    if not traits.late_system:
        rest = [{"role": "user", "content": one["content"]} if is_system(one) else one for one in rest]
    if len(first) > 1 and not traits.systems:
        first = [{**first[0], "content": _joined(first)}]
    if not first or traits.system:
        return [*first, *rest]
    if rest and rest[0]["role"] == "user":
        return [{**rest[0], "content": _joined([*first, rest[0]])}, *rest[1:]]
    return [{"role": "user", "content": _joined(first)}, *rest]


def _alternating(turns: list[Turn]) -> list[Turn]:
    """Joins adjacent messages of one role; calls and results are exempt from the alternation."""
    groups: list[list[Turn]] = []
    for turn in turns:
        last = groups[-1][-1] if groups else {"role": None}
        if last["role"] == "tool" and turn["role"] == "user":
            last = {"role": "assistant", "content": _ACKNOWLEDGED}
            groups.append([last])
        alike = turn["role"] == last["role"] and turn["role"] in ("user", "assistant")
        if alike and "tool_calls" not in turn and "tool_calls" not in last:
            groups[-1].append(turn)
        else:
            groups.append([turn])
    return [one[0] if len(one) == 1 else {**one[0], "content": _joined(one)} for one in groups]


def _joined(turns: Sequence[Turn]) -> str:
    return "\n\n".join(filter(None, (as_text(turn["content"]) for turn in turns)))


def as_text(content: str | list[dict[str, str]]) -> str:
    """Returns the text of what a turn has for the template."""
    return content if isinstance(content, str) else " ".join(part["text"] for part in content)
