"""``/v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tpjax.chat_template import RENDER, WHAT
from tpjax.engine.generation import Delta
from tpjax.server import budget, legacy, structured, tools
from tpjax.server.answers import (
    RunningUsage,
    gather,
    make_requests,
    prompt_logprobs,
    submit,
    token_text,
    usage,
)
from tpjax.server.errors import bad_request
from tpjax.server.grammar import GrammarCompiler, TokenGrammar
from tpjax.server.grammar_check import GrammarChecker
from tpjax.server.protocol import ChatBody, Message, TokenizeBody, Tool
from tpjax.server.sandbox import PatientPool
from tpjax.server.service import Service
from tpjax.server.texts import Texts

if TYPE_CHECKING:
    from tpjax.engine.request import Request, TokenLogprobs
    from tpjax.llm import LLM
    from tpjax.tokenizer import Tokenizer


# Templates take a millisecond, and a tenth of a second over megabytes.
QUICK_RENDERERS, SLOW_RENDERERS, QUICK_LIMIT_S = 2, 2, 0.5

# Parameters of a rendering that have a place of their own in a body.
_RENDERING = {"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"}


class Templates:
    """Renders conversations and compiles grammars, each in workers of its own.

    Args:
        tokenizer: of the model.
        vocab_size: of the model.
        texts: encodes what was rendered.

    Attributes:
        texts: as given.
        workers: where conversations are rendered.
        grammars: of the model.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, texts: Texts) -> None:
        self._templates = tokenizer.chat_templates
        self.texts = texts
        self.workers = PatientPool(QUICK_RENDERERS, SLOW_RENDERERS, WHAT, QUICK_LIMIT_S)
        self.grammars = GrammarCompiler(tokenizer, vocab_size, GrammarChecker())

    async def prompt(
        self,
        messages: Sequence[Message],
        offered: Sequence[Tool] | None = None,
        *,
        asked: ChatBody | TokenizeBody,
    ) -> list[int]:
        """The tokens of a conversation.

        Args:
            messages: oldest first.
            offered: tools.
            asked: what else the body says of the rendering.

        Raises:
            ApiError: 400; the messages or their rendering are not fit.
        """
        if not messages:
            raise bad_request("messages is empty: at least 1 message is needed", "messages")
        source = asked.chat_template
        if source is None:
            source = self._templates.sources.get(self._templates.chosen(offered), "")
        knows = "tools" in source
        plain = tools.conversation(messages, offered, knows)
        given = [tool.model_dump(exclude_none=True) for tool in offered or ()] if knows else None
        conversation = {"messages": plain, "tools": given or None, **_rendering(asked)}
        text = await self.workers.run(RENDER, self._templates.job(conversation), "messages")
        whole = not isinstance(asked, ChatBody) or asked.truncate_prompt_tokens is not None
        special = bool(asked.add_special_tokens)
        return await self.texts.encode(text, "messages", add_special_tokens=special, whole=whole)

    def close(self) -> None:
        """Ends the workers."""
        self.workers.close()
        self.grammars.close()


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
        self._show = token_text(llm.tokenizer, body.return_tokens_as_token_ids)
        self._tokenizer = llm.tokenizer
        self._frame = {
            "id": f"chatcmpl-{body.request_id or uuid.uuid4().hex}",
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
        body = legacy.modern(body)
        body.check()
        n = body.n or 1
        if templates is None:
            raise bad_request("the model has no tokenizer: use /v1/completions with token ids", "messages")
        offered = body.tools if body.tool_choice != "none" else None
        params = {"logprobs": body.top_logprobs or 0} if body.logprobs else {}
        with service.preparing(n):
            ids = await templates.prompt(body.messages, offered, asked=body)
            grammars = await _grammars(templates.grammars, body, n)
            make = partial(make_requests, llm, body, ids, body.limit, None, grammars, **params)
            requests = await templates.texts.threads.run(make)
        budget.prepared()
        return cls(service, llm, body, requests, calls=bool(offered))

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for index, delta in enumerate(await gather(self.stream)):
            pieces = self._pieces(tools.ToolParser() if self._calls else None, delta)
            calls = _calls(pieces)
            content = self._echo() + "".join(piece.text for piece in pieces if piece.call is None)
            message = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
            if calls:
                message["tool_calls"] = calls  # type: ignore[assignment]
            choices.append(
                {
                    "index": index,
                    "message": self._worded(message),
                    "logprobs": self._logprobs(delta),
                    "finish_reason": self._reason(delta, bool(calls)),
                    **self._tokens(delta),
                }
            )
        request = self.stream.generations[0].request
        extra = self._prompt_tokens()
        if self._body.prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs(request, self._body.prompt_logprobs, self._show)
        return {**self._frame, "choices": choices, "usage": usage(self.stream, len(choices)), **extra}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in chunks; the usage comes last, where asked for."""
        count = len(self.stream.generations)
        frame = self._frame | {"object": "chat.completion.chunk"}
        running = RunningUsage(self.stream, self._body)
        used: dict[str, Any] = {}
        parsers = [tools.ToolParser() if self._calls else None for _ in range(count)]
        begun: set[int] = set()

        def chunk(index: int, delta: dict[str, Any], of: dict[str, Any], reason: Any = None) -> Any:
            choice = {"index": index, "delta": self._worded(delta), "finish_reason": reason}
            return {**frame, "choices": [choice | {"logprobs": None} | of], **used}

        async for index, delta in self.stream.deltas():
            parser = parsers[index]
            used = running.grew(index, delta)
            if index not in begun:
                begun.add(index)
                yield chunk(index, {"role": "assistant", "content": self._echo()}, {}) | self._prompt_tokens()
            logprobs = self._logprobs(delta)
            of = ({"logprobs": logprobs} if logprobs else {}) | self._tokens(delta)
            for piece in self._pieces(parser, delta):
                yield chunk(index, _piece(piece), of)
                of = {}  # once a delta, with its first piece
            if of or delta.finish_reason is not None:
                reason = delta.finish_reason and self._reason(delta, bool(parser and parser.calls))
                yield chunk(index, {}, of, reason)
        if self._body.include_usage:
            yield {**frame, "choices": [], "usage": usage(self.stream, count)}

    def _pieces(self, parser: tools.ToolParser | None, delta: Delta) -> list[tools.Piece]:
        if parser is None:
            return [tools.Piece(delta.text)] if delta.text else []
        pieces = parser.push(delta.text)
        return pieces + parser.flush() if delta.finish_reason is not None else pieces

    def _tokens(self, delta: Delta) -> dict[str, Any]:
        return {"token_ids": delta.token_ids} if self._body.return_token_ids else {}

    def _prompt_tokens(self) -> dict[str, Any]:
        ids = self.stream.generations[0].request.prompt_ids
        return {"prompt_token_ids": list(ids)} if self._body.return_token_ids else {}

    def _echo(self) -> str:
        """What the last message said, where the answer goes on from there and is to tell."""
        last = self._body.messages[-1]
        if not self._body.echo or last.role != "assistant":
            return ""
        return str(tools.conversation([last], None, template_knows_tools=True)[0]["content"])

    def _worded(self, message: dict[str, Any]) -> dict[str, Any]:
        return legacy.message(message) if self._body.functions is not None else message

    def _reason(self, delta: Delta, called: bool) -> str | None:
        reason = "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason
        return legacy.reason(reason) if self._body.functions is not None else reason

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
        if body.structure is not None:
            raise bad_request("structured_outputs and tools cannot both shape the answer", "tools")
        return await compiler.lark(lark, "tools", count)
    return await structured.grammars(compiler, body, count)


def _rendering(asked: ChatBody | TokenizeBody) -> dict[str, Any]:
    """What the template gets besides messages and tools."""
    options = asked.chat_template_kwargs or {}
    if clash := _RENDERING & set(options):
        raise bad_request(f"chat_template_kwargs has {min(clash)}", "chat_template_kwargs")
    goes_on = bool(asked.continue_final_message)
    if goes_on and asked.add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt cannot both be true", "continue_final_message"
        )
    more: dict[str, Any] = {"chat_template": asked.chat_template} if asked.chat_template is not None else {}
    if isinstance(asked, ChatBody) and asked.documents is not None:
        more["documents"] = asked.documents
    return {
        "add_generation_prompt": asked.add_generation_prompt is not False and not goes_on,
        "continue_final_message": goes_on,
        **more,
        **options,
    }


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
