"""Admission budget: bytes of text in preparation (received, rendered, tokenised) over all requests."""

from __future__ import annotations

from contextvars import ContextVar

from tpjax.server.error_responses import ApiError

# Bytes that a request may bring without a reservation: small requests are served beside any number of large
# ones. Their number is bounded by the queue.
FREE_BYTES = 64 << 10


class AdmissionBudget:
    """Counts the bytes that requests have reserved while they are prepared.

    Args:
        limit: most bytes reserved at once.

    Attributes:
        limit: most bytes reserved at once.
        used: bytes reserved now.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0


class Reservation:
    """The bytes that one request has reserved.

    Args:
        budget: the budget of all requests.

    Attributes:
        most: most bytes reserved at once.
    """

    def __init__(self, budget: AdmissionBudget) -> None:
        self._budget = budget
        self._reserved = self.most = 0
        self._open = True

    def grow(self, size: int) -> None:
        """Reserves ``size`` bytes in all.

        Raises:
            ApiError: 429, the budget has not enough left; the reservation stays as it was.
        """
        if not self._open or size <= max(self._reserved, FREE_BYTES):
            return
        others = self._budget.used - self._reserved
        if others + size > self._budget.limit:
            raise ApiError(
                429,
                f"a text of {size} bytes has to wait: {others} bytes are being prepared, "
                f"and {self._budget.limit} may be",
                code="text_budget_full",
                headers={"Retry-After": "1"},
            )
        self._budget.used += size - self._reserved
        self._reserved = self.most = size

    def release(self) -> None:
        """Releases all bytes; later growth reserves nothing."""
        self._budget.used -= self._reserved
        self._reserved, self._open = 0, False


# Reservation of the request that is being served.
reservation: ContextVar[Reservation | None] = ContextVar("reservation", default=None)


def reserve(size: int) -> None:
    """Reserves ``size`` bytes in all for the current request.

    Raises:
        ApiError: 429, the budget has not enough left.
    """
    if (own := reservation.get()) is not None:
        own.grow(size)


def prepared() -> None:
    """Releases the current request's bytes: its prompt is with the engine, as token ids."""
    if (own := reservation.get()) is not None:
        own.release()
