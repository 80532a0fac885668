"""Converts OpenAI's older ``functions``, and ``allowed_tools``, to ``tools``; and responses back."""

from __future__ import annotations

from tpjax.server.error_responses import bad_request
from tpjax.server.json_types import JsonObject
from tpjax.server.protocol import AllowedTools, ChatBody, Message, NamedFunction, NamedTool, Tool, ToolCall


def modern(body: ChatBody) -> ChatBody:
    """Returns a request with ``tools`` and a plain ``tool_choice``.

    ``functions``, ``function_call`` and messages with either are the older names of tools, ``tool_choice``
    and tool calls. With ``allowed_tools`` the other tools are not offered at all.

    Raises:
        ApiError: 400, old and new parameters are mixed, or a named function does not exist.
    """
    for old, new in (("functions", "tools"), ("function_call", "tool_choice")):
        if getattr(body, old) is not None and getattr(body, new) is not None:
            raise bad_request(f"{old} and {new} say the same: give one", old)
    changed: JsonObject = {"messages": _messages(body.messages)}
    if body.functions is not None:
        if not body.functions:
            raise bad_request("functions is empty: at least 1 function is needed", "functions")
        tools = [Tool(type="function", function=function) for function in body.functions]
        changed |= {"tools": tools, "parallel_tool_calls": False}
    if body.function_call is not None:
        if body.functions is None:
            raise bad_request("function_call needs functions", "function_call")
        choice: str | NamedFunction | NamedTool = body.function_call
        if isinstance(choice, NamedFunction):
            if choice.name not in (known := [function.name for function in body.functions]):
                raise bad_request(
                    f"function_call names {choice.name!r}, but functions has {', '.join(known)}",
                    "function_call",
                )
            choice = NamedTool(type="function", function=choice)
        changed["tool_choice"] = choice
    if isinstance(body.tool_choice, AllowedTools):
        changed |= _allowed(body, body.tool_choice)
    return body.model_copy(update=changed)


def message(message: JsonObject) -> JsonObject:
    """Returns a response's message, or a delta of it, with ``function_call`` instead of its one tool call."""
    calls = message.pop("tool_calls", None)
    return message | {"function_call": calls[0]["function"]} if calls else message


def finish_reason(reason: str | None) -> str | None:
    """Returns the finish reason under its older name."""
    return "function_call" if reason == "tool_calls" else reason


def _allowed(body: ChatBody, choice: AllowedTools) -> JsonObject:
    names = [tool.function.name for tool in choice.allowed_tools.tools]
    known = [tool.function.name for tool in body.tools or ()]
    if missing := [name for name in names if name not in known]:
        raise bad_request(
            f"tool_choice allows {missing[0]!r}, but tools has {', '.join(known) or 'none'}", "tool_choice"
        )
    tools = [tool for tool in body.tools or () if tool.function.name in names]
    return {"tools": tools, "tool_choice": choice.allowed_tools.mode}


def _messages(messages: list[Message]) -> list[Message]:
    """Returns messages with tool calls and results instead of ``function_call`` and the role ``function``."""
    ids: dict[str | None, str] = {}  # function name -> id of its last call
    found: list[Message] = []
    for at, one in enumerate(messages):
        if one.function_call is not None and not one.tool_calls:
            ids[one.function_call.name] = ident = f"call{at:05d}"  # Mistral's templates want nine letters
            call = ToolCall(id=ident, function=one.function_call)
            one = one.model_copy(update={"function_call": None, "tool_calls": [call]})
        elif one.role == "function":
            one = one.model_copy(update={"role": "tool", "tool_call_id": ids.get(one.name, f"call{at:05d}")})
        found.append(one)
    return found
