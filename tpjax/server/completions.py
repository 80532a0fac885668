"""``/v1/completions``: from a checked request to its response."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tpjax.engine.generation import Delta
from tpjax.server import admission_budget, responses
from tpjax.server.grammars.compiler import GrammarCompiler
from tpjax.server.grammars.structured_outputs import grammars
from tpjax.server.json_types import JsonObject
from tpjax.server.prompt_encoder import PromptEncoder
from tpjax.server.protocol import CompletionBody
from tpjax.server.responses import (
    HeldDeltas,
    built,
    event,
    gather,
    json_of,
    make_requests,
    submit,
    token_text,
    usage,
)
from tpjax.server.service import Service
from tpjax.text.detokenizer import IncrementalDetokenizer

if TYPE_CHECKING:
    from tpjax.engine.request import Request, TokenLogprobs
    from tpjax.llm import LLM

_DEFAULT_TOKENS = 16  # OpenAI's
_NEAR = 16  # characters that a tokenizer may have dropped between two tokens


@dataclass
class _Prompt:
    """What a response says of a prompt, the same in each of its choices.

    Attributes:
        echo: its text, if asked for.
        logprobs: its part of ``logprobs``, if asked for.
        prompt_logprobs: ``prompt_logprobs``, if asked for.
    """

    echo: str = ""
    logprobs: JsonObject | None = None
    prompt_logprobs: list[JsonObject | None] | None = None


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
        self._of_prompts: dict[int, _Prompt] = {}  # by the index of their first choice
        # tokens and log-probabilities of the longest prompt in each choice
        longest = max(len(request.prompt_token_ids) for request in requests)
        shown = body.echo or body.prompt_logprobs is not None or body.return_token_ids
        self._prompt_size = longest * (1 + (requests[0].params.prompt_logprobs or 0)) if shown else 0
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
        if (count := checked.params.prompt_logprobs) is not None:
            tokens = sum(len(request.prompt_token_ids) for request in requests[::n])
            param = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
            responses.check_prompt_logprobs(tokens, count, n, param)
        return cls(service, llm, body, requests)

    async def complete(self) -> bytes:
        """Waits for all choices; returns the whole response as JSON."""
        deltas = await gather(self.stream)
        size = sum(len(delta.token_ids) for delta in deltas) * (1 + (self._body.logprobs or 0))
        return await built(size + self._prompt_size * len(deltas), lambda: json_of(self._whole(deltas)))

    async def events(self) -> AsyncIterator[bytes]:
        """Yields the response in chunks, as server-sent events; the usage comes last, if asked for."""
        running = responses.RunningUsage(self.stream, self._body)
        begun: set[int] = set()
        held = [HeldDeltas() for _ in self.stream.generations]
        async for index, delta in self._deltas():
            ready = delta if self._body.logprobs is None else held[index].push(delta)
            if ready is None:
                continue
            first = index not in begun
            begun.add(index)
            more = running.add(index, ready)
            build = partial(self._event, index, ready, more, first=first)
            yield await built(self._prompt_size if first else 0, build)
        if self._body.include_usage:
            used = usage(self.stream, self._body.n or 1)
            yield event({**self._frame, "choices": [], "usage": used})

    async def _deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yields (index of the choice, delta).

        The first choice of a prompt begins before the others: it computes what all of them say of the prompt.
        """
        n = self._body.n or 1
        waiting: dict[int, list[tuple[int, Delta]]] = {}
        if self._body.echo and self._body.logprobs is not None:
            waiting = {first: [] for first in range(0, len(self.stream.generations), n)}
        async for index, delta in self.stream.deltas():
            first = index - index % n
            if index != first and first in waiting:
                waiting[first].append((index, delta))
                continue
            yield index, delta
            for one in waiting.pop(first, ()):
                yield one

    def _event(self, index: int, delta: Delta, more: JsonObject, *, first: bool) -> bytes:
        return event({**self._frame, "choices": [self._choice(index, delta, first=first)], **more})

    def _whole(self, deltas: Sequence[Delta]) -> JsonObject:
        choices = [self._choice(index, delta, first=True) for index, delta in enumerate(deltas)]
        return {**self._frame, "choices": choices, "usage": usage(self.stream, self._body.n or 1)}

    def _choice(self, index: int, delta: Delta, *, first: bool) -> JsonObject:
        """Returns a choice, or a part of it; the first part includes what the response says of the prompt."""
        body, request = self._body, self.stream.generations[index].request
        prompt = self._prompt(index)
        logprobs = None
        if body.logprobs is not None:
            offsets = [len(prompt.echo) + at for at in delta.offsets]
            logprobs = self._logprobs(delta.token_ids, delta.logprobs, offsets, body.logprobs)
            if first and prompt.logprobs is not None:
                logprobs = {
                    name: [*of_prompt, *logprobs[name]] for name, of_prompt in prompt.logprobs.items()
                }
        choice = {
            "index": index,
            "text": prompt.echo + delta.text if first else delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            choice["prompt_token_ids"] = list(request.prompt_token_ids) if first else None
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt.prompt_logprobs
        return choice

    def _prompt(self, index: int) -> _Prompt:
        """Returns what the response says of a choice's prompt, computed for the first part of the first."""
        body, first = self._body, index - index % (self._body.n or 1)
        if first not in self._of_prompts:
            request = self.stream.generations[first].request
            said = _Prompt()
            if body.echo:
                said.echo, starts = self._echo(first)
                if body.logprobs is not None:
                    ids = request.prompt_token_ids
                    said.logprobs = self._logprobs(ids, request.prompt_logprobs, starts, body.logprobs)
            if body.prompt_logprobs is not None:
                said.prompt_logprobs = responses.prompt_logprobs(request, body.prompt_logprobs, self._show)
            self._of_prompts[first] = said
        return self._of_prompts[first]

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
