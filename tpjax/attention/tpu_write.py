"""Writes whole pages, and pages of scales, to the cache on TPUs, in place, as a Pallas kernel.

XLA writes them by a scatter. Where a kernel reads the cache after it, XLA moves the whole buffer on chip for
the scatter, and back. Here the buffer is input and output of a kernel that copies pages into it: it stays
where it is.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

KERNEL_NAME = "write_pages"  # in programs and profiles


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
