"""How much text may be in preparation: received, parsed, rendered or tokenised, over all requests."""

from __future__ import annotations

from contextvars import ContextVar

from tpjax.server.error_responses import ApiError

# What a request may bring without asking: small ones are answered beside any number of large ones. Their
# number is bounded by the queue.
FREE_BYTES = 64 << 10


class AdmissionBudget:
    """Bytes that requests share while they are prepared.

    Args:
        limit: bytes; more are refused.

    Attributes:
        limit: as given.
        used: bytes that are taken.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0


class BudgetShare:
    """One request's part of a budget: the most it had at once. Use it as a context manager.

    Attributes:
        most: bytes it had at once.
    """

    def __init__(self, budget: AdmissionBudget) -> None:
        self._budget = budget
        self._taken = self.most = 0
        self._open = True

    def __enter__(self) -> BudgetShare:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def grow(self, size: int) -> None:
        """Takes bytes up to ``size`` in all.

        Raises:
            ApiError: 429; nothing more is taken then.
        """
        if not self._open or size <= max(self._taken, FREE_BYTES):
            return
        others = self._budget.used - self._taken
        if others + size > self._budget.limit:
            raise ApiError(
                429,
                f"a text of {size} bytes has to wait: {others} bytes are being prepared, "
                f"and {self._budget.limit} may be",
                code="text_budget_full",
                headers={"Retry-After": "1"},
            )
        self._budget.used += size - self._taken
        self._taken = self.most = size

    def release(self) -> None:
        """Gives everything back; later growth takes nothing."""
        self._budget.used -= self._taken
        self._taken, self._open = 0, False


# of the request that is being answered
share: ContextVar[BudgetShare | None] = ContextVar("share", default=None)


def take(size: int) -> None:
    """Takes bytes up to ``size`` in all for this request.

    Raises:
        ApiError: 429.
    """
    if (own := share.get()) is not None:
        own.grow(size)


def prepared() -> None:
    """Says that this request's text is with the engine, as tokens."""
    if (own := share.get()) is not None:
        own.release()
