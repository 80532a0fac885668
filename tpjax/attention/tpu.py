"""Paged attention as a Pallas kernel for TPUs: decode rows and prompt chunks, from the cache's own pages.

One program of the grid computes a block of queries of one sequence and some of its KV heads. It copies the
pages that these queries see into on-chip memory, a block of pages at a time, and accumulates an online
softmax (Dao et al. 2022, https://arxiv.org/abs/2205.14135). While one block is computed the next is copied,
the first block of the next program included. Nothing else of the cache is read: no page before a window or
after the last key, none of a row of padding. Of a cache in 8 bits a block is widened on the chip, and the
parts of its vectors are joined there; scores and weights are multiplied by the scales of keys and values in
place of these.

The scalars that say which pages a program reads are computed outside, by XLA, once for all layers alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from tpjax.activations import soft_capped
from tpjax.attention.reference import visible_keys
from tpjax.attention.tpu_write import in_main_memory
from tpjax.cache import Buffer, StoredPages
from tpjax.cache_quantization import QuantizedBuffer, element_bytes, vector_bytes
from tpjax.config import KVDtype
from tpjax.sharding import pad_to_multiple

KERNEL_NAME = "paged_attention"  # in programs and profiles
LANES = 128  # a row of a buffer is padded to a multiple of this many elements
_TINY = float(np.finfo(np.float32).tiny)
_MASKED = -1e30  # finite, so that a block with no visible key gives no NaN
_BLOCK_BYTES = 1 << 20  # of keys and values in one of the two buffers: large beside the start of a copy
_BLOCK_KEYS = 1024  # and no more: the part of a block beyond a context is computed in vain
_SCORES = 1 << 18  # of one head and block of keys, float32
_ROWS_PER_HEAD, _ROWS = 512, 2048  # queries times group size, in one program; in float32 half as many
_TABLE_ENTRIES = 1 << 16  # of block tables, in the memory for scalars; larger ones take several calls
_MOST_HEADS = 8  # KV heads of a program, whose code is unrolled


class Tiling(NamedTuple):
    """What a program of the grid computes.

    Attributes:
        heads: KV heads.
        queries: queries of one sequence.
        pages: pages of one block.
    """

    heads: int
    queries: int
    pages: int


class _Static(NamedTuple):
    """What is known when the kernel is traced."""

    tiling: Tiling
    query_blocks: int
    head_blocks: int
    width: int
    value_dim: int
    scale: float
    window: int | None
    softcap: float | None
    cyclic: bool


class _Programs(NamedTuple):
    """Which keys each item reads: a block of queries of one sequence; int32.

    Attributes:
        tables: page of each block of positions of each sequence.
        start: position of the first query.
        stop: position after the last key; 0: nothing is read.
        first_page: block of positions of the first key.
        following: the first item from this one on that reads anything, or the number of items; one entry more
            than there are items.
    """

    tables: Int[Array, "B blocks"]
    start: Int[Array, " items"]
    stop: Int[Array, " items"]
    first_page: Int[Array, " items"]
    following: Int[Array, " items1"]


def interpreted() -> Any:
    """Returns what :func:`attend` takes to interpret the kernel on a CPU."""
    return True


def choose_tiling(
    heads: int, per_head: int, length: int, page_size: int, widths: tuple[int, int], itemsize: int
) -> Tiling:
    """Chooses block sizes from the shape on one device, within a budget of on-chip memory.

    Args:
        heads: KV heads.
        per_head: query heads of each.
        length: queries of a sequence.
        page_size: positions per page.
        widths: of keys and of values; 0: the beginning of each key is the value.
        itemsize: bytes of an element of a block: :func:`_block_itemsize`.
    """
    key_bytes = sum(pad_to_multiple(width, LANES) for width in widths) * itemsize
    page_bytes = key_bytes * page_size
    most_heads = min(_MOST_HEADS, max(1, _BLOCK_BYTES // page_bytes))
    together = max(one for one in _divisors(heads) if one <= most_heads)
    most_rows = min(_ROWS_PER_HEAD, (_ROWS if itemsize < 4 else _ROWS // 2) // together)
    # a block of part of the rows is whole tiles
    whole = [one for one in _divisors(length) if one == length or one * per_head % 16 == 0]
    queries = max((one for one in whole if one * per_head <= most_rows), default=whole[0])
    keys = min(_BLOCK_KEYS, _SCORES // (queries * per_head), _BLOCK_BYTES // (together * key_bytes))
    return Tiling(together, queries, max(1, keys // page_size))


class Work(NamedTuple):
    """What a call of the kernel does on one device.

    Attributes:
        bytes: read and written in main memory.
        flops: of its products, those of masked keys included.
        activations: of the bytes, those of queries and outputs: the compiler may keep these on chip.
    """

    bytes: int
    flops: int
    activations: int = 0


def work(
    batch: int,
    length: int,
    context: int,
    *,
    window: int | None,
    heads: int,
    per_head: int,
    page_size: int,
    widths: tuple[int, int],
    value_dim: int,
    dtype: jnp.dtype,
    kv_dtype: KVDtype = "auto",
) -> Work:
    """Returns what the kernel does in one layer.

    Args:
        batch: sequences.
        length: queries of each.
        context: tokens in the cache of each, its own included.
        window: keys that a query sees.
        heads: KV heads.
        per_head: query heads of each.
        page_size: positions per page.
        widths: as :func:`choose_tiling` takes it.
        value_dim: width of the values.
        dtype: dtype of queries and outputs.
        kv_dtype: what keys and values are kept in; ``auto``: ``dtype``.
    """
    itemsize = _block_itemsize(element_bytes(kv_dtype, dtype), dtype)
    tiling = choose_tiling(heads, per_head, length, page_size, widths, itemsize)
    pages = blocks = 0
    for start in range(context - length, context, tiling.queries):
        first = 0 if window is None else max(start - window + 1, 0) // page_size
        seen = -(-(start + tiling.queries) // page_size) - first
        pages += seen
        blocks += -(-seen // tiling.pages)
    key_bytes = sum(vector_bytes(pad_to_multiple(width, LANES), kv_dtype, dtype) for width in widths if width)
    width = pad_to_multiple(widths[0], LANES) + pad_to_multiple(value_dim, LANES)
    activations = length * per_head * width * jnp.dtype(dtype).itemsize
    moved = pages * page_size * key_bytes + activations
    products = tiling.queries * per_head * blocks * tiling.pages * page_size * width
    return Work(batch * heads * moved, 2 * batch * heads * products, batch * heads * activations)


def _block_itemsize(stored: int, dtype: jnp.dtype) -> int:
    """Returns the bytes of an element of a block on the chip.

    Blocks of 8 bits are widened there. In float32, four times as large, those of all heads of a program take
    more memory than it has.

    Args:
        stored: bytes of an element of the cache.
        dtype: of queries.
    """
    return max(stored, 4) if jnp.dtype(dtype).itemsize == 4 else stored


def _divisors(number: int) -> list[int]:
    """Returns the divisors of a number, smallest first."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def attend(
    query: Float[Array, "B S K G h"],
    stored: StoredPages,
    sinks: Float[Array, "K G"] | None,
    tables: Int[Array, "B blocks"],
    first: Int[Array, " B"],
    stop: Int[Array, " B"],
    **options: Any,
) -> Float[Array, "B S K G v"]:
    """Computes attention on one device, of as many sequences at a time as block tables fit."""
    rows = max(1, _TABLE_ENTRIES // pad_to_multiple(tables.shape[1], LANES))
    parts = [slice(row, row + rows) for row in range(0, len(tables), rows)]
    outputs = [
        _attend(query[part], stored, sinks, tables[part], first[part], stop[part], **options)
        for part in parts
    ]
    return jnp.concatenate(outputs) if len(outputs) > 1 else outputs[0]


def _attend(
    query: Float[Array, "B S K G h"],
    stored: StoredPages,
    sinks: Float[Array, "K G"] | None,
    tables: Int[Array, "B blocks"],
    first: Int[Array, " B"],
    stop: Int[Array, " B"],
    *,
    value_dim: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    cyclic: bool,
    interpret: Any,
) -> Float[Array, "B S K G v"]:
    """Computes attention on one device."""
    shape, keys = query.shape, stored.keys
    batch, length, heads = shape[:3]
    if heads != keys.shape[1]:  # all heads read the same keys: they form one group
        heads = keys.shape[1]
        query = query.reshape(batch, length, heads, -1, shape[-1])
        sinks = None if sinks is None else sinks.reshape(heads, -1)
    per_head, page_size = query.shape[3], keys.shape[2]
    widths = keys.shape[3], 0 if stored.values is None else value_dim
    itemsize = _block_itemsize(_vectors(keys).dtype.itemsize, query.dtype)
    tiling = choose_tiling(heads, per_head, length, page_size, widths, itemsize)
    query_blocks, head_blocks = length // tiling.queries, heads // tiling.heads
    static = _Static(tiling, query_blocks, head_blocks, widths[0], value_dim, scale, window, softcap, cyclic)
    rows, block_rows = length * per_head, tiling.queries * per_head

    def of_program(width: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, tiling.heads, block_rows, width), lambda row, queries, heads, *_: (row, heads, queries, 0)
        )

    # of a block of queries the rows of one query head follow each other: as they lie in what is multiplied
    # before and after, each query head in its own lanes, so that no vector is turned around
    split = query.reshape(batch, query_blocks, tiling.queries, heads, per_head, shape[-1])
    inputs = [split.transpose(0, 3, 1, 4, 2, 5).reshape(batch, heads, rows, shape[-1])]
    in_specs = [of_program(shape[-1])]
    if tiling.queries > 1:  # which query each row is of: a TPU divides no vectors of integers
        inputs.append(jnp.arange(block_rows, dtype=jnp.int32)[:, None] % tiling.queries)
        in_specs.append(pl.BlockSpec((block_rows, 1), lambda *_: (0, 0)))
    if sinks is not None:
        inputs.append(jnp.repeat(sinks.astype(jnp.float32), tiling.queries, axis=1)[:, :, None])
        in_specs.append(
            pl.BlockSpec((tiling.heads, block_rows, 1), lambda row, queries, heads, *_: (heads, 0, 0))
        )
    parts = [buffer for buffer in stored if buffer is not None]
    vectors = list(map(_vectors, parts))
    scales = [part.scales for part in parts if isinstance(part, QuantizedBuffer)]
    buffers = vectors + scales
    block_keys = tiling.pages * page_size
    blocks = [
        pltpu.VMEM((2, one.shape[1] // head_blocks, block_keys, one.shape[3]), one.dtype) for one in vectors
    ]
    blocks += [pltpu.VMEM((2, tiling.heads, 1, block_keys), one.dtype) for one in scales]
    running = [pltpu.VMEM((tiling.heads, block_rows, width), jnp.float32) for width in (1, 1, value_dim)]
    output = pl.pallas_call(
        functools.partial(
            _kernel,
            static,
            len(inputs),
            len(vectors),
            len(scales),
            tiling.queries > 1,
            sinks is not None,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(_Programs._fields),
            grid=(batch, query_blocks, head_blocks),
            in_specs=[*in_specs, *[pl.BlockSpec(memory_space=pltpu.HBM)] * len(buffers)],
            out_specs=of_program(value_dim),
            scratch_shapes=[
                *blocks,
                *running,
                pltpu.SemaphoreType.DMA((2, len(buffers))),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, rows, value_dim), query.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3),
        interpret=interpret or False,
        name=KERNEL_NAME,
    )(
        *_programs(static, tables, first, stop, length, page_size),
        *inputs,
        *(in_main_memory(buffer, interpret) for buffer in buffers),
    )
    return (
        output.reshape(batch, heads, query_blocks, per_head, tiling.queries, value_dim)
        .transpose(0, 2, 4, 1, 3, 5)
        .reshape(*shape[:4], value_dim)
    )


def _vectors(buffer: Buffer) -> Shaped[Array, "pages KP page_size part"]:
    """Returns the array that holds keys or values, whatever their scales. A float's part is the whole."""
    return buffer.values if isinstance(buffer, QuantizedBuffer) else buffer


def _programs(
    static: _Static,
    tables: Int[Array, "B blocks"],
    first: Int[Array, " B"],
    stop: Int[Array, " B"],
    length: int,
    page_size: int,
) -> _Programs:
    """Returns which keys each item reads."""
    starts = first[:, None] + jnp.arange(0, length, static.tiling.queries, dtype=jnp.int32)
    ends = jnp.minimum(starts + static.tiling.queries, stop[:, None])
    ends = jnp.where(starts < stop[:, None], ends, 0)  # of padding alone
    seen = jnp.zeros_like(starts) if static.window is None else jnp.maximum(starts - (static.window - 1), 0)
    items = starts.size
    flat = ends.reshape(-1)
    following = jax.lax.cummin(jnp.where(flat > 0, jnp.arange(items, dtype=jnp.int32), items), reverse=True)
    following = jnp.append(following, jnp.int32(items))
    return _Programs(tables, starts.reshape(-1), flat, seen.reshape(-1) // page_size, following)


def _kernel(
    static: _Static,
    num_inputs: int,
    num_vectors: int,
    num_scales: int,
    several: bool,
    has_sinks: bool,
    *refs: Any,
) -> None:
    """Computes one program of the grid."""
    num_buffers = num_vectors + num_scales
    programs = _Programs(*refs[: len(_Programs._fields)])
    refs = refs[len(_Programs._fields) :]
    inputs, refs = refs[:num_inputs], refs[num_inputs:]
    stored, refs = refs[:num_buffers], refs[num_buffers:]
    output_ref, refs = refs[0], refs[1:]
    blocks_ref, refs = refs[:num_buffers], refs[num_buffers:]
    max_ref, sum_ref, values_ref, semaphores, slot_ref = refs
    query_ref = inputs[0]
    offsets_ref = inputs[1] if several else None
    sinks_ref = inputs[-1] if has_sinks else None
    tiling = static.tiling
    page_size = stored[0].shape[2]
    block_keys = tiling.pages * page_size
    items = pl.num_programs(0) * static.query_blocks
    item = pl.program_id(0) * static.query_blocks + pl.program_id(1)
    head_block = pl.program_id(2)
    stop, first_page = programs.stop[item], programs.first_page[item]
    num_blocks = pl.cdiv(jnp.maximum(pl.cdiv(stop, page_size) - first_page, 0), tiling.pages)

    def copies(item: Any, head_block: Any, block: Any, slot: Any, act: Callable[[Any], None]) -> None:
        """Starts, or waits for, the copies of a block's pages, but for those beyond the last key."""
        row = jax.lax.div(item, static.query_blocks)
        for page in range(tiling.pages):
            column = programs.first_page[item] + block * tiling.pages + page

            @pl.when(column * page_size < programs.stop[item])
            def copy_page(page: int = page, column: Any = column) -> None:
                if static.cyclic:
                    column = jax.lax.rem(column, programs.tables.shape[1])
                at = programs.tables[row, column]
                positions = pl.ds(page * page_size, page_size)
                for kind, (buffer, block_ref) in enumerate(zip(stored, blocks_ref, strict=True)):
                    count = block_ref.shape[1]  # of heads, or of their parts
                    heads = pl.ds(head_block * count, count)
                    if kind < num_vectors:
                        source = buffer.at[at] if static.head_blocks == 1 else buffer.at[at, heads]
                        target = block_ref.at[slot, :, positions]
                    else:
                        source, target = buffer.at[heads, at], block_ref.at[slot, :, 0, positions]
                    act(pltpu.make_async_copy(source, target, semaphores.at[slot, kind]))

    def joined(block_ref: Any, slot: Any, head: int) -> Array:
        """Returns a head's keys or values in the queries' dtype, their parts side by side."""
        parts = block_ref.shape[1] // tiling.heads
        wide = [_widened(block_ref[slot, head * parts + part], query_ref.dtype) for part in range(parts)]
        return wide[0] if parts == 1 else jnp.concatenate(wide, axis=1)

    def start(item: Any, head_block: Any, block: Any, slot: Any) -> None:
        copies(item, head_block, block, slot, lambda copy: copy.start())

    @pl.when((item == 0) & (head_block == 0))
    def begin_grid() -> None:
        slot_ref[0] = 0
        first_item = programs.following[0]

        @pl.when(first_item < items)
        def start_first() -> None:
            start(first_item, 0, 0, 0)

    if sinks_ref is None:
        max_ref[...] = jnp.full_like(max_ref, _MASKED)
        sum_ref[...] = jnp.zeros_like(sum_ref)
    else:  # a key with this score and a value of zero
        max_ref[...] = sinks_ref[...]
        sum_ref[...] = jnp.ones_like(sum_ref)
    values_ref[...] = jnp.zeros_like(values_ref)
    before = slot_ref[0]  # blocks of all programs so far, modulo 2

    def body(block: Any, _: None) -> None:
        slot = jax.lax.rem(before + block, 2)
        last = block + 1 == num_blocks

        @pl.when(jnp.logical_not(last))
        def start_block() -> None:
            start(item, head_block, block + 1, 1 - slot)

        more_heads = head_block + 1 < static.head_blocks
        next_item = jnp.where(more_heads, item, programs.following[item + 1])

        @pl.when(last & (next_item < items))
        def start_program() -> None:
            start(next_item, jnp.where(more_heads, head_block + 1, 0), 0, 1 - slot)

        copies(item, head_block, block, slot, lambda copy: copy.wait())
        begin = (first_page + block * tiling.pages) * page_size

        @pl.when(begin + block_keys > stop)
        def clear_rest() -> None:
            # what an earlier user left behind may not be a number, and 0 times that is not 0
            ref = blocks_ref[-1]  # of values, or of their scales: bytes are all numbers
            axis = 1 if num_scales else 0
            beyond = begin + jax.lax.broadcasted_iota(jnp.int32, ref.shape[2:], axis) >= stop
            for head in range(tiling.heads):
                ref[slot, head] = jnp.where(beyond, jnp.zeros_like(ref[slot, head]), ref[slot, head])

        shape = (query_ref.shape[2], block_keys)
        key_positions = begin + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        positions = programs.start[item]
        if offsets_ref is not None:
            positions = positions + offsets_ref[...]
        visible = visible_keys(positions, key_positions, static.window) & (key_positions < stop)
        for head in range(tiling.heads):
            keys = values = joined(blocks_ref[0], slot, head)
            if num_vectors > 1:
                values = joined(blocks_ref[1], slot, head)
            scales = None
            if num_scales:
                scales = blocks_ref[num_vectors][slot, head], blocks_ref[-1][slot, head]
            _accumulate(
                static,
                query_ref[0, head],
                keys[:, : static.width],
                values[:, : static.value_dim],
                scales,
                visible,
                max_ref.at[head],
                sum_ref.at[head],
                values_ref.at[head],
            )

    jax.lax.fori_loop(0, num_blocks, body, None)
    slot_ref[0] = jax.lax.rem(before + num_blocks, 2)
    for head in range(tiling.heads):  # a row that has seen no key: 0, not a NaN
        total = jnp.maximum(sum_ref[head], _TINY)
        output_ref[0, head] = (values_ref[head] / total).astype(output_ref.dtype)


def _accumulate(
    static: _Static,
    query: Float[Array, "rows h"],
    keys: Float[Array, "T h"],
    values: Float[Array, "T v"],
    scales: tuple[Float[Array, "1 T"], Float[Array, "1 T"]] | None,
    visible: Any,
    max_ref: Any,
    sum_ref: Any,
    values_ref: Any,
) -> None:
    """Accumulates a block of keys and values into the running softmax of one KV head."""
    scores = _product(query, keys, 1) * static.scale
    if scales is not None:
        scores = scores * scales[0]
    scores = jnp.where(visible, soft_capped(scores, static.softcap), _MASKED)
    max_score = jnp.maximum(max_ref[...], scores.max(axis=-1, keepdims=True))
    weights, rescale = jnp.exp(scores - max_score), jnp.exp(max_ref[...] - max_score)
    max_ref[...] = max_score
    sum_ref[...] = sum_ref[...] * rescale + weights.sum(axis=-1, keepdims=True)
    if scales is not None:
        weights = weights * scales[1]
    values_ref[...] = values_ref[...] * rescale + _product(weights.astype(values.dtype), values, 0)


def _widened(x: Shaped[Array, "T h"], dtype: jnp.dtype) -> Float[Array, "T h"]:
    """Widens int8, or the bytes of float8 e4m3, to a dtype that a TPU multiplies: exact."""
    if x.dtype == jnp.int8:
        return x.astype(jnp.float32).astype(dtype)
    if x.dtype != jnp.uint8:
        return x
    # by hand: not every TPU has float8, and a byte that is not a number would make sums of zeros of it none
    bits = x.astype(jnp.int32)
    magnitude = bits & 0x7F
    normal = jax.lax.bitcast_convert_type((magnitude << 20) + (120 << 23), jnp.float32)
    wide = jnp.where(magnitude < 8, magnitude.astype(jnp.float32) * 2.0**-9, normal)
    return jnp.where(bits > magnitude, -wide, wide).astype(dtype)


def _product(left: Array, right: Array, axis: int) -> Array:
    """Multiplies matrices over the last axis of the left one; float32 at full precision."""
    full = left.dtype == jnp.float32
    return jax.lax.dot_general(
        left,
        right,
        (((1,), (axis,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if full else None,
    )
