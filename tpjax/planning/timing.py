"""Times calls that take turns: a machine whose speed drifts drifts under all of them alike.

The benchmarks of ``scripts/``, ``tpjax bench`` and ``tpjax plan --measure`` share it. Plain Python.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)


def seconds(call: Callable[[], Any]) -> float:
    """Returns the seconds a call takes. One that returns ``jax.Array`` has to wait for it itself."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(turns: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, list[float]]:
    """Calls every turn once to load and compile, then all of them round by round.

    Args:
        turns: functions that do some work and return a figure, by name.
        rounds: number of rounds whose figures count.

    Returns:
        The figures of each turn, one a round.
    """
    for turn in turns.values():
        turn()
    figures: dict[Key, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            figures[name].append(turn())
    return figures


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Returns the median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
