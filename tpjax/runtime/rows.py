"""One sequence's part in a dispatch, and how the rows of a dispatch are packed into arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import jax
import numpy as np
from jaxtyping import Int

from tpjax.cache import NULL_PAGE
from tpjax.runtime.limits import ChunkShape, Limits
from tpjax.sampling import NO_HISTORY, SamplingRows
from tpjax.sampling_params import SamplingParams
from tpjax.sharding import Leaf

STOP_IDS = 8  # stop tokens of a row that are checked on the device; the host checks the rest
NO_TOKEN = -1  # output of a row that has ended


@dataclass(eq=False)
class Row:
    """One sequence's part in a dispatch.

    Whoever dispatches a sequence again and again keeps its row, and changes only its position, ``remaining``
    and ``masked_until``; its pages may only get longer, and those before a window be given back. What stays
    the same is turned into arrays once.

    Attributes:
        slot: index of its last token and mask in the device state, 0 to max_slots - 1.
        position: position of the next token to feed.
        pages: its cache pages in each page group, in order of position. Of a group with a window those
            before it are not read.
        params: sampling parameters.
        seed: seed of its noise.
        remaining: maximum number of tokens it may still output.
        stop_ids: tokens that end it.
        masked_until: before this position, only tokens that :meth:`Runner.set_masks` allows its slot are
            sampled.
        max_length: maximum length of the sequence, prompt and output: some rotary embeddings depend on it.
        history_row: index of its history in the device state, 0 to history_rows - 1; read if its parameters
            need one.
    """

    slot: int
    position: int
    pages: Sequence[Sequence[int]]
    params: SamplingParams
    seed: int
    remaining: int = 1
    stop_ids: Sequence[int] = ()
    masked_until: int = 0
    max_length: int = 0
    history_row: int = NO_HISTORY
    _table: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32), init=False, repr=False)
    _known: list[tuple[int, int]] = field(default_factory=list, init=False, repr=False)

    @cached_property
    def sampling(self) -> tuple[np.ndarray, np.ndarray]:
        """Its sampling parameters, as :meth:`SamplingRows.one` returns them."""
        return SamplingRows.one(self.params, self.seed, self.history_row)

    @cached_property
    def stop_array(self) -> np.ndarray:
        """Its first stop tokens, int32 [STOP_IDS]."""
        array = np.full(STOP_IDS, NO_TOKEN, np.int32)
        array[: len(self.stop_ids)] = self.stop_ids[:STOP_IDS]
        return array

    def block_tables(self, limits: Limits) -> np.ndarray:
        """Returns its pages in each page group one after the other, int32, padded with the null page."""
        columns = limits.table_columns
        if not self._known:
            self._table = np.full(sum(columns), NULL_PAGE, np.int32)
            self._known = [(0, 0)] * len(columns)
        at = 0
        for group, (pages, window) in enumerate(zip(self.pages, limits.windows, strict=False)):
            first, known = self._known[group]
            if window is None:
                if known != len(pages):
                    self._table[at + known : at + len(pages)] = pages[known:]
                    self._known[group] = 0, len(pages)
            else:
                start = max(0, self.position - window + 1) // limits.page_size
                stop = min(len(pages), start + columns[group])
                if (first, known) != (start, stop):
                    table = self._table[at : at + columns[group]]
                    table[:] = NULL_PAGE
                    table[np.arange(start, stop) % columns[group]] = pages[start:stop]
                    self._known[group] = start, stop
            at += columns[group]
        return self._table

    def plain_greedy(self, tokens: int = 1) -> bool:
        """Whether the plain variant of :func:`tpjax.sampling.sample` fits the token after ``tokens`` fed."""
        return self.params.plain_greedy and self.position + tokens >= self.masked_until


@dataclass(frozen=True)
class Chunk:
    """The part of a prompt that a dispatch runs.

    Attributes:
        row: its ``position`` is that of the first token. The token after the last is sampled with its
            parameters, and kept as its slot's last one.
        token_ids: tokens; at least one. A chunk begins where its shape allows one: see ``ChunkShape``.
        targets: the tokens one later, whose log-probabilities are wanted; that of a prompt's last token is
            not known. ``None``: none are wanted.
    """

    row: Row
    token_ids: Sequence[int]
    targets: Sequence[int] | None = None

    @property
    def span(self) -> tuple[int, int]:
        """Position of its first token, and one past its last."""
        return self.row.position, self.row.position + len(self.token_ids)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedRows:
    """The rows of a dispatch as arrays; padding rows use the spare slot and the null page."""

    ints: Int[Leaf, "B 4"]  # slot, position, remaining, max_length
    stop_ids: Int[Leaf, "B stop"]
    tables: Int[Leaf, "B columns"]  # the block tables of each page group side by side
    sampling: SamplingRows
    columns: tuple[int, ...] = field(metadata={"static": True})

    @classmethod
    def pack(cls, rows: Sequence[Row], limits: Limits, size: int) -> PackedRows:
        """Packs rows on the host and pads them to ``size`` rows."""
        count = len(rows)
        ints = np.empty((size, 4), np.int32)
        stop_ids = np.empty((size, STOP_IDS), np.int32)
        tables = np.empty((size, sum(limits.table_columns)), np.int32)
        if count:
            ints[:count] = [(row.slot, row.position, row.remaining, row.max_length) for row in rows]
            np.concatenate([row.stop_array for row in rows], out=stop_ids[:count].reshape(-1))
            np.concatenate([row.block_tables(limits) for row in rows], out=tables[:count].reshape(-1))
        ints[count:], stop_ids[count:], tables[count:] = (limits.max_slots, 0, 0, 0), NO_TOKEN, NULL_PAGE
        ones, until = [row.sampling for row in rows], [row.masked_until for row in rows]
        sampling = SamplingRows.stack(ones, until, size)
        return cls(ints, stop_ids, tables, sampling, limits.table_columns)  # type: ignore[arg-type]

    def __getitem__(self, part: slice) -> PackedRows:
        """Returns some of the rows."""
        rows: PackedRows = jax.tree.map(lambda array: array[part], self)
        return rows

    def block_tables(self, group: int) -> Int[Leaf, "B blocks"]:
        """Returns the block tables of a page group."""
        start = sum(self.columns[:group])
        return self.tables[:, start : start + self.columns[group]]

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedStep:
    """The decode rows and prompt chunks of a step as arrays.

    Attributes:
        rows: the decode rows, then a row for each of the C chunks. Of a prompt that takes several chunks only
            the last one samples for its slot.
        token_ids: tokens of the chunks, padded.
        lengths: tokens of each chunk that are not padding.
    """

    rows: PackedRows
    token_ids: Int[Leaf, "C S"]
    lengths: Int[Leaf, " C"]

    @classmethod
    def pack(
        cls, decode: Sequence[Row], chunks: Sequence[Chunk], limits: Limits, batch: int, shape: ChunkShape
    ) -> tuple[PackedStep, list[int]]:
        """Packs a step on the host.

        Args:
            decode: at most ``batch`` rows.
            chunks: prompts, which take at most as many chunks as ``shape`` has.
            limits: sizes.
            batch: decode rows, padding included.
            shape: the chunks.

        Returns:
            The arrays, and for each prompt the index of its first chunk.
        """
        rows = [*decode, *[_padding(limits)] * (batch - len(decode))]
        tokens, lengths = np.zeros(shape, np.int32), np.zeros(shape.rows, np.int32)
        first_chunks = []
        for chunk in chunks:
            first_chunks.append(len(rows) - batch)
            for start in range(0, len(chunk.token_ids), shape.length):
                part = chunk.token_ids[start : start + shape.length]
                index = len(rows) - batch
                tokens[index, : len(part)], lengths[index] = part, len(part)
                rows.append(_part(chunk, start, start + len(part), limits))
        packed = PackedRows.pack(rows, limits, batch + shape.rows)
        return cls(packed, tokens, lengths), first_chunks  # type: ignore[arg-type]

    @property
    def batch(self) -> int:
        """Decode rows, padding included."""
        return self.rows.ints.shape[0] - self.token_ids.shape[0]


_GREEDY = SamplingParams(temperature=0)


def _padding(limits: Limits) -> Row:
    return Row(limits.max_slots, 0, (), _GREEDY, 0, remaining=0)


def _part(chunk: Chunk, start: int, stop: int, limits: Limits) -> Row:
    """Returns the row of one chunk of a prompt; only its last chunk samples for its slot."""
    row, position = chunk.row, chunk.row.position + start
    if stop == len(chunk.token_ids):
        return replace(row, position=position)
    return replace(row, slot=limits.max_slots, position=position, params=_GREEDY, masked_until=0, stop_ids=())
