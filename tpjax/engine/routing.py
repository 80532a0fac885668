"""Which replica a request goes to. Plain Python, no jax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class ReplicaLoad(NamedTuple):
    """What a request would meet at a replica.

    Attributes:
        free_slot: whether a slot is free, so that it could start at once.
        queued: work before it, in pages: those of prompts that have not run, and one for each request.
        cached: full pages of its prompt that the replica's prefix cache has.
    """

    free_slot: bool
    queued: int
    cached: int


def choose(loads: Sequence[ReplicaLoad]) -> int:
    """Returns the index of the replica that a request goes to; the first of several that are as good.

    One with a free slot, if there is any; of those the one with the least work to do before the request's
    first token: what is queued, less the pages that need not be computed because they are cached. So a cached
    prefix of eight pages attracts requests until its replica has eight requests, or eight pages of prompts,
    more than another; then another one computes it, too.

    Args:
        loads: what the request would meet at each replica; at least one.
    """
    return min((not load.free_slot, load.queued - load.cached, i) for i, load in enumerate(loads))[2]
