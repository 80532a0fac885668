"""The page walk: attention over the paged cache in plain XLA, on any platform and in any shape.

It walks the pages in use with an online softmax (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867; Dao et al. 2022, https://arxiv.org/abs/2205.14135): its cost follows the
longest context in the batch, or the window if that is shorter, and no context is gathered in full.

Where a program is compiled for so many blocks of pages in all sequences together (``TokenGroup.walk``), the
walk visits these one after the other, whoever's they are: its iterations are then as many as the compiler
knows, as a GPU wants it, and its cost follows the sum of all contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tpjax.activations import soft_capped
from tpjax.attention.reference import visible_keys
from tpjax.cache import NULL_PAGE, Pages, TokenGroup

_TINY = float(np.finfo(np.float32).tiny)
_MASKED = -1e30  # finite, so that a page with no visible key gives no NaN
_BLOCK_BYTES = 16 << 20  # of keys and values in one iteration, on one device: a TPU has them on chip
_QUERY_BLOCK = 128  # queries of a chunk that share one set of visible keys


class _Scoring(NamedTuple):
    """How query-key products become scores; see :func:`tpjax.attention.paged_attention`."""

    scale: float
    softcap: float | None
    window: int | None


class _OnlineSoftmax(NamedTuple):
    """The running softmax of rows of queries over the keys seen so far.

    Attributes:
        max_score: highest score.
        normaliser: sum of exp(score - max_score).
        weighted_values: sum of exp(score - max_score) times the value.
    """

    max_score: Float[Array, "B K rows 1"]
    normaliser: Float[Array, "B K rows 1"]
    weighted_values: Float[Array, "B K rows v"]

    @classmethod
    def empty(cls, query: Float[Array, "B K rows h"], value_dim: int) -> _OnlineSoftmax:
        """Returns the state before any key."""
        rows = query.shape[:-1]
        return cls(
            jnp.full((*rows, 1), _MASKED, jnp.float32),
            jnp.zeros((*rows, 1), jnp.float32),
            jnp.zeros((*rows, value_dim), jnp.float32),
        )

    def accumulate(
        self,
        query: Float[Array, "B K rows h"],
        keys: Float[Array, " B #K T h"],
        values: Float[Array, " B #K T v"],
        visible: Bool[Array, "B 1 rows T"],
        scoring: _Scoring,
    ) -> _OnlineSoftmax:
        """Accumulates a block of keys and values into the running softmax.

        A row that has seen no key and sees none in this block accumulates weights of 1. They vanish with the
        first key it sees, and every row sees its own key in the end.
        """
        scores = jnp.einsum("bkqh,bkth->bkqt", query, keys, preferred_element_type=jnp.float32)
        scores = jnp.where(visible, soft_capped(scores * scoring.scale, scoring.softcap), _MASKED)
        max_score = jnp.maximum(self.max_score, scores.max(axis=-1, keepdims=True))
        weights, rescale = jnp.exp(scores - max_score), jnp.exp(self.max_score - max_score)
        weighted = jnp.einsum(
            "bkqt,bkth->bkqh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        return _OnlineSoftmax(
            max_score,
            self.normaliser * rescale + weights.sum(axis=-1, keepdims=True),
            self.weighted_values * rescale + weighted,
        )

    def merge(self, others: _OnlineSoftmax, rows: Int[Array, " P"]) -> _OnlineSoftmax:
        """Accumulates softmaxes over other keys.

        Args:
            others: of P sequences, of which several may be the same.
            rows: which of these sequences each is of; B: of none.
        """
        batch = len(self.max_score)
        own = (jnp.arange(batch)[:, None] == rows)[..., None, None, None]  # [B, P, 1, 1, 1]
        highest = jnp.where(own, others.max_score, _MASKED).max(axis=1)
        max_score = jnp.maximum(self.max_score, highest)
        rescale = jnp.exp(self.max_score - max_score)
        weights = jnp.exp(others.max_score - max_score[jnp.minimum(rows, batch - 1)])

        def added(sums: Float[Array, "B K rows x"], more: Float[Array, "P K rows x"]) -> Array:
            return sums * rescale + jnp.where(own, more * weights, 0).sum(axis=1)

        return _OnlineSoftmax(
            max_score,
            added(self.normaliser, others.normaliser),
            added(self.weighted_values, others.weighted_values),
        )

    def accumulate_sink(self, scores: Float[Array, "1 K rows 1"]) -> _OnlineSoftmax:
        """Accumulates one more key, with these scores and a value of zero."""
        max_score = jnp.maximum(self.max_score, scores)
        rescale = jnp.exp(self.max_score - max_score)
        return _OnlineSoftmax(
            max_score,
            self.normaliser * rescale + jnp.exp(scores - max_score),
            self.weighted_values * rescale,
        )


def paged_attention(
    query: Float[Array, "B S K G h"],
    key: Float[Array, "B S #K h"],
    value: Float[Array, "B S #K v"],
    cache: Pages,
    group: TokenGroup,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Float[Array, "K G"] | None = None,
    pages: Sequence[int] = (1,),
) -> Float[Array, "B S K G v"]:
    """Walks the pages of all sequences, up to ``pages[0]`` of each in one iteration.

    Where ``pages`` has more numbers, pages that fill no iteration of one are walked by the next.

    Single tokens, and the few of a row that verifies drafts, walk all their pages, their own keys' included.
    A chunk walks the pages before it, then attends to its own keys directly, a block of queries at a time and
    only to the keys that the block can see: half the work of treating the chunk's keys as pages.

    See :func:`tpjax.attention.paged_attention` for the arguments.
    """
    batch, length, heads, per_head, head_dim = query.shape
    scoring = _Scoring(scale, softcap, window)
    rows = query.swapaxes(1, 2).reshape(batch, heads, length * per_head, head_dim)
    row_positions = jnp.repeat(group.positions, per_head, axis=1)[:, None, :, None]
    # other tokens find their own keys in the cache; a chunk takes its own keys from its arguments
    stop = group.positions[:, 0]
    if not group.chunks:
        stop = stop + (length if group.lengths is None else group.lengths)
    if group.lengths is not None:  # padding walks nothing
        stop = jnp.where(group.lengths > 0, stop, 0)
    devices = max(1, jax.sharding.get_abstract_mesh().size) if key.shape[2] == heads else 1
    key_bytes = (head_dim + value.shape[-1]) * key.shape[2] // devices * key.dtype.itemsize
    page_bytes, columns = cache.page_size * key_bytes, group.block_tables.shape[1]
    walked = rows, row_positions, cache, group, stop, scoring, value.shape[-1]
    if group.walk and window is None:
        several = min(pages[0], columns)
        softmax = _walk_blocks(*walked, several, pages_at_once(group.walk, several * page_bytes, group.walk))
    else:
        softmax = _walk(*walked, [pages_at_once(most, batch * page_bytes, columns) for most in pages])
    if group.chunks:
        keys, values = key.swapaxes(1, 2), value.swapaxes(1, 2)
        softmax = _attend_to_chunk(softmax, rows, row_positions, keys, values, group.positions, scoring)
    if sinks is not None:
        softmax = softmax.accumulate_sink(jnp.tile(sinks, (1, length))[None, :, :, None])
    # padding has seen no key: 0, not a NaN
    normaliser = jnp.maximum(softmax.normaliser, _TINY)
    output = (softmax.weighted_values / normaliser).astype(query.dtype)
    return output.reshape(batch, heads, length, per_head, -1).swapaxes(1, 2)


def pages_at_once(most: int, page_bytes: int, columns: int) -> int:
    """Returns the pages of each sequence that one iteration of the walk reads.

    Args:
        most: at most so many.
        page_bytes: keys and values on one device in one page of every sequence.
        columns: of the block tables.
    """
    return min(most, max(1, _BLOCK_BYTES // page_bytes), columns)


def _attend_to_chunk(
    softmax: _OnlineSoftmax,
    rows: Float[Array, "B K rows h"],
    row_positions: Int[Array, "B 1 rows 1"],
    keys: Float[Array, " B #K S h"],
    values: Float[Array, " B #K S v"],
    positions: Int[Array, "B S"],
    scoring: _Scoring,
) -> _OnlineSoftmax:
    """Attends to the keys of the chunk itself, one block of queries at a time."""
    length, window = keys.shape[2], scoring.window
    per_head = rows.shape[2] // length
    blocks = []
    for start in range(0, length, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, length)
        seen = slice(0 if window is None else max(0, start - window + 1), end)
        block = slice(start * per_head, end * per_head)
        visible = visible_keys(row_positions[:, :, block], positions[:, None, None, seen], window)
        part = _OnlineSoftmax(*(x[:, :, block] for x in softmax))
        blocks.append(
            part.accumulate(rows[:, :, block], keys[:, :, seen], values[:, :, seen], visible, scoring)
        )
    return _OnlineSoftmax(*(jnp.concatenate(parts, axis=2) for parts in zip(*blocks, strict=True)))


def _walk(
    rows: Float[Array, "B K rows h"],
    row_positions: Int[Array, "B 1 rows 1"],
    cache: Pages,
    group: TokenGroup,
    stop: Int[Array, " B"],
    scoring: _Scoring,
    value_dim: int,
    pages: Sequence[int],
) -> _OnlineSoftmax:
    """Attends to the cached positions before ``stop``, each sequence from the first page in its window.

    Sequences walk side by side, each over its own pages: one iteration reads ``pages[0]`` of every sequence,
    or what the next of ``pages`` says if fewer are left.
    Sequences at distant positions do not lengthen each other's walk, and padding, which stops at 0, has none.
    """
    page_size, window = cache.page_size, scoring.window
    most = group.block_tables.shape[1]
    if window is not None:
        most = min(most, -(-(window + group.shape[1] - 2) // page_size) + 1)
    first, tables = jnp.zeros_like(stop), group.block_tables
    if window is not None:
        first = jnp.maximum(group.positions[:, 0] - (window - 1), 0) // page_size
        in_window = first[:, None] + jnp.arange(tables.shape[1])
        if group.cyclic:
            in_window %= tables.shape[1]
        # past its end a row's table repeats the last page, in which the row sees nothing
        tables = jnp.take_along_axis(tables, in_window, axis=1, mode="clip")
    tables = _padded(tables, pages[-1])

    def accumulate(
        several: int, start: int | Array, trip: Int[Array, ""], softmax: _OnlineSoftmax
    ) -> _OnlineSoftmax:
        column = start + trip * several
        keys, values = _read(cache, jax.lax.dynamic_slice_in_dim(tables, column, several, axis=1))
        places = column * page_size + jnp.arange(several * page_size)
        positions = (first[:, None] * page_size + places)[:, None, None, :]
        # a sequence that starts earlier than the batch's latest must not see its own chunk here already
        written = positions < stop[:, None, None, None]
        visible = visible_keys(row_positions, positions, window) & written
        # what an earlier user left behind may not be a number, and 0 times that is not 0
        values = jnp.where(written.swapaxes(2, 3), values, 0)
        return softmax.accumulate(rows, keys, values, visible, scoring)

    walked: int | Array = most  # whatever is there, in iterations that the compiler counts
    if group.walk:
        pages = pages[-1:]
    else:
        walked = jnp.max(-(-stop // page_size) - first, initial=0)
    softmax = _OnlineSoftmax.empty(rows, value_dim)
    start: int | Array = 0
    with jax.named_scope("page_walk"):
        for several in sorted(set(pages), reverse=True):
            trips = -(-(walked - start) // several) if several == pages[-1] else (walked - start) // several
            softmax = jax.lax.fori_loop(0, trips, partial(accumulate, several, start), softmax)
            start += trips * several
    return softmax


def _walk_blocks(
    rows: Float[Array, "B K rows h"],
    row_positions: Int[Array, "B 1 rows 1"],
    cache: Pages,
    group: TokenGroup,
    stop: Int[Array, " B"],
    scoring: _Scoring,
    value_dim: int,
    several: int,
    at_once: int,
) -> _OnlineSoftmax:
    """Attends to the cached positions before ``stop`` in ``group.walk`` blocks of ``several`` pages.

    The blocks of all sequences form one list, a sequence's after those of the one before it; what is left of
    the list reads the null page. An iteration visits ``at_once`` of them, its softmaxes join those of their
    sequences.
    """
    size, batch = several * cache.page_size, len(stop)
    tables = _padded(group.block_tables, several).reshape(batch, -1, several)
    counts = -(-stop // size)
    ends = jnp.cumsum(counts)
    trips = -(-group.walk // at_once)
    number = jnp.arange(trips * at_once)
    of_row = (ends <= number[:, None]).sum(axis=1, dtype=jnp.int32)  # batch: no sequence's
    near = jnp.minimum(of_row, batch - 1)
    blocks = number - (ends - counts)[near]
    pages = tables[near, jnp.minimum(blocks, tables.shape[1] - 1)]
    pages = jnp.where((of_row < batch)[:, None], pages, NULL_PAGE)

    def accumulate(softmax: _OnlineSoftmax, some: tuple[Array, ...]) -> tuple[_OnlineSoftmax, None]:
        pages, of_row, blocks = some
        row = jnp.minimum(of_row, batch - 1)
        keys, values = _read(cache, pages)
        positions = (blocks[:, None] * size + jnp.arange(size))[:, None, None, :]
        end = jnp.where(of_row < batch, stop[row], 0)
        written = positions < end[:, None, None, None]
        visible = visible_keys(row_positions[row], positions, None) & written
        values = jnp.where(written.swapaxes(2, 3), values, 0)  # as in _walk
        part = _OnlineSoftmax.empty(rows[row], value_dim)
        return softmax.merge(part.accumulate(rows[row], keys, values, visible, scoring), of_row), None

    each = [x.reshape(trips, at_once, *x.shape[1:]) for x in (pages, of_row, blocks)]
    with jax.named_scope("page_walk"):
        return jax.lax.scan(accumulate, _OnlineSoftmax.empty(rows, value_dim), tuple(each))[0]


def _read(cache: Pages, pages: Int[Array, "B several"]) -> tuple[Array, Array]:
    """Returns keys and values of a block of pages of each sequence, [B, K, T, h]."""
    batch, several = pages.shape
    parts = cache.read(pages.reshape(-1))
    if several == 1:
        return parts
    by_row = (part.reshape(batch, several, *part.shape[1:]).swapaxes(1, 2) for part in parts)
    keys, values = (part.reshape(batch, part.shape[1], -1, part.shape[-1]) for part in by_row)
    return keys, values


def _padded(tables: Int[Array, "B blocks"], several: int) -> Int[Array, "B columns"]:
    """Returns block tables padded with the null page to a multiple of ``several``."""
    return jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % several)), constant_values=NULL_PAGE)
