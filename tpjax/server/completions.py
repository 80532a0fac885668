"""``/v1/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tpjax.engine.generation import Delta
from tpjax.server import admission_budget, responses
from tpjax.server.grammars.compiler import GrammarCompiler
from tpjax.server.grammars.structured_outputs import grammars
from tpjax.server.prompt_encoder import PromptEncoder
from tpjax.server.protocol import CompletionBody
from tpjax.server.responses import gather, make_requests, submit, token_text, usage
from tpjax.server.service import Service
from tpjax.text.detokenizer import IncrementalDetokenizer

if TYPE_CHECKING:
    from tpjax.engine.request import Request, TokenLogprobs
    from tpjax.llm import LLM

_DEFAULT_TOKENS = 16  # OpenAI's
_NEAR = 16  # characters a tokenizer may have left out between two tokens


class CompletionResponse:
    """The answer to one request; use :meth:`begin`.

    Attributes:
        stream: what the engine gives.
    """

    def __init__(self, service: Service, llm: LLM, body: CompletionBody, requests: list[Request]) -> None:
        self._body = body
        self._tokenizer = llm.tokenizer
        self._show = token_text(llm.tokenizer, body.return_tokens_as_token_ids)
        self._frame = {
            "id": f"cmpl-{body.request_id or uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or service.model,
        }
        self._prompts = body.prompts()
        self.stream = submit(service, llm, body, requests)

    @classmethod
    async def begin(
        cls, service: Service, compiler: GrammarCompiler | None, texts: PromptEncoder, body: CompletionBody
    ) -> CompletionResponse:
        """Checks everything and hands it to the engine.

        Raises:
            ApiError: nothing runs then.
        """
        llm = service.llm
        body.check()
        prompts, n = body.prompts(), body.n or 1
        params: dict[str, Any] = {"logprobs": body.logprobs}
        if body.echo and body.logprobs is not None:
            params["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
        with service.preparing(len(prompts) * n):
            shapes = await grammars(compiler, body, len(prompts) * n)
            requests: list[Request] = []
            for prompt in prompts:
                ids = await _ids(texts, prompt, body)
                own = shapes[len(requests) : len(requests) + n]
                make = partial(make_requests, llm, body, ids, body.max_tokens, _DEFAULT_TOKENS, own, **params)
                # over ids a long prompt takes a while as well: the event loop has others to serve
                requests += await texts.threads.run(make)
        admission_budget.prepared()
        return cls(service, llm, body, requests)

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            self._choice(index, delta, first=True) for index, delta in enumerate(await gather(self.stream))
        ]
        return {**self._frame, "choices": choices, "usage": usage(self.stream, self._body.n or 1)}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in chunks; the usage comes last, where asked for."""
        running = responses.RunningUsage(self.stream, self._body)
        begun: set[int] = set()
        async for index, delta in self.stream.deltas():
            choice = self._choice(index, delta, first=index not in begun)
            begun.add(index)
            yield {**self._frame, "choices": [choice], **running.grew(index, delta)}
        if self._body.include_usage:
            yield {**self._frame, "choices": [], "usage": usage(self.stream, self._body.n or 1)}

    def _choice(self, index: int, delta: Delta, *, first: bool) -> dict[str, Any]:
        """A choice, or a part of it; what is told of the prompt comes with the first."""
        body, request = self._body, self.stream.generations[index].request
        echo, starts = self._echo(index) if body.echo else ("", [])
        logprobs = None
        if body.logprobs is not None:
            entries: list[TokenLogprobs | None] = list(delta.logprobs)
            ids, offsets = delta.token_ids, [len(echo) + at for at in delta.offsets]
            if first and body.echo:
                entries = [*request.prompt_logprobs, *entries]
                ids, offsets = [*request.prompt_token_ids, *ids], [*starts, *offsets]
            logprobs = self._logprobs(ids, entries, offsets, body.logprobs)
        choice = {
            "index": index,
            "text": echo + delta.text if first else delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            choice["prompt_token_ids"] = list(request.prompt_token_ids) if first else None
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = responses.prompt_logprobs(request, body.prompt_logprobs, self._show)
        return choice

    def _echo(self, index: int) -> tuple[str, list[int]]:
        """The prompt's text and where each of its tokens begins in it.

        What the prompt leaves unfinished of a character comes with the answer, which may finish it.
        """
        prompt = self._prompts[index // (self._body.n or 1)]
        ids = self.stream.generations[index].request.prompt_token_ids
        if self._tokenizer is None:
            return "", [0] * len(ids)
        before = after = 0  # tokens round a text that are not in it
        if isinstance(prompt, str) and self._body.add_special_tokens is not False:
            before, after = self._tokenizer.edges
        shown = IncrementalDetokenizer(self._tokenizer, skip_special_tokens=False)
        pieces, starts = [""] * before, [0] * before
        for token in ids[before : len(ids) - after]:
            pieces.append(shown.push(token))
            starts.append(shown.start)
        text = "".join(pieces)
        pieces += [""] * after
        if isinstance(prompt, str) and self._body.truncate_prompt_tokens is None and text != prompt:
            return prompt, _found(prompt, pieces)
        return text, [*starts, *[shown.length] * after]

    def _logprobs(
        self, ids: Sequence[int], entries: Sequence[TokenLogprobs | None], offsets: list[int], count: int
    ) -> dict[str, Any]:
        tops: list[dict[str, float] | None] = []
        for entry in entries:
            if entry is None:
                tops.append(None)
                continue
            top: dict[str, float] = {}
            for token, value in list(entry.top.items())[:count]:
                top.setdefault(self._show(token), value)  # of two that look alike the likelier counts
            top.setdefault(self._show(entry.token_id), entry.logprob)
            tops.append(top)
        return {
            "tokens": [self._show(token) for token in ids],
            "token_logprobs": [entry and entry.logprob for entry in entries],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def _found(text: str, pieces: Sequence[str]) -> list[int]:
    """Where pieces begin in a text that a tokenizer normalised: each at or soon after the end of the last."""
    at, found = 0, []
    for piece in pieces:
        near = text.find(piece, at, at + len(piece) + _NEAR) if piece else at
        at = min(at if near < 0 else near, len(text))
        found.append(at)
        at += len(piece)
    return found


async def _ids(texts: PromptEncoder, prompt: str | list[int], body: CompletionBody) -> list[int]:
    whole = body.truncate_prompt_tokens is not None
    if isinstance(prompt, str):
        special = body.add_special_tokens is not False
        return await texts.encode(prompt, "prompt", add_special_tokens=special, whole=whole)
    if not whole:
        texts.check_length(len(prompt), "prompt")
    return prompt
