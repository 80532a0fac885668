"""``/v1/completions``: from a checked request to its response."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from tpjax.engine.generation import Delta
from tpjax.server import admission_budget, responses
from tpjax.server.grammars.compiler import GrammarCompiler
from tpjax.server.grammars.structured_outputs import grammars
from tpjax.server.json_types import JsonObject
from tpjax.server.prompt_encoder import PromptEncoder
from tpjax.server.protocol import CompletionBody
from tpjax.server.responses import HeldDeltas, gather, make_requests, submit, token_text, usage
from tpjax.server.service import Service
from tpjax.text.detokenizer import IncrementalDetokenizer

if TYPE_CHECKING:
    from tpjax.engine.request import Request, TokenLogprobs
    from tpjax.llm import LLM

_DEFAULT_TOKENS = 16  # OpenAI's
_NEAR = 16  # characters that a tokenizer may have dropped between two tokens


class CompletionResponse:
    """The response to one request; create it with :meth:`begin`.

    Attributes:
        stream: deltas of the generations.
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
        cls, service: Service, compiler: GrammarCompiler | None, encoder: PromptEncoder, body: CompletionBody
    ) -> CompletionResponse:
        """Checks a request and submits it to the engine.

        Raises:
            ApiError: the request is invalid, or the queue is full; nothing runs then.
        """
        llm = service.llm
        body.check()
        prompts, n = body.prompts(), body.n or 1
        params: dict[str, int | None] = {"logprobs": body.logprobs}
        if body.echo and body.logprobs is not None:
            params["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
        with service.preparing(len(prompts) * n):
            checked = await encoder.threads.run(
                partial(responses.checked_params, llm, body, body.max_tokens, **params)
            )
            constraints = await grammars(compiler, body, len(prompts) * n)
            requests: list[Request] = []
            for prompt in prompts:
                ids = await _token_ids(encoder, prompt, body)
                own = constraints[len(requests) : len(requests) + n]
                # not on the event loop: a long prompt takes a while, as token ids too
                requests += await encoder.threads.run(
                    make_requests, llm, body, checked, ids, body.max_tokens, _DEFAULT_TOKENS, own
                )
        admission_budget.prepared()
        return cls(service, llm, body, requests)

    async def complete(self) -> JsonObject:
        """Waits for all choices; returns the whole response."""
        choices = [
            self._choice(index, delta, first=True) for index, delta in enumerate(await gather(self.stream))
        ]
        return {**self._frame, "choices": choices, "usage": usage(self.stream, self._body.n or 1)}

    async def chunks(self) -> AsyncIterator[JsonObject]:
        """Yields the response in chunks; the usage comes last, if asked for."""
        running = responses.RunningUsage(self.stream, self._body)
        begun: set[int] = set()
        held = [HeldDeltas() for _ in self.stream.generations]
        async for index, delta in self.stream.deltas():
            ready = delta if self._body.logprobs is None else held[index].push(delta)
            if ready is None:
                continue
            choice = self._choice(index, ready, first=index not in begun)
            begun.add(index)
            yield {**self._frame, "choices": [choice], **running.add(index, ready)}
        if self._body.include_usage:
            yield {**self._frame, "choices": [], "usage": usage(self.stream, self._body.n or 1)}

    def _choice(self, index: int, delta: Delta, *, first: bool) -> JsonObject:
        """Returns a choice, or a part of it; the first part includes what the response says of the prompt."""
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
        """Returns the text of the prompt and the offset of each of its tokens, characters.

        A character that the prompt leaves incomplete comes with the completion, which may complete it.
        """
        prompt = self._prompts[index // (self._body.n or 1)]
        ids = self.stream.generations[index].request.prompt_token_ids
        if self._tokenizer is None:
            return "", [0] * len(ids)
        before = after = 0  # BOS and EOS, which are not in the text
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
    ) -> JsonObject:
        tops: list[dict[str, float] | None] = []
        for entry in entries:
            if entry is None:
                tops.append(None)
                continue
            top: dict[str, float] = {}
            for token, value in list(entry.top.items())[:count]:
                top.setdefault(self._show(token), value)  # the likelier of two tokens with the same text
            top.setdefault(self._show(entry.token_id), entry.logprob)
            tops.append(top)
        return {
            "tokens": [self._show(token) for token in ids],
            "token_logprobs": [entry and entry.logprob for entry in entries],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def _found(text: str, pieces: Sequence[str]) -> list[int]:
    """Returns where pieces start in the text before normalisation: at or soon after the end of the last."""
    at, found = 0, []
    for piece in pieces:
        near = text.find(piece, at, at + len(piece) + _NEAR) if piece else at
        at = min(at if near < 0 else near, len(text))
        found.append(at)
        at += len(piece)
    return found


async def _token_ids(encoder: PromptEncoder, prompt: str | list[int], body: CompletionBody) -> list[int]:
    whole = body.truncate_prompt_tokens is not None
    if isinstance(prompt, str):
        special = body.add_special_tokens is not False
        return await encoder.encode(prompt, "prompt", add_special_tokens=special, whole=whole)
    if not whole:
        encoder.check_length(len(prompt), "prompt")
    return prompt
