"""Admission budget: bytes of text in preparation (received, rendered, tokenised) over all requests."""

from __future__ import annotations

import time
from contextvars import ContextVar

from tpjax.server.error_responses import ApiError
from tpjax.server.pace import Pace

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
        self._holders = 0
        self._pace = Pace()  # of bytes

    def take(self, size: int, *, first: bool) -> None:
        """Reserves bytes for a request, its first ones or more."""
        if not self.used:
            self._pace.begin(time.perf_counter())
        self.used += size
        self._holders += first

    def give_back(self, size: int) -> None:
        """Releases all bytes of a request."""
        self.used -= size
        self._holders -= 1
        self._pace.end(size, time.perf_counter())

    def retry_after_s(self, excess: int) -> int:
        """Returns seconds until so many more bytes will have been released."""
        coming = self.used // max(1, self._holders)
        return self._pace.retry_after_s(excess, max(1, coming), time.perf_counter())


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
            ApiError: 413, it is more than the budget ever has; 429, the budget has not enough left. The
                reservation stays as it was.
        """
        if not self._open or size <= max(self._reserved, FREE_BYTES):
            return
        budget = self._budget
        if size > budget.limit:
            raise ApiError(413, f"a text of {size} bytes is over {budget.limit}", code="request_too_large")
        others = budget.used - self._reserved
        if (excess := others + size - budget.limit) > 0:
            raise ApiError(
                429,
                f"a text of {size} bytes has to wait: {others} bytes are being prepared, "
                f"and {budget.limit} may be",
                code="text_budget_full",
                headers={"Retry-After": str(budget.retry_after_s(excess))},
            )
        budget.take(size - self._reserved, first=not self._reserved)
        self._reserved = self.most = size

    def release(self) -> None:
        """Releases all bytes; later growth reserves nothing."""
        if self._reserved:
            self._budget.give_back(self._reserved)
        self._reserved, self._open = 0, False


# Reservation of the request that is being served.
reservation: ContextVar[Reservation | None] = ContextVar("reservation", default=None)


def reserve(size: int) -> None:
    """Reserves ``size`` bytes in all for the current request.

    Raises:
        ApiError: 413 or 429, as :meth:`Reservation.grow`.
    """
    if (own := reservation.get()) is not None:
        own.grow(size)


def prepared() -> None:
    """Releases the current request's bytes: its prompt is with the engine, as token ids."""
    if (own := reservation.get()) is not None:
        own.release()
