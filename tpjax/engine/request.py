"""One request's life: what was asked, what has been generated, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tpjax.sampling_params import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one generated token, from the model's own distribution.

    Attributes:
        token_id: the token drawn.
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
        output_ids: tokens generated so far.
        logprobs: one entry a generated token, where asked for.
        finish_reason: ``None`` while it runs.
        slot: place in the batch while it runs.
        pages: cache pages it holds, in order of position.
        prefilled: prompt tokens whose keys and values are in the cache.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...] = ()
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    prefilled: int = 0

    @property
    def most_tokens(self) -> int:
        """Longest the sequence can become, prompt and output."""
        return len(self.prompt_ids) + self.params.max_tokens

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self.params.max_tokens - len(self.output_ids)

    @property
    def next_position(self) -> int:
        """Position of the last generated token, which the next decode step feeds."""
        return len(self.prompt_ids) + len(self.output_ids) - 1

    def append(self, token: int) -> None:
        """Takes a generated token; ends the request where it is a stop token or the last allowed."""
        self.output_ids.append(token)
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif not self.remaining:
            self.finish_reason = "length"
