"""Paged attention as a Pallas kernel for NVIDIA's Hopper GPUs: decode rows and prompt chunks.

One program computes a tile of queries of one sequence and KV head over a part of the keys. One of its warp
groups copies blocks of keys and values from the cache's own pages into shared memory, several blocks ahead;
the other multiplies them and accumulates an online softmax (Dao et al. 2022,
https://arxiv.org/abs/2205.14135). Few sequences would leave most of the chip idle: their contexts are split
into parts, whose softmaxes are merged afterwards (flash decoding, Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Nothing else of the cache is read: no block before a
window or after the last key, none of a row of padding.

The tensor cores multiply 64 rows at once, mostly padding in decode: there is no cheaper product, and it takes
less time than its keys and values take to arrive. A block of a cache in 8 bits is copied as it is stored, and
widened, times its scales, from shared memory to shared memory.
"""

from __future__ import annotations

import functools
import math
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from tpjax import mosaic_gpu
from tpjax.activations import soft_capped
from tpjax.attention.backends import KernelShape
from tpjax.attention.reference import visible_keys
from tpjax.cache import Buffer, StoredPages
from tpjax.cache_quantization import SCALE_DTYPE, QuantizedBuffer
from tpjax.sharding import pad_to_multiple

KERNEL_NAME = "paged_attention"  # in programs and profiles
_TINY = float(np.finfo(np.float32).tiny)
_MASKED = -1e30  # finite, so that a block with no visible key gives no NaN
_LOG2_E = math.log2(math.e)  # the hardware has powers of two
_TILE_ROWS = 64  # rows of a product of the tensor cores
_ROW_MULTIPLE = 8  # rows of a copy to shared memory
_BLOCK_KEYS = 64
_WIDTH_MULTIPLE, _MOST_WIDTH = 16, 256  # of heads: a row of a product's layout, and what registers hold
_COLUMNS = 128  # of values in one product, whose sums have to fit into registers beside those so far
_MOST_STAGES = 6
_SCALES_ALIGNED = 4 << 10  # bytes of shared memory at most: its buffers begin at multiples of 1,024
_GOOD_WAVES = 0.85  # share of the processors that work, at which a context is not split further
_RAISED = 64.0  # times the largest scale of float16, 65504 / 127, is still a float16


class Tiling(NamedTuple):
    """What a program computes.

    Attributes:
        rows: rows of a tile, query heads of one KV head times queries.
        tiles: tiles of a sequence.
        keys: keys of a block.
        stages: blocks in shared memory.
        parts: programs among which the keys of a tile are split.
    """

    rows: int
    tiles: int
    keys: int
    stages: int
    parts: int


class _Static(NamedTuple):
    """What is known when the kernel is traced."""

    tiling: Tiling
    per_head: int
    value_dim: int
    scale: float
    window: int | None
    softcap: float | None
    cyclic: bool
    page_size: int
    dtype: jnp.dtype
    quantized: bool
    interpreted: bool

    @property
    def raised(self) -> float:
        """What weights times the scales of values are multiplied by: a product's factors of the dtype.

        Of float16, whose smallest normal number is 6e-5, they would lose digits.
        """
        return _RAISED if self.quantized and self.dtype == jnp.float16 else 1.0


def unsupported(shape: KernelShape) -> str | None:
    """Returns why the kernel does not compute such attention, as the end of a sentence, or ``None``."""
    widths = shape.width, shape.value_dim
    if shape.latent:
        return f"supports values of at most {_MOST_WIDTH} elements, and latent attention's have {widths[1]}"
    multiple = _WIDTH_MULTIPLE if shape.kv_dtype == "auto" else 2 * _WIDTH_MULTIPLE  # of bytes in a copy
    for width in widths:
        if width % multiple or width > _MOST_WIDTH:
            return (
                f"supports heads of a multiple of {multiple} elements, at most {_MOST_WIDTH}, not of {width}"
            )
    if shape.page_size % _BLOCK_KEYS:
        return f"supports pages of a multiple of {_BLOCK_KEYS} positions, not of {shape.page_size}"
    return None


def interpreted() -> Any:
    """Returns what :func:`attend` takes to interpret the kernel on a CPU.

    Raises:
        ConfigError: the installed jax cannot.
    """
    return mosaic_gpu.interpreted("attention='gpu'")


