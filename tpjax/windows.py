"""Sliding windows, and the cache pages that they keep. Plain Python, no jax."""

from __future__ import annotations

from collections.abc import Sequence

Windows = tuple[int | None, ...]  # of each page group, the keys that its layers see; None: all
ONE_GROUP: Windows = (None,)  # all layers share block tables, and no page is given back early


def pages_held(tokens: int, windows: Sequence[int | None], page_size: int, step_tokens: int) -> int:
    """Returns the pages that a sequence holds at once, at most, in all page groups.

    Args:
        tokens: length of the sequence.
        windows: window of each page group.
        page_size: positions per page.
        step_tokens: tokens of the sequence that a step runs, at most.
    """
    blocks = -(-tokens // page_size)
    most = (
        blocks if window is None else -(-(window - 1) // page_size) - (-step_tokens // page_size) + 1
        for window in windows
    )
    return sum(min(blocks, count) for count in most)
