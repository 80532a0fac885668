"""One sequence's part in a dispatch, and how the rows of a dispatch are packed into arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int

from tpjax.cache import NULL_PAGE
from tpjax.runtime.limits import Limits
from tpjax.sampling import SamplingRows
from tpjax.sampling_params import SamplingParams
from tpjax.sharding import Leaf

STOP_IDS = 8  # stop tokens of a row that are checked on the device; the host checks the rest
NO_TOKEN = -1  # output of a row that has ended


@dataclass(frozen=True)
class Row:
    """One sequence's part in a dispatch.

    Attributes:
        slot: index of its last token and history in the device state, 0 to max_slots - 1.
        position: position of the next token to feed.
        pages: its cache pages, in order of position.
        params: sampling parameters.
        seed: seed of its noise.
        remaining: maximum number of tokens it may still output.
        stop_ids: tokens that end it.
        masked_until: before this position, only tokens that :meth:`Runner.set_masks` allows its slot are
            sampled.
        max_length: maximum length of the sequence, prompt and output: some rotary embeddings depend on it.
    """

    slot: int
    position: int
    pages: Sequence[int]
    params: SamplingParams
    seed: int
    remaining: int = 1
    stop_ids: Sequence[int] = ()
    masked_until: int = 0
    max_length: int = 0

    def plain_greedy(self, tokens: int = 1) -> bool:
        """Whether the plain variant of :func:`tpjax.sampling.sample` fits the token after ``tokens`` fed."""
        return self.params.plain_greedy and self.position + tokens >= self.masked_until


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedRows:
    """The rows of a dispatch as arrays; padding rows use the spare slot and the null page."""

    ints: Int[Leaf, "B 4"]  # slot, position, remaining, max_length
    stop_ids: Int[Leaf, "B stop"]
    block_tables: Int[Leaf, "B blocks"]
    sampling: SamplingRows

    @classmethod
    def pack(cls, rows: Sequence[Row], limits: Limits, size: int) -> PackedRows:
        """Packs rows on the host and pads them to ``size`` rows."""
        ints = np.tile(np.array([limits.max_slots, 0, 0, 0], np.int32), (size, 1))
        stop_ids = np.full((size, STOP_IDS), NO_TOKEN, np.int32)
        tables = np.full((size, limits.blocks), NULL_PAGE, np.int32)
        for i, row in enumerate(rows):
            ints[i] = (row.slot, row.position, row.remaining, row.max_length)
            stop_ids[i, : len(row.stop_ids)] = row.stop_ids[:STOP_IDS]
            tables[i, : len(row.pages)] = row.pages
        sampling = SamplingRows.pack(
            [row.params for row in rows], [row.seed for row in rows], [row.masked_until for row in rows], size
        )
        return cls(ints, stop_ids, tables, sampling)  # type: ignore[arg-type]

    @property
    def slots(self) -> Int[Leaf, " B"]:
        """Slot of each row."""
        return self.ints[:, 0]

    @property
    def positions(self) -> Int[Leaf, " B"]:
        """Position of the first token that each row feeds."""
        return self.ints[:, 1]

    @property
    def remaining(self) -> Int[Leaf, " B"]:
        """Maximum number of tokens each row may still output."""
        return self.ints[:, 2]

    @property
    def max_lengths(self) -> Int[Leaf, " B"]:
        """Maximum length of each row's sequence, tokens."""
        return self.ints[:, 3]
