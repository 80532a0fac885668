"""``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from tpjax.engine.generation import Delta
from tpjax.server import tools
from tpjax.server.answers import gather, make_requests, submit, token_text, usage
from tpjax.server.errors import bad_request
from tpjax.server.grammar import GrammarCompiler, TokenGrammar
from tpjax.server.protocol import ChatBody, Message, Tool
from tpjax.server.sandbox import Sandbox
from tpjax.server.service import Service

if TYPE_CHECKING:
    from tpjax.engine.request import Request, TokenLogprobs
    from tpjax.llm import LLM
    from tpjax.text.tokenizer import Tokenizer


class Templates:
    """Renders conversations and compiles grammars, each in a worker of its own.

    Args:
        tokenizer: of the model.
        vocab_size: of the model.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._templates = tokenizer.chat_templates
        arguments = (self._templates.sources, self._templates.variables)
        self._renderer, self._checker = Sandbox(*arguments), Sandbox(*arguments)
        self.grammars = GrammarCompiler(tokenizer, vocab_size, self._checker)

    async def prompt(
        self,
        messages: Sequence[Message],
        offered: Sequence[Tool] | None = None,
        *,
        add_generation_prompt: bool = True,
        options: dict[str, Any] | None = None,
    ) -> list[int]:
        """The tokens of a conversation.

        Raises:
            ApiError: 400; the messages or their rendering are not fit.
        """
        if not messages:
            raise bad_request("messages is empty: at least 1 message is needed", "messages")
        source = self._templates.sources.get(self._templates.chosen(offered), "")
        knows = "tools" in source
        plain = tools.conversation(messages, offered, knows)
        given = [tool.model_dump(exclude_none=True) for tool in offered or ()] if knows else None
        clash = {"messages", "tools", "add_generation_prompt"} & set(options or ())
        if clash:
            raise bad_request(f"chat_template_kwargs has {min(clash)}", "chat_template_kwargs")
        text = await self._renderer.render(
            {
                "messages": plain,
                "tools": given or None,
                "add_generation_prompt": add_generation_prompt,
                **(options or {}),
            }
        )
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=False)

    def close(self) -> None:
        """Ends the workers."""
        self._renderer.close()
        self._checker.close()


class ChatAnswer:
    """The answer to one request; use :meth:`begin`.

    Attributes:
        stream: what the engine gives.
    """

    def __init__(
        self, service: Service, llm: LLM, body: ChatBody, requests: list[Request], *, calls: bool
    ) -> None:
        self._body = body
        self._calls = calls
        self._show = token_text(llm.tokenizer)
        self._tokenizer = llm.tokenizer
        self._frame = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.model or service.model,
        }
        self.stream = submit(service, llm, body, requests)

    @classmethod
    async def begin(cls, service: Service, templates: Templates | None, body: ChatBody) -> ChatAnswer:
        """Checks everything and hands it to the engine.

        Raises:
            ApiError: nothing runs then.
        """
        llm = service.llm
        body.check()
        n = body.n or 1
        service.admit(n)
        if templates is None:
            raise bad_request("the model has no tokenizer: use /v1/completions with token ids", "messages")
        offered = body.tools if body.tool_choice != "none" else None
        ids = await templates.prompt(body.messages, offered, options=body.chat_template_kwargs)
        grammars = await _grammars(templates.grammars, body, n)
        params = {"logprobs": body.top_logprobs or 0} if body.logprobs else {}
        requests = make_requests(llm, body, ids, body.limit, None, grammars, **params)
        return cls(service, llm, body, requests, calls=bool(offered))

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for index, delta in enumerate(await gather(self.stream)):
            pieces = self._pieces(tools.ToolParser() if self._calls else None, delta)
            calls = _calls(pieces)
            content = "".join(piece.text for piece in pieces if piece.call is None)
            message = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
            if calls:
                message["tool_calls"] = calls  # type: ignore[assignment]
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(delta),
                    "finish_reason": _reason(delta, bool(calls)),
                }
            )
        return {**self._frame, "choices": choices, "usage": usage(self.stream, len(choices))}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in chunks; the usage comes last, where asked for."""
        count = len(self.stream.generations)
        frame = self._frame | {"object": "chat.completion.chunk"}
        empty = {"usage": None} if self._body.include_usage else {}
        parsers = [tools.ToolParser() if self._calls else None for _ in range(count)]
        begun: set[int] = set()

        def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: Any = None) -> Any:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return {**frame, "choices": [choice], **empty}

        async for index, delta in self.stream.deltas():
            parser = parsers[index]
            if index not in begun:
                begun.add(index)
                yield chunk(index, {"role": "assistant", "content": ""})
            logprobs = self._logprobs(delta)
            for piece in self._pieces(parser, delta):
                yield chunk(index, _piece(piece), logprobs)
                logprobs = None  # once a delta, with its first piece
            if logprobs or delta.finish_reason is not None:
                reason = delta.finish_reason and _reason(delta, bool(parser and parser.calls))
                yield chunk(index, {}, logprobs, reason)
        if self._body.include_usage:
            yield {**frame, "choices": [], "usage": usage(self.stream, count)}

    def _pieces(self, parser: tools.ToolParser | None, delta: Delta) -> list[tools.Piece]:
        if parser is None:
            return [tools.Piece(delta.text)] if delta.text else []
        pieces = parser.push(delta.text)
        return pieces + parser.flush() if delta.finish_reason is not None else pieces

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self._body.logprobs or not delta.token_ids:
            return None
        return {"content": [self._entry(entry) for entry in delta.logprobs], "refusal": None}

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(token, value) for token, value in entry.top.items()]
        return {**self._token(entry.token_id, entry.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token) if self._tokenizer else b""
        return {"token": self._show(token), "logprob": logprob, "bytes": list(data)}


async def _grammars(compiler: GrammarCompiler, body: ChatBody, count: int) -> list[TokenGrammar]:
    lark = tools.grammar(body)
    form = body.response_format
    if lark is not None:
        if form is not None and form.type != "text":
            raise bad_request("response_format and tools cannot both shape the answer", "response_format")
        return await compiler.lark(lark, "tools", count)
    if form is None or form.type == "text":
        return []
    schema: Any = {"type": "object"} if form.json_schema is None else form.json_schema.schema_
    if schema is True:
        schema = {}  # the same to JSON Schema, and llguidance takes its options in an object
    return await compiler.schema(schema, "response_format", count)


def _calls(pieces: Sequence[tools.Piece]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if piece.call is None:
            continue
        if piece.name is not None:
            function = {"name": piece.name, "arguments": ""}
            calls.append({"id": tools.call_id(), "type": "function", "function": function})
        calls[piece.call]["function"]["arguments"] += piece.text
    return calls


def _piece(piece: tools.Piece) -> dict[str, Any]:
    if piece.call is None:
        return {"content": piece.text}
    call: dict[str, Any] = {"index": piece.call, "function": {"arguments": piece.text}}
    if piece.name is not None:
        call |= {"id": tools.call_id(), "type": "function"}
        call["function"]["name"] = piece.name
    return {"tool_calls": [call]}


def _reason(delta: Delta, called: bool) -> str | None:
    return "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason
