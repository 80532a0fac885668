"""When to try again: ``Retry-After`` of a response that refuses what there is no room for now."""

from __future__ import annotations

import math
from collections import deque

_RECENT_S, _ENDS = 60.0, 64  # of so many seconds, and so many that ended, the pace is taken
MAX_RETRY_AFTER_S = 60  # the official client heeds no longer one


class Pace:
    """The pace at which what is limited becomes free again: places of a queue, or bytes.

    Times are seconds of one clock.
    """

    def __init__(self) -> None:
        self._ends: deque[tuple[float, int]] = deque(maxlen=_ENDS)  # when, and how much became free
        self._busy_since = 0.0

    def begin(self, now: float) -> None:
        """Notes that something is taken where nothing was: until now, nothing could become free."""
        self._busy_since = now

    def end(self, amount: int, now: float) -> None:
        """Notes that so much has become free."""
        self._ends.append((now, amount))

    def retry_after_s(self, excess: int, coming: int, now: float) -> int:
        """Returns when to try again: seconds until so much more will have become free, 1 to 60.

        Args:
            excess: what has to become free before there is room.
            coming: what becomes free next, at most a guess: nothing may have so far.
            now: the time.
        """
        oldest = self._ends[0][0] if len(self._ends) >= _ENDS else 0.0
        start = max(self._busy_since, oldest, now - _RECENT_S)
        freed = coming + sum(amount for end, amount in self._ends if end > start)
        return at_most_a_minute(excess * (now - start) / freed)


def at_most_a_minute(seconds: float) -> int:
    """Returns whole seconds that a client heeds, 1 to 60."""
    return min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER_S)
