"""``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from tpjax.engine.generation import Delta
from tpjax.server import tools
from tpjax.server.answer_grammar import Wanted, answer_grammar
from tpjax.server.answers import gather, make_requests, submit, token_text, usage
from tpjax.server.conversation import conversation
from tpjax.server.dialect import AnswerReader, Dialect
from tpjax.server.errors import bad_request
from tpjax.server.grammar import GrammarCompiler, TokenGrammar
from tpjax.server.protocol import ChatBody, Message, Tool
from tpjax.server.reader import Piece
from tpjax.server.sandbox import Sandbox
from tpjax.server.service import Service

if TYPE_CHECKING:
    from tpjax.engine.request import Request, TokenLogprobs
    from tpjax.llm import LLM
    from tpjax.tokenizer import Tokenizer


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
        self._dialects: dict[str, Dialect] = {}

    async def dialect(self, offered: Sequence[Tool] | None) -> Dialect:
        """How the model converses, with these tools; found out once for each template.

        Raises:
            ApiError: the server is too busy to find out, or the template too slow.
        """
        name = self._templates.chosen(offered)
        found = self._dialects.get(name)
        if found is None:
            source, render = self._templates.sources.get(name, ""), self._renderer.render
            with_tools = bool(offered) and name != self._templates.chosen(None)
            found = await Dialect.of(source, self._tokenizer, render, with_tools=with_tools)
            self._dialects[name] = found
        return found

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
        dialect = await self.dialect(offered)
        plain = conversation(messages, offered, dialect.traits, dialect.calls)
        told = offered if offered and dialect.traits.tools else ()
        given = [tool.model_dump(exclude_none=True) for tool in told]
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
        self, service: Service, llm: LLM, body: ChatBody, requests: list[Request], dialect: Dialect
    ) -> None:
        offered = _offered(body)
        schemas = (
            None if not offered else {one.function.name: one.function.parameters or {} for one in offered}
        )
        inside = dialect.inside(llm.tokenizer, requests[0].prompt_ids) if llm.tokenizer else False
        self._body = body
        self._dialect = dialect
        self._reader = lambda: dialect.reader(schemas, inside=inside)
        self._show = token_text(llm.tokenizer)
        self._tokenizer = llm.tokenizer
        self._frame = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.model or service.model,
        }
        self.stream = submit(service, llm, body, requests, dialect.shown_ids(with_calls=bool(offered)))

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
        offered = _offered(body)
        dialect = await templates.dialect(offered)
        ids = await templates.prompt(body.messages, offered, options=_options(body))
        assert llm.tokenizer is not None
        grammars = await _grammars(templates.grammars, body, dialect, dialect.inside(llm.tokenizer, ids))
        params = {"logprobs": body.top_logprobs or 0} if body.logprobs else {}
        requests = make_requests(llm, body, ids, body.limit, None, grammars, **params)
        for request in requests if not body.ignore_eos else ():
            request.stop_ids += tuple(one for one in dialect.stop_ids if one not in request.stop_ids)
        return cls(service, llm, body, requests, dialect)

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for index, delta in enumerate(await gather(self.stream)):
            pieces = self._pieces(self._reader(), delta)
            calls = tools.whole_calls(pieces)
            content = "".join(piece.text for piece in pieces if piece.call is None and not piece.reasoning)
            message: dict[str, Any] = {"role": "assistant", "content": content or None if calls else content}
            message["refusal"] = None
            if self._dialect.reasons:
                reasoning = "".join(piece.text for piece in pieces if piece.reasoning) or None
                message |= {"reasoning": reasoning, "reasoning_content": reasoning}
            if calls:
                message["tool_calls"] = calls
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
        readers = [self._reader() for _ in range(count)]
        begun: set[int] = set()

        def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: Any = None) -> Any:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return {**frame, "choices": [choice], **empty}

        async for index, delta in self.stream.deltas():
            reader = readers[index]
            if index not in begun:
                begun.add(index)
                yield chunk(index, {"role": "assistant", "content": ""})
            logprobs = self._logprobs(delta)
            for piece in self._pieces(reader, delta):
                yield chunk(index, tools.delta(piece), logprobs)
                logprobs = None  # once a delta, with its first piece
            if logprobs or delta.finish_reason is not None:
                reason = delta.finish_reason and _reason(delta, bool(reader and reader.called))
                yield chunk(index, {}, logprobs, reason)
        if self._body.include_usage:
            yield {**frame, "choices": [], "usage": usage(self.stream, count)}

    def _pieces(self, reader: AnswerReader | None, delta: Delta) -> list[Piece]:
        if reader is None:
            return [Piece(delta.text)] if delta.text else []
        pieces = reader.push(delta.text)
        return pieces + reader.flush() if delta.finish_reason is not None else pieces

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


def _offered(body: ChatBody) -> list[Tool] | None:
    return body.tools if body.tool_choice != "none" else None


def _options(body: ChatBody) -> dict[str, Any]:
    """What the template is told besides the conversation; what the client says to it itself goes first."""
    options: dict[str, Any] = {}
    if (effort := body.reasoning_effort) is not None:
        options["reasoning_effort"] = {"none": "low", "minimal": "low", "xhigh": "high"}.get(effort, effort)
        if effort == "none":
            options |= {"enable_thinking": False, "thinking": False}
    return options | (body.chat_template_kwargs or {})


async def _grammars(
    compiler: GrammarCompiler, body: ChatBody, dialect: Dialect, inside: bool
) -> list[TokenGrammar]:
    wanted = Wanted.of(body)
    write = answer_grammar(wanted, dialect.calls, dialect.reasoning, inside, dialect.special)
    if write is None:
        return []
    param = "tools" if wanted.tools else "response_format"
    return await compiler.compile(write, wanted.schemas, param, body.n or 1)


def _reason(delta: Delta, called: bool) -> str | None:
    return "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason
