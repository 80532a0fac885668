"""How many prompt tokens a step takes beside the requests that it decodes. Plain Python, no jax."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from tpjax.engine.request import Request

_SLOWER = 2.0  # a step with prompt tokens over decoding alone, at most
_KEY_TOKENS = 64  # contexts that differ by less have one prediction


class StepSeconds(Protocol):
    """Predicts the seconds of a step, as :meth:`tpjax.step_time.StepTime.seconds`."""

    def __call__(
        self, decode_rows: int, context_tokens: int, prompt_tokens: int = 0, prompt_context: int = 0
    ) -> float:
        """Returns the seconds of a step with so many decode rows, keys they attend to, and prompt tokens."""
        ...


class PromptBudget:
    """Returns the prompt tokens of a step: as many as make it at most twice as long as decoding alone.

    They are whole pages, at least one. A step that decodes nothing takes ``most``.

    Args:
        seconds: predicts the seconds of a step.
        page_size: positions per cache page.
        most: prompt tokens of a step, at most.
        max_num_batched_tokens: tokens of a step, decoded and of prompts together, in place of the prediction.
    """

    def __init__(
        self, seconds: StepSeconds, page_size: int, most: int, max_num_batched_tokens: int | None = None
    ) -> None:
        self._seconds, self._page_size, self._most = seconds, page_size, most
        self._fixed = max_num_batched_tokens
        self._predicted = lru_cache(maxsize=1024)(self._predict)

    def __call__(self, decoding: Sequence[Request]) -> int:
        """Returns the prompt tokens of a step that decodes these requests."""
        rows = len(decoding)
        if self._fixed is not None:
            return max(self._fixed - rows, 0)
        if not rows:
            return self._most
        context = sum(one.next_position + 1 for one in decoding) / rows
        return self._predicted(rows, round(context / _KEY_TOKENS))

    def _predict(self, rows: int, context_keys: int) -> int:
        context_tokens = rows * max(1, context_keys * _KEY_TOKENS)
        limit = _SLOWER * self._seconds(rows, context_tokens)
        pages = range(1, self._most // self._page_size + 1)
        fitting = bisect_right(
            pages, limit, key=lambda count: self._seconds(rows, context_tokens, count * self._page_size)
        )
        return max(1, fitting) * self._page_size
