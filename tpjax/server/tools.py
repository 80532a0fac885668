r"""Tool calls: how a model is told of tools, what it may answer, and how the answer is read.

One form for every model, Hermes's, which most open models were trained on:
``<tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call>``. A grammar holds the model to it from the
first ``<tool_call>`` on, so that reading it back is exact. Where the checkpoint's template knows nothing of
tools, they are described in the system message, and calls and results are spelled out in the conversation.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from tpjax.server.errors import bad_request
from tpjax.server.grammar import WHITESPACE
from tpjax.server.protocol import ChatBody, Message, NamedTool, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_END = "}\n" + CLOSE  # a raw newline is in no JSON string: nothing inside the arguments looks like this
_HEAD = re.compile(r'\s*\{"name": "([^"]+)", "arguments": ')

_INSTRUCTIONS = """You may call one or more functions to answer. These are their signatures:
<tools>
{tools}
</tools>
For each call, write a JSON object with its name and arguments between these tags:
<tool_call>
{{"name": <function-name>, "arguments": <arguments-object>}}
</tool_call>"""


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text, or a part of a call.

    Attributes:
        text: of the answer; or of the call's arguments.
        call: number of the call; ``None`` for text.
        name: the function's, with the first piece of a call.
    """

    text: str
    call: int | None = None
    name: str | None = None


class ToolParser:
    """Takes an answer as it comes and tells text from calls."""

    def __init__(self) -> None:
        self.calls = 0
        self._held = ""
        self._state = self._in_text

    def push(self, text: str) -> list[Piece]:
        """Takes more of the answer; returns what is now certain."""
        self._held += text
        pieces: list[Piece] = []
        while (piece := self._state()) is not None:
            pieces.append(piece)
        return [piece for piece in pieces if piece.text or piece.name]

    def flush(self) -> list[Piece]:
        """Ends the answer; returns what was held back."""
        held, self._held = self._held, ""
        if not held or self._state == self._after_call:
            return []
        return [Piece(held, self.calls - 1 if self._state == self._in_arguments else None)]

    def _in_text(self) -> Piece | None:
        return self._until(OPEN, self._in_head, None)

    def _in_head(self) -> Piece | None:
        head = _HEAD.match(self._held)
        if head is None:
            return None
        self._held, self._state = self._held[head.end() :], self._in_arguments
        self.calls += 1
        return Piece("", self.calls - 1, head[1])

    def _in_arguments(self) -> Piece | None:
        return self._until(_END, self._after_call, self.calls - 1)

    def _after_call(self) -> Piece | None:
        """Space between calls is no text."""
        self._held = self._held.lstrip()
        if not self._held:
            return None
        self._state = self._in_text
        return Piece("")

    def _until(self, mark: str, then: Any, call: int | None) -> Piece | None:
        """What is before a mark, or cannot be the beginning of one."""
        before, found, after = self._held.partition(mark)
        if found:
            self._held, self._state = after, then
            return Piece(before, call)
        keep = next((n for n in range(len(mark) - 1, 0, -1) if self._held.endswith(mark[:n])), 0)
        cut = len(self._held) - keep
        before, self._held = self._held[:cut], self._held[cut:]
        return Piece(before, call) if before else None


def grammar(body: ChatBody) -> str | None:
    """The grammar of what a model may answer, in Lark; ``None`` where anything goes."""
    if not body.tools or body.tool_choice == "none":
        return None
    choice = body.tool_choice or "auto"
    tools = body.tools
    if isinstance(choice, NamedTool):
        named = choice.function.name
        tools = [tool for tool in tools if tool.function.name == named]
    many = "*" if body.parallel_tool_calls is not False and not isinstance(choice, NamedTool) else ""
    more = f'("\\n" {_quoted(OPEN)} body){many}' if many else ""
    lines = [f"body: {' | '.join(f'call{i}' for i in range(len(tools)))}"]
    for i, tool in enumerate(tools):
        head = "\n" + '{"name": ' + json.dumps(tool.function.name) + ', "arguments": '
        lines.append(f"call{i}: {_quoted(head)} %json {_parameters(tool)} {_quoted(_END)}")
    if choice == "auto":
        lines += [
            f"start: TEXT | trigger body {more}",
            f"trigger[lazy]: TEXT {_quoted(OPEN)}",
            r"TEXT: /(.|\n)*/",
        ]
    else:
        lines.append(f"start: {_quoted(OPEN)} body {more}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return _json(text)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # escapes would be other text to the model


def _parameters(tool: Tool) -> str:
    # where a tool is not strict, a keyword that cannot be enforced is only advice
    options = {"whitespace_pattern": WHITESPACE, "lenient": not tool.function.strict}
    return json.dumps({**(tool.function.parameters or {"type": "object"}), "x-guidance": options})


def conversation(
    messages: Sequence[Message], tools: Sequence[Tool] | None, template_knows_tools: bool
) -> list[dict[str, Any]]:
    """Messages as templates take them: text content, and arguments as objects.

    Raises:
        ApiError: 400; a part is no text, or arguments are no JSON object.
    """
    plain = [_plain(message, i) for i, message in enumerate(messages)]
    if template_knows_tools:
        return plain
    plain = [_spelled_out(message) for message in plain]
    if tools:
        described = "\n".join(_json(tool.model_dump(exclude_none=True)) for tool in tools)
        text = _INSTRUCTIONS.format(tools=described)
        if plain[0]["role"] == "system":
            plain[0] = {**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}
        else:
            plain.insert(0, {"role": "system", "content": text})
    return plain


def call_id() -> str:
    """A new id for a call."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _plain(message: Message, position: int) -> dict[str, Any]:
    plain = message.model_dump(exclude_none=True)
    plain["content"] = _text(message.content, position)
    for call in plain.get("tool_calls", ()):
        try:
            # as strict as with the body: no NaN, no lone surrogate, no ten thousand brackets
            arguments = from_json(call["function"]["arguments"] or "{}", allow_inf_nan=False)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise bad_request(
                f"messages[{position}] has a tool call whose arguments are no JSON object", "messages"
            )
        call["function"]["arguments"] = arguments
    return plain


def _text(content: str | list[dict[str, Any]] | None, position: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        kind = part.get("type")
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            raise bad_request(
                f"messages[{position}] has a part of type {str(kind)[:40]!r}: only text is supported",
                "messages",
            )
        texts.append(part[kind])
    return "\n".join(texts)


def _spelled_out(message: dict[str, Any]) -> dict[str, Any]:
    """Calls and results as text."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [f"{OPEN}\n{_json(call['function'])}\n{CLOSE}" for call in message.pop("tool_calls", ())]
    if calls:
        message["content"] = "\n".join(filter(None, [message["content"], *calls]))
    return message
