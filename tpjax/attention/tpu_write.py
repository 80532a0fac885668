"""Writes whole pages, pages of scales, and tokens to the cache on TPUs, in place, as Pallas kernels.

XLA writes them by a scatter. Where a kernel reads the cache after it, XLA moves the whole buffer on chip for
the scatter, and back. Here the buffer is input and output of a kernel that copies pages into it: it stays
where it is.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

KERNEL_NAME = "write_pages"  # in programs and profiles
_WINDOW_BYTES = 32  # of an element's column in a tile, which is read and written as a whole
_BLOCK_BYTES = 1 << 21  # of the windows of the tokens that are written at once
_LANES = 128


def write_pages(
    buffer: Shaped[Array, "pages K page_size h"],
    content: Shaped[Array, "n K page_size h"],
    pages: Int[Array, " n"],
    *,
    interpret: Any = None,
) -> Shaped[Array, "pages K page_size h"]:
    """Returns the buffer, of one device, with whole pages written.

    Args:
        buffer: keys or values.
        content: of each page that is written.
        pages: which pages; the null page may occur several times.
        interpret: interpret the kernel on a CPU.
    """
    return _write(buffer, content, pages, (), interpret)


def write_scales(
    buffer: Float[Array, "K pages page_size"],
    content: Float[Array, "n K page_size"],
    pages: Int[Array, " n"],
    *,
    interpret: Any = None,
) -> Float[Array, "K pages page_size"]:
    """Returns the scales of a buffer in 8 bits with those of whole pages written; see :func:`write_pages`."""
    return _write(buffer, content, pages, (slice(None),), interpret)


def window_rows(dtype: jnp.dtype) -> int:
    """Returns the positions that are read and written with a token, of which a page has to be a multiple."""
    return _WINDOW_BYTES // jnp.dtype(dtype).itemsize


def write_tokens(
    buffer: Shaped[Array, "pages K page_size h"],
    content: Shaped[Array, "n K h"],
    pages: Int[Array, " n"],
    offsets: Int[Array, " n"],
    *,
    interpret: Any = None,
) -> Shaped[Array, "pages K page_size h"]:
    """Returns the buffer, of one device, with a token of each row written.

    A tile of positions is the least that a copy moves: the token's is read, changed and written.

    Args:
        buffer: keys or values.
        content: the tokens; of two in one tile, but in the null page, either is lost.
        pages: page of each; the null page may occur several times.
        offsets: position in the page.
        interpret: interpret the kernel on a CPU.
    """
    count, heads, width = content.shape
    rows = window_rows(buffer.dtype)
    of_token = heads * rows * -(-width // _LANES) * _LANES * buffer.dtype.itemsize
    block = max(some for some in range(1, count + 1) if count % some == 0 and some * of_token <= _BLOCK_BYTES)
    return pl.pallas_call(
        functools.partial(_token_kernel, rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(count // block,),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.HBM),
                pl.BlockSpec((block, heads, width), lambda at, *_: (at, 0, 0)),
            ],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[
                pltpu.VMEM((block, heads, rows, width), buffer.dtype),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(buffer.shape, buffer.dtype),
        input_output_aliases={2: 0},  # the scalars come first
        interpret=interpret or False,
        name=KERNEL_NAME,
    )(pages, offsets, in_main_memory(buffer, interpret), content)


def _write(
    buffer: Array, content: Array, pages: Int[Array, " n"], before: tuple[slice, ...], interpret: Any
) -> Array:
    """Writes each item of the content to the page that it belongs to, which is the axis after ``before``."""
    return pl.pallas_call(
        functools.partial(_kernel, before),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct(buffer.shape, buffer.dtype),
        input_output_aliases={1: 0},  # the scalars come first
        interpret=interpret or False,
        name=KERNEL_NAME,
    )(pages, in_main_memory(buffer, interpret), content)


def in_main_memory(buffer: Array, interpret: Any) -> Array:
    """Pins an operand of a kernel to main memory: XLA would move one that fits on chip, and back."""
    if interpret:
        return buffer
    pinned: Array = pltpu.with_memory_space_constraint(buffer, pltpu.HBM)
    return pinned


def _kernel(
    before: tuple[slice, ...], pages: Any, buffer_ref: Any, content_ref: Any, output_ref: Any, semaphore: Any
) -> None:
    """Starts all copies, then waits for them."""
    del buffer_ref  # is the output

    def copy(at: Any) -> Any:
        return pltpu.make_async_copy(content_ref.at[at], output_ref.at[(*before, pages[at])], semaphore)

    def start(at: Any, _: None) -> None:
        copy(at).start()

    def wait(at: Any, _: None) -> None:
        copy(at).wait()

    jax.lax.fori_loop(0, content_ref.shape[0], start, None)
    jax.lax.fori_loop(0, content_ref.shape[0], wait, None)


def _token_kernel(
    rows: int,
    pages: Any,
    offsets: Any,
    buffer_ref: Any,
    content_ref: Any,
    output_ref: Any,
    windows: Any,
    semaphore: Any,
) -> None:
    """Reads the tile of each token of a block, changes it, and writes it."""
    del buffer_ref  # is the output
    block, first = len(windows), pl.program_id(0) * len(windows)

    def tile(at: Any) -> Any:
        start = pl.multiple_of(jax.lax.div(offsets[first + at], jnp.int32(rows)) * rows, rows)
        return output_ref.at[pages[first + at], :, pl.ds(start, rows)]

    def read(at: Any) -> Any:
        return pltpu.make_async_copy(tile(at), windows.at[at], semaphore)

    def written(at: Any) -> Any:
        return pltpu.make_async_copy(windows.at[at], tile(at), semaphore)

    def for_each(do: Any) -> None:
        jax.lax.fori_loop(0, block, lambda at, _: do(at), None)

    def change(at: Any) -> None:
        wide = jnp.int32 if jnp.issubdtype(windows.dtype, jnp.integer) else jnp.float32
        here = jax.lax.rem(offsets[first + at], jnp.int32(rows))
        old, new = windows[at].astype(wide), content_ref[at].astype(wide)[:, None]
        row = jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
        windows[at] = jnp.where(row == here, new, old).astype(windows.dtype)

    for_each(lambda at: read(at).start())
    for_each(lambda at: read(at).wait())
    for_each(change)
    for_each(lambda at: written(at).start())
    for_each(lambda at: written(at).wait())
