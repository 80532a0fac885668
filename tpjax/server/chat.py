"""``/v1/chat/completions``: from a checked request to its response, with reasoning and tool calls parsed."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator
from functools import cache, partial
from typing import TYPE_CHECKING

from tpjax.engine.generation import Delta
from tpjax.server import admission_budget, legacy_functions
from tpjax.server.chat_format import ChatFormat, ResponseParser
from tpjax.server.chat_prompts import ChatPrompts
from tpjax.server.conversation import message_text
from tpjax.server.error_responses import ApiError, bad_request
from tpjax.server.grammars import structured_outputs
from tpjax.server.grammars.compiler import GrammarCompiler, TokenGrammar
from tpjax.server.grammars.response_grammar import ResponseConstraints, response_grammar
from tpjax.server.json_types import JsonObject
from tpjax.server.parsing import tool_call_messages
from tpjax.server.parsing.incremental import ParsedDelta
from tpjax.server.protocol import ChatBody, Tool
from tpjax.server.responses import (
    RunningUsage,
    built,
    check_prompt_logprobs,
    checked_params,
    event,
    gather,
    json_of,
    make_requests,
    prompt_logprobs,
    submit,
    token_text,
    usage,
)
from tpjax.server.service import Service

if TYPE_CHECKING:
    from tpjax.engine.request import Request, TokenLogprobs
    from tpjax.llm import LLM

log = logging.getLogger(__name__)


class ChatResponse:
    """The response to one request; create it with :meth:`begin`.

    Attributes:
        stream: deltas of the generations.
    """

    def __init__(
        self, service: Service, llm: LLM, body: ChatBody, requests: list[Request], form: ChatFormat
    ) -> None:
        tools = _offered(body)
        self._schemas = (
            None if not tools else {one.function.name: one.function.parameters or {} for one in tools}
        )
        # structured_outputs constrain the response from its first token: there is no reasoning before it
        self._inside = body.structure is None and form.inside_reasoning(
            llm.tokenizer, requests[0].prompt_token_ids
        )
        self._body = body
        self._format = form
        self._show = token_text(llm.tokenizer, body.return_tokens_as_token_ids)
        self._tokenizer = llm.tokenizer
        self._frame = {
            "id": f"chatcmpl-{body.request_id or uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.model or service.model,
        }
        self.stream = submit(service, llm, body, requests, form.shown_ids(with_calls=bool(tools)))

    @classmethod
    async def begin(cls, service: Service, prompts: ChatPrompts | None, body: ChatBody) -> ChatResponse:
        """Checks a request and submits it to the engine.

        Raises:
            ApiError: the request is invalid, or the queue is full; nothing runs then.
        """
        llm = service.llm
        body = legacy_functions.modern(body)
        body.check()
        n = body.n or 1
        if prompts is None:
            raise bad_request("the model has no tokenizer: use /v1/completions with token ids", "messages")
        tools = _offered(body)
        params = {"logprobs": body.top_logprobs or 0} if body.logprobs else {}
        with service.preparing(n):
            form = await prompts.chat_format(tools, body.chat_template)
            ids = await prompts.encode(body.messages, tools, body)
            inside = form.inside_reasoning(llm.tokenizer, ids)
            grammars = await _grammars(prompts.grammars, body, form, inside)
            for grammar in grammars:
                grammar.add_stop_ids(form.stop_ids)
            threads = prompts.encoder.threads
            checked = await threads.run(partial(checked_params, llm, body, body.limit, **params))
            requests = await threads.run(make_requests, llm, body, checked, ids, body.limit, None, grammars)
        admission_budget.prepared()
        if body.prompt_logprobs is not None:
            check_prompt_logprobs(len(ids), body.prompt_logprobs, 1, "prompt_logprobs")
        for request in requests if not body.ignore_eos else ():
            request.stop_ids += tuple(one for one in form.stop_ids if one not in request.stop_ids)
        return cls(service, llm, body, requests, form)

    async def complete(self) -> bytes:
        """Waits for all choices; returns the whole response as JSON."""
        deltas, body = await gather(self.stream), self._body
        each = 1 + (body.top_logprobs or 0 if body.logprobs else 0)
        size = sum(len(delta.token_ids) for delta in deltas) * each
        if body.prompt_logprobs is not None:
            request = self.stream.generations[0].request
            size += len(request.prompt_token_ids) * (1 + body.prompt_logprobs)
        return await built(size, lambda: json_of(self._whole(deltas)))

    async def events(self) -> AsyncIterator[bytes]:
        """Yields the response in chunks, as server-sent events; the usage comes last, if asked for."""
        async for chunk in self._chunks():
            yield event(chunk)

    def _whole(self, deltas: list[Delta]) -> JsonObject:
        choices = []
        for index, delta in enumerate(deltas):
            parts = self._parsed(self._parser(), delta)
            calls = tool_call_messages.tool_calls(parts)
            texts = (part.text for part in parts if part.call is None and not part.reasoning)
            content = self._echo() + "".join(texts)
            message: JsonObject = {"role": "assistant", "content": content or None if calls else content}
            message["refusal"] = None
            if self._format.reasons:
                reasoning = "".join(part.text for part in parts if part.reasoning) or None
                message |= {"reasoning": reasoning, "reasoning_content": reasoning}
            if calls:
                message["tool_calls"] = calls
            choices.append(
                {
                    "index": index,
                    "message": self._message(message),
                    "logprobs": self._logprobs(delta),
                    "finish_reason": self._finish_reason(delta, bool(calls)),
                    **self._tokens(delta),
                }
            )
        request = self.stream.generations[0].request
        extra = self._prompt_tokens()
        if self._body.prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs(request, self._body.prompt_logprobs, self._show)
        return {**self._frame, "choices": choices, "usage": usage(self.stream, len(choices)), **extra}

    async def _chunks(self) -> AsyncIterator[JsonObject]:
        count = len(self.stream.generations)
        frame = self._frame | {"object": "chat.completion.chunk"}
        running = RunningUsage(self.stream, self._body)
        used: JsonObject = {}
        parsers = [self._parser() for _ in range(count)]
        begun: set[int] = set()

        def chunk(index: int, delta: JsonObject, extra: JsonObject, reason: str | None = None) -> JsonObject:
            choice = {"index": index, "delta": self._message(delta), "finish_reason": reason}
            return {**frame, "choices": [choice | {"logprobs": None} | extra], **used}

        async for index, delta in self.stream.deltas():
            parser = parsers[index]
            used = running.add(index, delta)
            if index not in begun:
                begun.add(index)
                yield chunk(index, {"role": "assistant", "content": self._echo()}, {}) | self._prompt_tokens()
            logprobs = self._logprobs(delta)
            extra = ({"logprobs": logprobs} if logprobs else {}) | self._tokens(delta)
            for part in self._parsed(parser, delta):
                yield chunk(index, tool_call_messages.delta(part), extra)
                extra = {}  # once per delta, with its first part
            if extra or delta.finish_reason is not None:
                reason = delta.finish_reason and self._finish_reason(delta, bool(parser and parser.called))
                yield chunk(index, {}, extra, reason)
        if self._body.include_usage:
            yield {**frame, "choices": [], "usage": usage(self.stream, count)}

    def _parser(self) -> ResponseParser | None:
        return self._format.parser(self._schemas, inside=self._inside)

    def _parsed(self, parser: ResponseParser | None, delta: Delta) -> list[ParsedDelta]:
        if parser is None:
            return [ParsedDelta(delta.text)] if delta.text else []
        parts = parser.push(delta.text)
        parts += parser.flush() if delta.finish_reason is not None else []
        if self._body.include_reasoning is False:
            parts = [part for part in parts if not part.reasoning]
        if self._body.parallel_tool_calls is False:  # not every format has a grammar that allows one alone
            parts = [part for part in parts if not part.call]
        return parts

    def _tokens(self, delta: Delta) -> JsonObject:
        return {"token_ids": delta.token_ids} if self._body.return_token_ids else {}

    def _prompt_tokens(self) -> JsonObject:
        ids = self.stream.generations[0].request.prompt_token_ids
        return {"prompt_token_ids": list(ids)} if self._body.return_token_ids else {}

    def _echo(self) -> str:
        """Returns the text of the last message if the response continues it and ``echo`` is set."""
        last = self._body.messages[-1]
        if not self._body.echo or last.role != "assistant":
            return ""
        return message_text(last)

    def _message(self, message: JsonObject) -> JsonObject:
        return legacy_functions.message(message) if self._body.functions is not None else message

    def _finish_reason(self, delta: Delta, called: bool) -> str | None:
        reason = "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason
        return legacy_functions.finish_reason(reason) if self._body.functions is not None else reason

    def _logprobs(self, delta: Delta) -> JsonObject | None:
        if not self._body.logprobs or not delta.token_ids:
            return None
        return {"content": [self._entry(entry) for entry in delta.logprobs], "refusal": None}

    def _entry(self, entry: TokenLogprobs) -> JsonObject:
        top = [self._token(token, value) for token, value in entry.top.items()]
        return {**self._token(entry.token_id, entry.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> JsonObject:
        data = self._tokenizer.token_bytes(token) if self._tokenizer else b""
        return {"token": self._show(token), "logprob": logprob, "bytes": list(data)}


def _offered(body: ChatBody) -> list[Tool] | None:
    return body.tools if body.tool_choice != "none" else None


async def _grammars(
    compiler: GrammarCompiler, body: ChatBody, form: ChatFormat, inside: bool
) -> list[TokenGrammar]:
    constraints = ResponseConstraints.of(body)
    if body.structure is not None:
        if constraints.tools:
            raise bad_request("structured_outputs and tools cannot both constrain the response", "tools")
        return await structured_outputs.grammars(compiler, body, body.n or 1)
    if constraints.strict_tools and not constraints.call_required and form.tool_calls.own_syntax:
        _warn_not_enforced(form.tool_calls.name)
    write = response_grammar(constraints, form.tool_calls, form.reasoning, inside, form.special)
    if write is None:
        return []
    param = "tools" if constraints.tools else "response_format"
    try:
        return await compiler.compile(write, constraints.schemas, param, body.n or 1)
    except ApiError as error:
        if error.status != 400 or not constraints.optional:
            raise
        log.warning("tools are offered without a grammar: %s", error.message)
        return []


@cache
def _warn_not_enforced(name: str) -> None:
    """Warns, once per tool-call format, that it has no grammar unless a call is required."""
    log.warning(
        "tool-call format %s: strict tools are enforced only if tool_choice requires a call",
        name,
    )
