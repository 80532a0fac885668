"""``/v1/chat/completions``."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tpjax.engine.generation import Delta
from tpjax.server import admission_budget, legacy_functions
from tpjax.server.chat_format import ChatFormat, ResponseParser
from tpjax.server.conversation import conversation, message_text
from tpjax.server.error_responses import ApiError, bad_request
from tpjax.server.grammars import structured_outputs
from tpjax.server.grammars.checker import GrammarChecker
from tpjax.server.grammars.compiler import GrammarCompiler, TokenGrammar
from tpjax.server.grammars.response_grammar import ResponseConstraints, response_grammar
from tpjax.server.parsing import tool_call_messages
from tpjax.server.parsing.incremental import ParsedDelta
from tpjax.server.prompt_encoder import PromptEncoder
from tpjax.server.protocol import ChatBody, Message, TokenizeBody, Tool
from tpjax.server.responses import (
    RunningUsage,
    gather,
    make_requests,
    prompt_logprobs,
    submit,
    token_text,
    usage,
)
from tpjax.server.service import Service
from tpjax.server.worker_pools import TieredWorkerPool
from tpjax.text.chat_template import RENDER, WHAT

if TYPE_CHECKING:
    from tpjax.engine.request import Request, TokenLogprobs
    from tpjax.llm import LLM
    from tpjax.text.tokenizer import Tokenizer


log = logging.getLogger(__name__)

_MOST_DIALECTS = 64  # kept; requests may bring templates of their own
# Templates take a millisecond, and a tenth of a second over megabytes.
QUICK_RENDERERS, SLOW_RENDERERS, QUICK_LIMIT_S = 2, 2, 0.5

# Parameters of a rendering that have a place of their own in a body.
_RENDERING = {"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"}


class ChatPrompts:
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

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, texts: PromptEncoder) -> None:
        self._templates = tokenizer.chat_templates
        self.texts = texts
        self.workers = TieredWorkerPool(QUICK_RENDERERS, SLOW_RENDERERS, WHAT, QUICK_LIMIT_S)
        self.grammars = GrammarCompiler(tokenizer, vocab_size, GrammarChecker())
        self._tokenizer = tokenizer
        self._dialects: dict[tuple[str, bool], ChatFormat] = {}

    async def dialect(self, offered: Sequence[Tool] | None, own: str | None = None) -> ChatFormat:
        """How the model converses with these tools; found out once for each template.

        Args:
            offered: tools.
            own: the request's own template.

        Raises:
            ApiError: the server is too busy to find out, or the template too slow.
        """
        name = self._templates.chosen(offered)
        with_tools = own is None and bool(offered) and name != self._templates.chosen(None)
        source = self._templates.sources.get(name, "") if own is None else own
        found = self._dialects.get((source, with_tools))
        if found is None:
            more = {} if own is None else {"chat_template": own}

            async def render(conversation: dict[str, Any]) -> str:
                job = self._templates.job({**conversation, **more})
                text: str = await self.workers.run(RENDER, job, "messages")
                return text

            found = await ChatFormat.of(source, self._tokenizer, render, with_tools=with_tools)
            if len(self._dialects) < _MOST_DIALECTS:
                self._dialects[source, with_tools] = found
        return found

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
        dialect = await self.dialect(offered, asked.chat_template)
        plain = conversation(messages, offered, dialect.traits, dialect.calls)
        if asked.continue_final_message:
            plain[-1] = {**plain[-1], "content": message_text(messages[-1])}
        told = offered if offered and dialect.traits.tools else ()
        given = [tool.model_dump(exclude_none=True) for tool in told]
        rendering = {"messages": plain, "tools": given or None, **_rendering(asked)}
        text = await self.workers.run(RENDER, self._templates.job(rendering), "messages")
        whole = not isinstance(asked, ChatBody) or asked.truncate_prompt_tokens is not None
        special = bool(asked.add_special_tokens)
        return await self.texts.encode(text, "messages", add_special_tokens=special, whole=whole)

    def close(self) -> None:
        """Ends the workers."""
        self.workers.close()
        self.grammars.close()


class ChatResponse:
    """The answer to one request; use :meth:`begin`.

    Attributes:
        stream: what the engine gives.
    """

    def __init__(
        self, service: Service, llm: LLM, body: ChatBody, requests: list[Request], dialect: ChatFormat
    ) -> None:
        offered = _offered(body)
        schemas = (
            None if not offered else {one.function.name: one.function.parameters or {} for one in offered}
        )
        # structured_outputs shape the answer from its first token on: there is no reasoning before it
        inside = body.structure is None and dialect.inside(llm.tokenizer, requests[0].prompt_token_ids)
        self._body = body
        self._dialect = dialect
        self._schemas, self._inside = schemas, inside
        self._show = token_text(llm.tokenizer, body.return_tokens_as_token_ids)
        self._tokenizer = llm.tokenizer
        self._frame = {
            "id": f"chatcmpl-{body.request_id or uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.model or service.model,
        }
        self.stream = submit(service, llm, body, requests, dialect.shown_ids(with_calls=bool(offered)))

    @classmethod
    async def begin(cls, service: Service, templates: ChatPrompts | None, body: ChatBody) -> ChatResponse:
        """Checks everything and hands it to the engine.

        Raises:
            ApiError: nothing runs then.
        """
        llm = service.llm
        body = legacy_functions.modern(body)
        body.check()
        n = body.n or 1
        if templates is None:
            raise bad_request("the model has no tokenizer: use /v1/completions with token ids", "messages")
        offered = _offered(body)
        params = {"logprobs": body.top_logprobs or 0} if body.logprobs else {}
        with service.preparing(n):
            dialect = await templates.dialect(offered, body.chat_template)
            ids = await templates.prompt(body.messages, offered, asked=body)
            grammars = await _grammars(templates.grammars, body, dialect, dialect.inside(llm.tokenizer, ids))
            for grammar in grammars:
                grammar.add_stop_ids(dialect.stop_ids)
            make = partial(make_requests, llm, body, ids, body.limit, None, grammars, **params)
            requests = await templates.texts.threads.run(make)
        admission_budget.prepared()
        for request in requests if not body.ignore_eos else ():
            request.stop_ids += tuple(one for one in dialect.stop_ids if one not in request.stop_ids)
        return cls(service, llm, body, requests, dialect)

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for index, delta in enumerate(await gather(self.stream)):
            pieces = self._pieces(self._reader(), delta)
            calls = tool_call_messages.whole_calls(pieces)
            texts = (piece.text for piece in pieces if piece.call is None and not piece.reasoning)
            content = self._echo() + "".join(texts)
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
        readers = [self._reader() for _ in range(count)]
        begun: set[int] = set()

        def chunk(index: int, delta: dict[str, Any], of: dict[str, Any], reason: Any = None) -> Any:
            choice = {"index": index, "delta": self._worded(delta), "finish_reason": reason}
            return {**frame, "choices": [choice | {"logprobs": None} | of], **used}

        async for index, delta in self.stream.deltas():
            reader = readers[index]
            used = running.grew(index, delta)
            if index not in begun:
                begun.add(index)
                yield chunk(index, {"role": "assistant", "content": self._echo()}, {}) | self._prompt_tokens()
            logprobs = self._logprobs(delta)
            of = ({"logprobs": logprobs} if logprobs else {}) | self._tokens(delta)
            for piece in self._pieces(reader, delta):
                yield chunk(index, tool_call_messages.delta(piece), of)
                of = {}  # once a delta, with its first piece
            if of or delta.finish_reason is not None:
                reason = delta.finish_reason and self._reason(delta, bool(reader and reader.called))
                yield chunk(index, {}, of, reason)
        if self._body.include_usage:
            yield {**frame, "choices": [], "usage": usage(self.stream, count)}

    def _reader(self) -> ResponseParser | None:
        return self._dialect.reader(self._schemas, inside=self._inside)

    def _pieces(self, reader: ResponseParser | None, delta: Delta) -> list[ParsedDelta]:
        if reader is None:
            return [ParsedDelta(delta.text)] if delta.text else []
        pieces = reader.push(delta.text)
        pieces += reader.flush() if delta.finish_reason is not None else []
        shown = self._body.include_reasoning is not False
        return [piece for piece in pieces if shown or not piece.reasoning]

    def _tokens(self, delta: Delta) -> dict[str, Any]:
        return {"token_ids": delta.token_ids} if self._body.return_token_ids else {}

    def _prompt_tokens(self) -> dict[str, Any]:
        ids = self.stream.generations[0].request.prompt_token_ids
        return {"prompt_token_ids": list(ids)} if self._body.return_token_ids else {}

    def _echo(self) -> str:
        """What the last message said, where the answer goes on from there and is to tell."""
        last = self._body.messages[-1]
        if not self._body.echo or last.role != "assistant":
            return ""
        return message_text(last)

    def _worded(self, message: dict[str, Any]) -> dict[str, Any]:
        return legacy_functions.message(message) if self._body.functions is not None else message

    def _reason(self, delta: Delta, called: bool) -> str | None:
        reason = "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason
        return legacy_functions.reason(reason) if self._body.functions is not None else reason

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


async def _grammars(
    compiler: GrammarCompiler, body: ChatBody, dialect: ChatFormat, inside: bool
) -> list[TokenGrammar]:
    wanted = ResponseConstraints.of(body)
    if body.structure is not None:
        if wanted.tools:
            raise bad_request("structured_outputs and tools cannot both shape the answer", "tools")
        return await structured_outputs.grammars(compiler, body, body.n or 1)
    write = response_grammar(wanted, dialect.calls, dialect.reasoning, inside, dialect.special)
    if write is None:
        return []
    param = "tools" if wanted.tools else "response_format"
    try:
        return await compiler.compile(write, wanted.schemas, param, body.n or 1)
    except ApiError as error:
        if error.status != 400 or not wanted.advice:
            raise
        log.warning("tools are offered without a grammar: %s", error.message)
        return []


def _effort(asked: str) -> dict[str, Any]:
    """How hard to think, in the words of templates: gpt-oss's knows three, others whether at all."""
    effort = {"none": "low", "minimal": "low", "xhigh": "high"}.get(asked, asked)
    thinking = {"enable_thinking": False, "thinking": False} if asked == "none" else {}
    return {"reasoning_effort": effort, **thinking}


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
    if isinstance(asked, ChatBody) and asked.reasoning_effort is not None:
        more |= _effort(asked.reasoning_effort)
    return {
        "add_generation_prompt": asked.add_generation_prompt is not False and not goes_on,
        "continue_final_message": goes_on,
        **more,
        **options,
    }