def choose_tiling(
    batch: int,
    heads: int,
    rows: int,
    positions: int,
    widths: tuple[int, int],
    itemsize: int,
    *,
    quantized: bool = False,
) -> Tiling:
    """Chooses block sizes and parts from the shape on one device.

    Args:
        batch: sequences.
        heads: KV heads.
        rows: queries of a sequence times query heads of one KV head.
        positions: that a block table holds.
        widths: of keys and of values.
        itemsize: bytes of an element of queries, and of a cache that is not quantised.
        quantized: whether the cache has 8 bits, and scales.
    """
    tile = min(_TILE_ROWS, pad_to_multiple(rows, _ROW_MULTIPLE))
    tiles = -(-rows // tile)
    fixed, block = _TILE_ROWS * (widths[0] * itemsize + 8), _BLOCK_KEYS * sum(widths) * itemsize
    if quantized:  # one block is widened at a time
        fixed, block = fixed + block + _SCALES_ALIGNED, _BLOCK_KEYS * (sum(widths) + 2 * SCALE_DTYPE.itemsize)
    stages = (mosaic_gpu.SHARED_BYTES - fixed) // block
    programs = batch * heads * tiles
    most = max(1, min(mosaic_gpu.PROCESSORS // programs, positions // (2 * _BLOCK_KEYS)))

    def waves(parts: int) -> float:
        whole = -(-programs * parts // mosaic_gpu.PROCESSORS)
        return programs * parts / (whole * mosaic_gpu.PROCESSORS)

    good = (parts for parts in range(1, most + 1) if waves(parts) >= _GOOD_WAVES)
    return Tiling(
        tile, tiles, _BLOCK_KEYS, min(stages, _MOST_STAGES), next(good, max(range(1, most + 1), key=waves))
    )


def attend(
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
    assert stored.values is not None
    parts = stored.keys, stored.values
    vectors = list(map(_vectors, parts))
    scales = [part.scales for part in parts if isinstance(part, QuantizedBuffer)]
    batch, length, heads, per_head, width = query.shape
    page_size, rows = vectors[0].shape[2], length * per_head
    tiling = choose_tiling(
        batch,
        heads,
        rows,
        tables.shape[1] * page_size,
        (width, value_dim),
        query.dtype.itemsize,
        quantized=bool(scales),
    )
    static = _Static(
        tiling,
        per_head,
        value_dim,
        scale,
        window,
        softcap,
        cyclic,
        page_size,
        query.dtype,
        bool(scales),
        interpret is not None,
    )
    queries = query.swapaxes(1, 2).reshape(batch, heads, rows, width)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, tiling.rows * tiling.tiles - rows), (0, 0)))
    partial = (batch, heads, tiling.parts, tiling.rows * tiling.tiles)
    weighted, highest, total = _call(static, partial, width, vectors[0].dtype, interpret)(
        _programs(static, first, stop, length), tables, queries, *vectors, *scales
    )
    output = _merge(weighted, highest, total, sinks, length)[:, :, :rows] / static.raised
    return output.astype(query.dtype).reshape(batch, heads, length, per_head, value_dim).swapaxes(1, 2)


def _vectors(buffer: Buffer) -> Shaped[Array, "pages K page_size h"]:
    """Returns the array that holds keys or values, without their scales."""
    return buffer.numbers if isinstance(buffer, QuantizedBuffer) else buffer


def _programs(
    static: _Static, first: Int[Array, " B"], stop: Int[Array, " B"], length: int
) -> Int[Array, "B tiles 3"]:
    """Returns for each tile the position of its sequence's first query, first block and end of keys."""
    tiling, per_head = static.tiling, static.per_head
    tile = jnp.arange(tiling.tiles, dtype=jnp.int32)
    offsets = tile * tiling.rows // per_head, ((tile + 1) * tiling.rows - 1) // per_head
    starts = first[:, None] + offsets[0]
    ends = jnp.minimum(first[:, None] + jnp.minimum(offsets[1], length - 1) + 1, stop[:, None])
    ends = jnp.where(starts < stop[:, None], ends, 0)  # of padding alone
    seen = jnp.zeros_like(starts) if static.window is None else jnp.maximum(starts - (static.window - 1), 0)
    return jnp.stack([jnp.broadcast_to(first[:, None], starts.shape), seen // tiling.keys, ends], axis=2)


def _merge(
    weighted: Float[Array, "B K parts R v"],
    highest: Float[Array, "B K parts R"],
    total: Float[Array, "B K parts R"],
    sinks: Float[Array, "K G"] | None,
    length: int,
) -> Float[Array, "B K R v"]:
    """Merges the softmaxes of the parts; scores are powers of two."""
    if weighted.shape[2] == 1 and sinks is None:  # the sums of all keys
        return weighted[:, :, 0] / jnp.maximum(total[:, :, 0], _TINY)[..., None]
    most = highest.max(axis=2)
    if sinks is not None:  # a key with this score and a value of zero
        scores = jnp.tile(sinks * _LOG2_E, (1, length))
        scores = jnp.pad(scores, ((0, 0), (0, most.shape[2] - scores.shape[1])), constant_values=_MASKED)
        most = jnp.maximum(most, scores)
    scales = jnp.exp2(highest - most[:, :, None])
    normaliser = (scales * total).sum(axis=2)
    if sinks is not None:
        normaliser = normaliser + jnp.exp2(scores - most)
    # a row that has seen no key: 0, not a NaN
    return (scales[..., None] * weighted).sum(axis=2) / jnp.maximum(normaliser, _TINY)[..., None]


def _call(static: _Static, partial: tuple[int, int, int, int], width: int, dtype: Any, interpret: Any) -> Any:
    """Returns the kernel as a function of programs, tables, queries, keys, values and their scales."""
    batch, heads, parts, _ = partial
    tiling, widths = static.tiling, (width, static.value_dim)
    widened = [mosaic_gpu.tiled((tiling.keys, each), static.dtype) for each in widths]
    scales = [plgpu.SMEM((tiling.stages, tiling.keys), SCALE_DTYPE)] * 2
    copies = 2 if static.quantized else 1  # of keys, and of their scales
    return plgpu.kernel(
        functools.partial(_kernel, static),
        out_type=(
            jax.ShapeDtypeStruct((*partial, static.value_dim), jnp.float32),
            jax.ShapeDtypeStruct(partial, jnp.float32),
            jax.ShapeDtypeStruct(partial, jnp.float32),
        ),
        grid=(parts * tiling.tiles, heads, batch),
        grid_names=("part", "head", "row"),
        num_threads=2,
        thread_name="warp_group",
        scratch_types=(
            mosaic_gpu.tiled((_TILE_ROWS, width), static.dtype),
            plgpu.RefUnion(  # the sums are written after the last block was read
                tuple(mosaic_gpu.tiled((tiling.stages, tiling.keys, each), dtype) for each in widths),
                plgpu.SMEM((_TILE_ROWS, static.value_dim), jnp.float32),
            ),
            plgpu.SMEM((_TILE_ROWS,), jnp.float32),
            plgpu.SMEM((_TILE_ROWS,), jnp.float32),
            plgpu.Barrier(num_barriers=1),
            *[plgpu.Barrier(num_arrivals=copies, num_barriers=tiling.stages)] * 2,
            *[plgpu.Barrier(num_barriers=tiling.stages)] * 2,
            *[*widened, *scales] * static.quantized,
            *[mosaic_gpu.tiled((_TILE_ROWS, tiling.keys), static.dtype)] * static.interpreted,
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=KERNEL_NAME,
        **({} if interpret is None else {"interpret": interpret}),
    )


def _kernel(
    static: _Static,
    programs: Any,
    tables: Any,
    queries: Any,
    keys: Any,
    values: Any,
    *refs: Any,
) -> None:
    """Computes one program: warp group 1 copies, warp group 0 computes."""
    tiling = static.tiling
    rest, eight_bits = iter(refs), 2 * static.quantized
    scales = list(islice(rest, eight_bits))
    weighted_ref, highest_ref, total_ref, query_smem = islice(rest, 4)
    blocks_or_sums, highest_smem, total_smem = islice(rest, 3)
    query_here, keys_here, values_here, keys_done, values_done = islice(rest, 5)
    widened, scales_smem = list(islice(rest, eight_bits)), list(islice(rest, eight_bits))
    weights_smem = list(rest)
    (keys_smem, values_smem), weighted_smem = blocks_or_sums
    row, head = jax.lax.axis_index("row"), jax.lax.axis_index("head")
    tile = jax.lax.div(jax.lax.axis_index("part"), jnp.int32(tiling.parts))
    part = jax.lax.rem(jax.lax.axis_index("part"), jnp.int32(tiling.parts))
    first, first_block, stop = (programs[row, tile, at] for at in range(3))
    num_blocks = jnp.maximum(pl.cdiv(stop, jnp.int32(tiling.keys)) - first_block, 0)
    each = pl.cdiv(num_blocks, jnp.int32(tiling.parts))
    begin = jnp.minimum(part * each, num_blocks)
    count = jnp.minimum(each, num_blocks - begin)
    begin = begin + first_block
    warp_group = jax.lax.axis_index("warp_group")
    tile_rows = pl.ds(tile * tiling.rows, tiling.rows)

    columns = tuple(
        slice(start, min(start + _COLUMNS, static.value_dim))
        for start in range(0, static.value_dim, _COLUMNS)
    )

    @pl.when(warp_group == 1)
    def copy() -> None:
        per_page = jnp.int32(static.page_size // tiling.keys)

        def copy_block(step: Any, _: None) -> None:
            slot = jax.lax.rem(step, jnp.int32(tiling.stages))
            block = begin + step
            column = jax.lax.div(block, per_page)
            if static.cyclic:
                column = jax.lax.rem(column, jnp.int32(tables.shape[1]))
            page = tables[row, column]
            positions = pl.ds(jax.lax.rem(block, per_page) * tiling.keys, tiling.keys)

            def copy_part(kind: int, source: Any, target: Any, done: Any, here: Any) -> None:
                @pl.when(step >= tiling.stages)
                def wait() -> None:
                    plgpu.barrier_wait(done.at[slot])

                plgpu.copy_gmem_to_smem(source.at[page, head, positions], target.at[slot], here.at[slot])
                if static.quantized:
                    source, target = scales[kind].at[head, page, positions], scales_smem[kind].at[slot]
                    plgpu.copy_gmem_to_smem(source, target, here.at[slot])

            copy_part(0, keys, keys_smem, keys_done, keys_here)
            copy_part(1, values, values_smem, values_done, values_here)

        jax.lax.fori_loop(0, count, copy_block, None)

    @pl.when(warp_group == 0)
    def compute() -> None:
        plgpu.copy_gmem_to_smem(
            queries.at[row, head, tile_rows], query_smem.at[pl.ds(0, tiling.rows)], query_here.at[0]
        )
        plgpu.barrier_wait(query_here.at[0])

        def accumulate(step: Any, running: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            slot = jax.lax.rem(step, jnp.int32(tiling.stages))
            begin_key = (begin + step) * tiling.keys
            weighted, highest, total = running
            plgpu.barrier_wait(keys_here.at[slot])
            block_keys, block_values = keys_smem.at[slot], values_smem.at[slot]
            if static.quantized:
                block_keys, block_values = widened
                key_scale = _of_tokens(scales_smem[0].at[slot], stop - begin_key)
                _widen(keys_smem.at[slot], block_keys, stop - begin_key)
                plgpu.barrier_arrive(keys_done.at[slot])

            scores = pl.run_scoped(
                functools.partial(mosaic_gpu.multiply, query_smem, mosaic_gpu.transposed(block_keys)),
                plgpu.ACC((_TILE_ROWS, tiling.keys), jnp.float32),
            )
            if static.quantized:
                scores = scores * jax.lax.broadcast_in_dim(key_scale, scores.shape, [1])
            else:
                plgpu.barrier_arrive(keys_done.at[slot])
            scores = soft_capped(scores * static.scale, static.softcap) * _LOG2_E
            visible = _visible(static, first, tile, begin_key, stop)
            scores = jnp.where(visible, scores, _MASKED)
            most = jnp.maximum(highest, scores.max(axis=1))
            weights = jnp.exp2(scores - jax.lax.broadcast_in_dim(most, scores.shape, [0]))
            rescale = jnp.exp2(highest - most)
            total = total * rescale + weights.sum(axis=1)
            plgpu.barrier_wait(values_here.at[slot])

            if static.quantized:
                value_scale = _of_tokens(scales_smem[1].at[slot], stop - begin_key)
                _widen(values_smem.at[slot], block_values, stop - begin_key)
                if static.raised != 1:
                    value_scale = value_scale * static.raised
                weights = weights * jax.lax.broadcast_in_dim(value_scale, weights.shape, [1])
                plgpu.barrier_arrive(values_done.at[slot])
            else:

                @pl.when(begin_key + tiling.keys > stop)
                def clear_rest() -> None:
                    # what an earlier user left behind may not be a number, and 0 times that is not 0
                    shape = (tiling.keys, static.value_dim)
                    at = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
                    stored = block_values[...]
                    block_values[...] = jnp.where(at < stop - begin_key, stored, jnp.zeros_like(stored))
                    plgpu.commit_smem()

            weights = weights.astype(static.dtype)
            for ref in weights_smem:  # the interpreter multiplies nothing from registers
                ref[...] = weights
                plgpu.commit_smem()

            def add(columns: slice, sums: Any) -> Any:
                shape = (_TILE_ROWS, columns.stop - columns.start)
                left, right = (*weights_smem, weights)[0], block_values.at[:, columns]
                product = pl.run_scoped(
                    functools.partial(mosaic_gpu.multiply, left, right), plgpu.ACC(shape, jnp.float32)
                )
                return sums * jax.lax.broadcast_in_dim(rescale, shape, [0]) + product

            weighted = tuple(map(add, columns, weighted))
            if not static.quantized:
                plgpu.barrier_arrive(values_done.at[slot])
            return weighted, most, total

        def rows_of(value: float) -> Any:
            return plgpu.layout_cast(
                jnp.full((_TILE_ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1)
            )

        nothing = tuple(
            plgpu.layout_cast(
                jnp.zeros((_TILE_ROWS, some.stop - some.start), jnp.float32), plgpu.Layout.WGMMA
            )
            for some in columns
        )
        weighted, highest, total = jax.lax.fori_loop(
            0, count, accumulate, (nothing, rows_of(_MASKED), rows_of(0.0))
        )
        for some, sums in zip(columns, weighted, strict=True):
            weighted_smem[:, some] = sums
        highest_smem[...] = highest
        total_smem[...] = total
        plgpu.commit_smem()
        here = pl.ds(0, tiling.rows)
        plgpu.copy_smem_to_gmem(weighted_smem.at[here], weighted_ref.at[row, head, part, tile_rows])
        plgpu.copy_smem_to_gmem(highest_smem.at[here], highest_ref.at[row, head, part, tile_rows])
        plgpu.copy_smem_to_gmem(total_smem.at[here], total_ref.at[row, head, part, tile_rows])
        plgpu.wait_smem_to_gmem(0)


def _of_tokens(scales: Any, count: Any) -> Any:
    """Returns the scales of a block's vectors; zeros after the first ones, which no token has.

    Scores and weights are scaled, which are fewer than elements of keys and values.

    Args:
        scales: in shared memory.
        count: vectors that are a token's.
    """
    layout = plgpu.Layout.WGMMA.reduce(0)
    scale = plgpu.layout_cast(scales[...], layout)
    at = plgpu.broadcasted_iota(jnp.int32, scale.shape, 0, layout=layout)
    return jnp.where(at < count, scale, jnp.zeros_like(scale))


def _widen(source: Any, target: Any, count: Any) -> None:
    """Writes vectors of 8 bits in the dtype of the products; of float8, zeros after the first ones.

    What an earlier user left behind there may not be a number, and 0 times that is not 0.

    Args:
        source: vectors in shared memory, int8 or float8.
        target: where they go, in shared memory.
        count: vectors that are a token's.
    """
    keys, width = source.shape
    for start in range(0, width, _COLUMNS):
        some = slice(start, min(start + _COLUMNS, width))
        wide = mosaic_gpu.widen(source[:, some], target.dtype)
        if source.dtype == jnp.float8_e4m3fn:
            shape = (keys, some.stop - some.start)
            at = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
            wide = jnp.where(at < count, wide, jnp.zeros_like(wide))
        target[:, some] = wide
    plgpu.commit_smem()


def _visible(static: _Static, first: Any, tile: Any, begin_key: Any, stop: Any) -> Any:
    """Returns which keys of a block each row of a tile sees."""
    shape = (_TILE_ROWS, static.tiling.keys)

    def index(axis: int) -> Any:
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    rows = index(0) + tile * static.tiling.rows
    positions = first + jax.lax.div(rows, jnp.full_like(rows, static.per_head))
    keys = index(1) + begin_key
    return visible_keys(positions, keys, static.window) & (keys < stop)
