"""One request's life: what was asked, what has been generated, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tpjax.engine.block_manager import PageKey, page_key, root_key
from tpjax.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class Grammar(Protocol):
    """What limits the tokens a request may draw next, as ``llguidance`` computes it."""

    @property
    def finished(self) -> bool:
        """Nothing may follow: the request ends."""
        ...

    def mask(self) -> Any:
        """uint32 [ceil(V / 32)]: bit ``i`` of word ``w`` allows token ``32 * w + i``."""
        ...

    def advance(self, token: int) -> None:
        """Takes the token that was drawn."""
        ...


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one token, from the model's own distribution.

    Attributes:
        token_id: the token drawn, or the prompt's.
        logprob: its log-probability.
        top: the likeliest tokens' ids and log-probabilities, most likely first.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(eq=False)  # two requests that ask the same are two requests all the same
class Request:
    """A prompt being continued.

    Attributes:
        prompt_ids: tokens of the prompt; at least one.
        params: sampling parameters.
        seed: of its noise.
        stop_ids: tokens that end it (none of the model's own where ``ignore_eos``).
        cache_salt: only requests of the same salt share cache pages.
        grammar: limits the tokens it may draw.
        barred_ids: tokens it may never draw.
        priority: lower ones run first.
        output_ids: tokens generated so far, as far as the host has read them.
        logprobs: one entry a generated token, where asked for.
        prompt_logprobs: one entry a prompt token, ``None`` for the first, where asked for.
        finish_reason: ``None`` while it runs.
        error: what went wrong, where ``finish_reason`` is ``error``.
        lost: it ended with the state on the devices, by an error that need not be its own.
        cached_tokens: prompt tokens whose keys and values were found in the cache.
        rope_scaling_key: requests share cached keys only if it is equal: the frequencies of some rotary
            embeddings depend on the maximum length.
        arrival: its number in the order of arrival.
        queued: it waits for a slot.
        slot: place in the batch while it runs.
        pages: cache pages it holds, in order of position.
        prefill_ids: what it has to run before it can decode: the prompt and, if it was preempted, its output.
        prefill_start: how many of these were found in the cache.
        prefilled: how many of these are in the cache or have been handed to the device.
        launched: output tokens asked of the device, read or not.
        published: of its pages, from the first on, have been made findable.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    grammar: Grammar | None = None
    barred_ids: tuple[int, ...] = ()
    priority: int = 0
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    lost: bool = False
    cached_tokens: int = 0
    rope_scaling_key: tuple[int, ...] = ()
    arrival: int = 0
    queued: bool = False
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    prefill_ids: list[int] = field(default_factory=list)
    prefill_start: int = 0
    prefilled: int = 0
    launched: int = 0
    published: int = 0
    _keys: list[PageKey] = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, int]:
        """Its place among others: by priority, then by arrival."""
        return self.priority, self.arrival

    @property
    def most_tokens(self) -> int:
        """Longest the sequence can become, prompt and output."""
        return len(self.prompt_ids) + self.params.max_tokens

    @property
    def remaining(self) -> int:
        """Tokens it may still be asked for."""
        return self.params.max_tokens - self.launched

    @property
    def next_position(self) -> int:
        """Position of the last token asked for, which the next decode step feeds."""
        return len(self.prompt_ids) + self.launched - 1

    @property
    def must_go_on(self) -> bool:
        """Whether no token that ends it may be drawn next, as far as the host has read."""
        return len(self.output_ids) < self.params.min_tokens

    @property
    def prefilling(self) -> bool:
        """It runs, and tokens before its next one have not been handed to the device."""
        return self.prefilled < len(self.prefill_ids)

    @property
    def unread(self) -> bool:
        """Tokens have been asked for that the host has not read."""
        return self.launched > len(self.output_ids)

    @property
    def decodable(self) -> bool:
        """A next token can be asked for now."""
        return not self.prefilling and self.remaining > 0

    def append(self, token: int) -> None:
        """Takes a generated token; ends the request where it is a stop token or the last allowed."""
        self.output_ids.append(token)
        if self.grammar is not None:
            self.grammar.advance(token)
        if token in self.stop_ids or (self.grammar is not None and self.grammar.finished):
            self.finish_reason = "stop"
        elif len(self.output_ids) >= self.params.max_tokens:
            self.finish_reason = "length"

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the output read so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    def tokens(self, start: int, stop: int) -> list[int]:
        """These of its tokens, prompt and output."""
        prompt = len(self.prompt_ids)
        return [
            *self.prompt_ids[start:stop],
            *self.output_ids[max(0, start - prompt) : max(0, stop - prompt)],
        ]

    def page_keys(self, page_size: int, pages: int) -> Sequence[PageKey]:
        """Keys of its first ``pages`` pages or more, all of whose tokens are known; computed once."""
        for page in range(len(self._keys), pages):
            parent = self._keys[-1] if self._keys else root_key(f"{self.rope_scaling_key}{self.cache_salt}")
            self._keys.append(page_key(parent, self.tokens(page * page_size, (page + 1) * page_size)))
        return self._keys
