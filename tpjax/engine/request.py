"""A request: its prompt and parameters, its output so far, and what the scheduler keeps about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tpjax.engine.block_manager import PageKey, page_key, root_key
from tpjax.engine.page_groups import Pages
from tpjax.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class Grammar(Protocol):
    """Constrains the tokens that a request may sample next, as ``llguidance`` computes them."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow: the request ends."""
        ...

    @property
    def error(self) -> str | None:
        """Why it cannot go on, if it cannot: the request fails."""
        ...

    def mask(self) -> Any:  # a NumPy array, which this module must not import
        """Returns uint32 [ceil(V / 32)]: bit ``i`` of word ``w`` allows token ``32 * w + i``."""
        ...

    def advance(self, token: int) -> None:
        """Accepts the sampled token."""
        ...


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, from the model's distribution before penalties and temperature.

    Attributes:
        token_id: the sampled token, or the prompt's token.
        logprob: its log-probability.
        top: ids and log-probabilities of the most likely tokens, most likely first.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(eq=False)  # requests with equal fields are still different requests
class Request:
    """A prompt and its continuation.

    Attributes:
        prompt_token_ids: tokens of the prompt; at least one.
        params: sampling parameters.
        seed: seed of its sampling noise.
        stop_ids: tokens that end it; the model's own are among them unless ``ignore_eos``.
        cache_salt: requests share cache pages only if their salts are equal.
        grammar: constrains the tokens that may be sampled.
        barred_ids: tokens that are never sampled.
        priority: lower priorities run first.
        output_token_ids: tokens generated so far, as far as the host has read them.
        logprobs: one entry per generated token, if asked for.
        prompt_logprobs: one entry per prompt token, ``None`` for the first, if asked for.
        finish_reason: ``None`` while it runs.
        error: what went wrong, if ``finish_reason`` is ``error``.
        state_lost: whether it failed because the device state was lost; the cause may be another request.
        cached_tokens: prompt tokens that were found in the prefix cache when it first got a slot; ``None``
            before that. What it finds again after preemption is mostly its own.
        rope_scaling_key: requests share cached keys only if it is equal: the frequencies of some rotary
            embeddings depend on the maximum length.
        arrival: its number in order of arrival.
        queued: whether it waits for a slot.
        slot: its place in the batch while it runs.
        history_row: where its penalties and biases are kept while it runs, if it needs them.
        row: what the runner is told of it, kept while it has its slot: a ``runtime.rows.Row``.
        pages: cache pages it holds in each page group, in order of position.
        prefill_token_ids: tokens to prefill before it can decode: the prompt and, if it was preempted, its
            output.
        prefill_start: how many of these were found in the prefix cache.
        prefilled: how many of these are in the cache or in flight.
        dispatched_tokens: output tokens dispatched, read or still in flight.
        last_step: number of the last step that fed tokens of it, for pipelines.
        inserted_pages: how many of its first pages have been inserted into the prefix cache.
    """

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    grammar: Grammar | None = None
    barred_ids: tuple[int, ...] = ()
    priority: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    state_lost: bool = False
    cached_tokens: int | None = None
    rope_scaling_key: tuple[int, ...] = ()
    arrival: int = 0
    queued: bool = False
    slot: int | None = None
    history_row: int | None = None
    row: Any = None
    pages: Pages = field(default_factory=list)
    prefill_token_ids: list[int] = field(default_factory=list)
    prefill_start: int = 0
    prefilled: int = 0
    dispatched_tokens: int = 0
    last_step: int = 0
    inserted_pages: int = 0
    _keys: list[PageKey] = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, int]:
        """Sort key among requests: priority, then arrival."""
        return self.priority, self.arrival

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the output read so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def max_length(self) -> int:
        """Maximum length of the sequence, prompt and output, tokens."""
        return len(self.prompt_token_ids) + self.params.max_tokens

    @property
    def remaining(self) -> int:
        """Output tokens that have not been dispatched, at most."""
        return self.params.max_tokens - self.dispatched_tokens

    @property
    def next_position(self) -> int:
        """Position of the last dispatched token, which the next decode step feeds."""
        return len(self.prompt_token_ids) + self.dispatched_tokens - 1

    @property
    def below_min_tokens(self) -> bool:
        """Whether no stop token may be sampled next, as far as the host has read."""
        return len(self.output_token_ids) < self.params.min_tokens

    @property
    def prefilling(self) -> bool:
        """Whether tokens before its next one have not been dispatched."""
        return self.prefilled < len(self.prefill_token_ids)

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are wanted and not complete: they need every logit."""
        return self.params.prompt_logprobs is not None and not self.output_token_ids

    @property
    def unread(self) -> bool:
        """Whether the host has not read all dispatched tokens."""
        return self.dispatched_tokens > len(self.output_token_ids)

    @property
    def decoded(self) -> bool:
        """Whether a token has been dispatched after that of its last prefill."""
        return self.next_position > len(self.prefill_token_ids)

    @property
    def decodable(self) -> bool:
        """Whether a next token can be dispatched now."""
        return not self.prefilling and self.remaining > 0

    def append(self, token: int) -> None:
        """Appends a generated token; ends the request if it is a stop token or the last allowed."""
        grammar = self.grammar
        self.output_token_ids.append(token)
        if grammar is not None:
            grammar.advance(token)
        complete = grammar is not None and grammar.finished
        # a grammar that cannot go on is no error at the last token, after which nothing has to follow
        stuck = complete and grammar is not None and grammar.error is not None
        at_limit = len(self.output_token_ids) >= self.params.max_tokens
        if token in self.stop_ids or (complete and not (stuck and at_limit)):
            self.finish_reason = "stop"
        elif at_limit:
            self.finish_reason = "length"

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Returns tokens ``start`` to ``stop`` of prompt and output together."""
        prompt = len(self.prompt_token_ids)
        return [
            *self.prompt_token_ids[start:stop],
            *self.output_token_ids[max(0, start - prompt) : max(0, stop - prompt)],
        ]

    def page_keys(self, page_size: int, pages: int) -> Sequence[PageKey]:
        """Returns the keys of at least its first ``pages`` pages, whose tokens must all be known.

        Keys are computed once and kept.
        """
        for page in range(len(self._keys), pages):
            parent = self._keys[-1] if self._keys else root_key(f"{self.rope_scaling_key}{self.cache_salt}")
            self._keys.append(page_key(parent, self.token_ids(page * page_size, (page + 1) * page_size)))
        return self._keys
