"""``/v1/completions``."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from tpjax.engine.generation import Delta
from tpjax.server.answers import gather, make_requests, submit, token_text, usage
from tpjax.server.protocol import CompletionBody
from tpjax.server.service import Service

if TYPE_CHECKING:
    from tpjax.engine.request import Request, TokenLogprobs
    from tpjax.llm import LLM

_DEFAULT_TOKENS = 16  # OpenAI's


class CompletionAnswer:
    """The answer to one request; use :meth:`begin`.

    Attributes:
        stream: what the engine gives.
    """

    def __init__(self, service: Service, llm: LLM, body: CompletionBody, requests: list[Request]) -> None:
        self._body = body
        self._tokenizer = llm.tokenizer
        self._show = token_text(llm.tokenizer)
        self._frame = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or service.model,
        }
        self._prompts = body.prompts()
        self.stream = submit(service, llm, body, requests)

    @classmethod
    async def begin(cls, service: Service, body: CompletionBody) -> CompletionAnswer:
        """Checks everything and hands it to the engine.

        Raises:
            ApiError: nothing runs then.
        """
        llm = service.llm
        body.check()
        prompts = body.prompts()
        service.admit(len(prompts) * (body.n or 1))
        params: dict[str, Any] = {"logprobs": body.logprobs}
        if body.echo:
            params["prompt_logprobs"] = body.logprobs

        def make() -> list[Request]:
            made: list[Request] = []
            for prompt in prompts:
                ids: Any = prompt
                if body.add_special_tokens is False and isinstance(prompt, str) and llm.tokenizer:
                    ids = llm.tokenizer.encode(prompt, add_special_tokens=False)
                made += make_requests(llm, body, ids, body.max_tokens, _DEFAULT_TOKENS, **params)
            return made

        # a long text takes a while: the event loop has others to serve
        return cls(service, llm, body, await asyncio.to_thread(make))

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        n = self._body.n or 1
        choices = []
        for index, delta in enumerate(await gather(self.stream)):
            echo = self._echo(index)
            choices.append(self._choice(index, echo + delta.text, delta, _Offsets(), echo=True))
        return {**self._frame, "choices": choices, "usage": usage(self.stream, n)}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in chunks; the usage comes last, where asked for."""
        empty = {"usage": None} if self._body.include_usage else {}
        offsets = [_Offsets() for _ in self.stream.generations]
        begun: set[int] = set()
        async for index, delta in self.stream.deltas():
            first = index not in begun
            begun.add(index)
            text = (self._echo(index) if first else "") + delta.text
            choice = self._choice(index, text, delta, offsets[index], echo=first)
            yield {**self._frame, "choices": [choice], **empty}
        if self._body.include_usage:
            yield {**self._frame, "choices": [], "usage": usage(self.stream, self._body.n or 1)}

    def _echo(self, index: int) -> str:
        """The prompt's text, where it is to be given back."""
        if not self._body.echo:
            return ""
        prompt = self._prompts[index // (self._body.n or 1)]
        if isinstance(prompt, str):
            return prompt
        return self._tokenizer.decode(prompt, skip_special_tokens=False) if self._tokenizer else ""

    def _choice(
        self, index: int, text: str, delta: Delta, offsets: _Offsets, *, echo: bool
    ) -> dict[str, Any]:
        request = self.stream.generations[index].request
        logprobs = None
        if self._body.logprobs is not None:
            entries: list[TokenLogprobs | None] = list(delta.logprobs)
            ids = delta.token_ids
            if echo and self._body.echo:
                entries = [*request.prompt_logprobs, *entries]
                ids = [*request.prompt_ids, *ids]
            logprobs = self._logprobs(ids, entries, offsets)
        reason = delta.finish_reason
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(
        self, ids: Sequence[int], entries: Sequence[TokenLogprobs | None], offsets: _Offsets
    ) -> dict[str, Any]:
        tokens = [self._show(token) for token in ids]
        tops: list[dict[str, float] | None] = []
        for entry in entries:
            if entry is None:
                tops.append(None)
                continue
            top: dict[str, float] = {}
            for token, value in entry.top.items():
                top.setdefault(self._show(token), value)  # of two that look alike the likelier counts
            top.setdefault(self._show(entry.token_id), entry.logprob)
            tops.append(top)
        return {
            "tokens": tokens,
            "token_logprobs": [entry and entry.logprob for entry in entries],
            "top_logprobs": tops,
            "text_offset": [offsets.next(token) for token in tokens],
        }


class _Offsets:
    """Where each token begins in the text, characters."""

    def __init__(self) -> None:
        self._at = 0

    def next(self, token: str) -> int:
        at = self._at
        self._at += len(token)
        return at
