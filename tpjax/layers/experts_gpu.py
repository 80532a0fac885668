"""The grouped product of routed experts as a Pallas kernel for NVIDIA's Hopper GPUs.

The rows of each expert are laid out in tiles of their own. One program multiplies a tile by a block
of columns of its expert's weights: experts without rows are not read, and each of the others once for every
tile it has. A tile has room for twice the rows of an average expert, so that few experts have a second one,
and only about as many of its rows are read and multiplied as there are. XLA's own ``ragged_dot`` is expanded
over all experts there (jaxlib 0.10.2, ahead of time).

A product of the tensor cores has 64 rows, and 8 columns or more. Where experts have few rows, these are the
columns: the product is computed transposed, and 8 rows take the room of 8. So up to 8 tokens are laid out
nowhere: all of them are the tile of each expert that one of them is assigned to. That costs no more, and
three small kernels come before the first product where a layout makes them nine.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from tpjax import mosaic_gpu

KERNEL_NAME = "grouped_product"  # in programs and profiles
_LEAST_ROWS, _MIDDLE_ROWS, _MOST_ROWS = 8, 64, 128  # of a tile
_PARTS = 4  # of a tile of fewer rows than most: so many products are compiled, for as many parts of it
_COLUMNS = 128  # of weights in a program: 64 for each of the warp groups that compute
_WIDE_COLUMNS = 256  # where tiles are whole products: each read of a tile's rows serves more columns
_INNER = 64  # elements multiplied at once: a row of 128 bytes
_MOST_STAGES = 8
_COMPARED = 4096  # assignments up to which each is compared with each, instead of sorting them
_COMPUTING = 2  # warp groups


class Tiles(NamedTuple):
    """How assignments of tokens to experts are laid out in tiles.

    Attributes:
        experts: expert of each tile; their number for tiles without one.
        rows: rows of each tile that there are, the first ones.
        places: place of each assignment among the rows of all tiles.
        sources: token at each place, any where there is none; ``None``: each tile has all tokens.
    """

    experts: Int[Array, " tiles"]
    rows: Int[Array, " tiles"]
    places: Int[Array, "N k"]
    sources: Int[Array, " places"] | None

    def take(self, x: Float[Array, "N D"]) -> Float[Array, "rows D"]:
        """Returns the rows of all tiles, or of the one that is all of them."""
        if self.sources is None:
            return jnp.pad(x, ((0, _LEAST_ROWS - len(x)), (0, 0)))
        return x[self.sources]

    @property
    def size(self) -> int:
        """Rows of a tile."""
        return _LEAST_ROWS if self.sources is None else self.sources.size // self.experts.size


def supports(hidden: int, width: int, dtype: jnp.dtype) -> bool:
    """Returns whether the kernel multiplies by such experts: of 16 bits, in whole rows of its layout."""
    return dtype.itemsize == 2 and hidden % _INNER == 0 and width % _INNER == 0


def tile_rows(assignments: int, experts: int) -> int:
    """Returns the rows of a tile, a power of two: about twice those of an expert.

    Where experts have so many that their products take the time, tiles are whole products, or half of one.
    """
    if assignments / experts > _MIDDLE_ROWS:
        return _MOST_ROWS
    size = _LEAST_ROWS
    while size < min(_MIDDLE_ROWS, 2 * assignments / experts):
        size *= 2
    return size


def _multiplied(size: int) -> tuple[int, ...]:
    """Returns the rows of a tile that products are compiled for, in ascending order."""
    step = size if size >= _MOST_ROWS else max(_LEAST_ROWS, size // _PARTS)
    return tuple(range(step, size + 1, step))


class Work(NamedTuple):
    """What a grouped product does.

    Attributes:
        bytes: read and written in main memory: weights for each tile, rows for each block of columns.
        flops: of the products, those of rows that are none included.
    """

    bytes: int
    flops: int


def work(sizes: Sequence[int], size: int, inner: int, columns: int, itemsize: int = 2) -> Work:
    """Returns what the kernel does.

    Args:
        sizes: rows of each expert.
        size: rows of a tile.
        inner: inputs of an expert.
        columns: its outputs.
        itemsize: bytes of an element.
    """
    block = _columns(size, columns)
    moved = flops = 0
    for rows in sizes:
        for start in range(0, rows, size):
            used = next(one for one in _multiplied(size) if one >= min(rows - start, size))
            moved += inner * columns + used * inner * -(-columns // block) + size * columns
            flops += 2 * used * inner * columns
    return Work(moved * itemsize, flops)


def lay_out(assigned: Int[Array, "N k"], count: int, total: int | None = None) -> Tiles:
    """Returns the tiles of assignments.

    Sums of comparisons take the place of prefix sums and searches: each is one small kernel, those are many.

    Args:
        assigned: experts of each token; ``count``: it is in no tile, and its place means nothing.
        count: experts.
        total: experts on all devices, to which these are the assignments; ``None``: ``count``.
    """
    tokens, per_token = assigned.shape
    if tokens <= _LEAST_ROWS:
        return _all_tokens(assigned, count)
    flat, rows = assigned.reshape(-1), assigned.size
    size = tile_rows(rows, total or count)
    num_tiles = min(count, rows) + rows // size
    every = jnp.arange(count, dtype=jnp.int32)
    sizes = (flat[:, None] == every).sum(axis=0, dtype=jnp.int32)
    tiles_of = -(-sizes // size)
    ends = jnp.where(every[:, None] >= every, tiles_of, 0).sum(axis=1, dtype=jnp.int32)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    experts = (ends <= tile[:, None]).sum(axis=1, dtype=jnp.int32)
    here = jnp.minimum(experts, count - 1)
    left = sizes[here] - (tile - (ends - tiles_of)[here]) * size
    held = jnp.where(experts < count, jnp.clip(left, 0, size), 0)
    present = flat < count
    owner = jnp.minimum(flat, count - 1)
    places = (ends - tiles_of)[owner] * size + _earlier(flat)
    at = jnp.where(present, places, num_tiles * size)
    token = jnp.arange(rows, dtype=jnp.int32) // per_token
    sources = jnp.zeros(num_tiles * size, jnp.int32).at[at].set(token, mode="drop", unique_indices=False)
    return Tiles(experts, held, jnp.where(present, places, 0).reshape(assigned.shape), sources)


def _all_tokens(assigned: Int[Array, "N k"], count: int) -> Tiles:
    """Returns tiles that each have all tokens: for each expert one, or if they are fewer each assignment."""
    tokens = len(assigned)
    flat, present = assigned.reshape(-1), assigned < count
    if flat.size < count:  # of assignments to the same expert the first has the tile
        row = jnp.arange(flat.size, dtype=jnp.int32)
        same = flat[:, None] == flat
        tile = jnp.where(same, row, flat.size).min(axis=1) if tokens > 1 else row
        experts = jnp.where(tile == row, flat, count)
    else:
        every = jnp.arange(count, dtype=jnp.int32)
        tile = flat
        experts = jnp.where((flat[:, None] == every).any(axis=0), every, count)
    held = jnp.where(experts < count, tokens, 0)
    token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    places = jnp.where(present, tile.reshape(assigned.shape) * _LEAST_ROWS + token, 0)
    return Tiles(experts, held, places, None)


def _earlier(assigned: Int[Array, " M"]) -> Int[Array, " M"]:
    """Returns how many earlier assignments are to the same expert."""
    row = jnp.arange(len(assigned), dtype=jnp.int32)
    if len(assigned) <= _COMPARED:
        same = (assigned[:, None] == assigned) & (row < row[:, None])
        return same.sum(axis=1, dtype=jnp.int32)
    order = jnp.argsort(assigned, stable=True)
    in_order = assigned[order]
    starts = jnp.where(in_order != jnp.roll(in_order, 1), row, 0).at[0].set(0)
    earlier = row - jax.lax.cummax(starts)
    return jnp.zeros_like(row).at[order].set(earlier, unique_indices=True)


def grouped_product(
    x: Float[Array, "rows D"],
    weights: Float[Array, "E D F"],
    tiles: Tiles,
    *,
    interpret: Any = None,
) -> Float[Array, "places F"]:
    """Multiplies each tile of rows by the weights of its expert; other rows are undefined.

    Args:
        x: rows, tile after tile, or of one tile that all have.
        weights: of all experts.
        tiles: the tiles.
        interpret: interpret the kernel on a CPU, with these parameters of the installed jax.
    """
    inner, columns = weights.shape[1:]
    size, places = tiles.size, tiles.size * len(tiles.experts)
    transposed, block = size < _MOST_ROWS, _columns(size, columns)
    shape = (columns, places) if transposed else (places, columns)
    stage = (size + block) * _INNER * x.dtype.itemsize
    room = mosaic_gpu.SHARED_BYTES - size * block * x.dtype.itemsize
    stages = min(_MOST_STAGES, -(-inner // _INNER) + 1, room // stage)
    out = plgpu.kernel(
        functools.partial(_kernel, stages, transposed, size),
        out_type=jax.ShapeDtypeStruct(shape, x.dtype),
        # the last axis runs first: a tile's rows, and the neighbours in its expert's rows, are read together
        grid=(len(tiles.experts), -(-columns // block)),
        grid_names=("tile", "column"),
        num_threads=_COMPUTING + 1,
        thread_name="warp_group",
        scratch_types=(
            mosaic_gpu.tiled((stages, size, _INNER), x.dtype),
            mosaic_gpu.tiled((stages, _INNER, block), x.dtype),
            plgpu.SMEM((_COMPUTING, 64, size if transposed else block), x.dtype),
            *[plgpu.Barrier(num_barriers=stages)] * 2,
            plgpu.Barrier(num_arrivals=_COMPUTING, num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=KERNEL_NAME,
        **({} if interpret is None else {"interpret": interpret}),
    )(tiles.experts, tiles.rows, x, weights)
    return out.T if transposed else out


def _columns(size: int, columns: int) -> int:
    """Returns the columns of a program, of which there are so many in all."""
    return _COLUMNS if size < _MOST_ROWS or columns < _WIDE_COLUMNS else _WIDE_COLUMNS


def _kernel(stages: int, transposed: bool, size: int, experts: Any, rows: Any, *refs: Any) -> None:
    """Computes one program, for as many rows as its tile has; ``refs`` as :func:`_product` takes them."""
    held, least = rows[jax.lax.axis_index("tile")], 0
    for used in _multiplied(size):
        product = functools.partial(_product, stages, transposed, used, experts, *refs)
        pl.when((held > least) & (held <= used))(product)
        least = used


def _product(
    stages: int,
    transposed: bool,
    used: int,
    experts: Any,
    x: Any,
    weights: Any,
    out: Any,
    x_smem: Any,
    weights_smem: Any,
    out_smem: Any,
    x_here: Any,
    weights_here: Any,
    done: Any,
) -> None:
    """Multiplies the first rows of a tile: the last warp group copies, the others compute half each."""
    size, inner, block = x_smem.shape[1], x.shape[1], weights_smem.shape[2]
    column, tile = jax.lax.axis_index("column"), jax.lax.axis_index("tile")
    warp_group = jax.lax.axis_index("warp_group")
    expert, steps, first = experts[tile], -(-inner // _INNER), pl.ds(0, used)

    @pl.when(warp_group == _COMPUTING)
    def copy() -> None:
        def copy_block(step: Any, _: None) -> None:
            slot = jax.lax.rem(step, jnp.int32(stages))

            @pl.when(step >= stages)
            def wait() -> None:
                plgpu.barrier_wait(done.at[slot])

            at = pl.ds(step * _INNER, _INNER)
            plgpu.copy_gmem_to_smem(
                weights.at[expert, at, pl.ds(column * block, block)],
                weights_smem.at[slot],
                weights_here.at[slot],
            )
            rows = pl.ds(tile * size if x.shape[0] > size else 0, used)
            plgpu.copy_gmem_to_smem(x.at[rows, at], x_smem.at[slot, first], x_here.at[slot])

        jax.lax.fori_loop(0, steps, copy_block, None)

    @pl.when(warp_group < _COMPUTING)
    def compute() -> None:
        half = pl.ds(warp_group * 64, 64)

        def accumulate_all(product: Any) -> Any:
            def accumulate(step: Any, _: None) -> None:
                slot = jax.lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(weights_here.at[slot])
                plgpu.barrier_wait(x_here.at[slot])
                if transposed:
                    left = mosaic_gpu.transposed(weights_smem.at[slot, :, half])
                    plgpu.wgmma(product, left, mosaic_gpu.transposed(x_smem.at[slot, first]))
                else:
                    plgpu.wgmma(product, x_smem.at[slot, half], weights_smem.at[slot])
                plgpu.wgmma_wait(1)  # the product of the step before has ended

                @pl.when(step > 0)
                def release() -> None:
                    plgpu.barrier_arrive(done.at[jax.lax.rem(step - 1, jnp.int32(stages))])

            jax.lax.fori_loop(0, steps, accumulate, None)
            return product[...]

        shape = (64, used if transposed else block)
        result = pl.run_scoped(accumulate_all, plgpu.ACC(shape, jnp.float32))
        mine = out_smem.at[warp_group]
        if transposed:  # what else of the tile is written means nothing
            mine[:, first] = result.astype(out.dtype)
        else:
            mine[...] = result.astype(out.dtype)
        plgpu.commit_smem()
        if transposed:
            target = out.at[pl.ds(column * block + warp_group * 64, 64), pl.ds(tile * size, size)]
        else:
            target = out.at[pl.ds(tile * size + warp_group * 64, 64), pl.ds(column * block, block)]
        plgpu.copy_smem_to_gmem(mine, target)
        plgpu.wait_smem_to_gmem(0)
