"""One buffer of the cache: pages are read from it, and new vectors are written to it in place.

It is one array or, where the cache is kept in 8 bits, a :class:`~tpjax.cache_quantization.QuantizedBuffer`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from tpjax.cache.token_groups import TokenGroup
from tpjax.cache_quantization import QuantizedBuffer, quantized
from tpjax.sharding import PAGES, REPLICATED

# takes the buffer of one device, whole pages [n, K, page_size, h] or their scales, and which they are
PageWriter: TypeAlias = Callable[[Array, Array, Array], Array]
TokenWriter: TypeAlias = Callable[[Array, Array, Array, Array], Array]  # buffer, tokens, pages, offsets
_LANES = 128  # of a TPU: wider vectors fill its tiles
_TILE_POSITIONS = 32  # of the tallest tile, that of 8 bits
Buffer: TypeAlias = Float[Array, "pages K page_size h"] | QuantizedBuffer

NULL_PAGE = 0


class CacheWriter(NamedTuple):
    """How new keys and values are written to buffers.

    Attributes:
        by_head: each device writes tokens to its own buffer, in rows of one head, and not the partitioner
            whole tokens: see :func:`_write_rows`.
        write_pages: what writes whole pages, if ``by_head``; ``None``: XLA.
        write_scales: what writes the scales of whole pages.
        write_tokens: what writes a token of each row, of vectors narrower than lanes. For them XLA would
            lay out the cache on TPUs with its positions last, and copy it for a kernel that reads it.
    """

    by_head: bool
    write_pages: PageWriter | None = None
    write_scales: PageWriter | None = None
    write_tokens: TokenWriter | None = None


BY_TOKEN = CacheWriter(by_head=False)


def read(buffer: Buffer, pages: Int[Array, " B"]) -> Float[Array, "B K page_size h"]:
    """Reads one page of each sequence."""
    if isinstance(buffer, QuantizedBuffer):
        return buffer.read(pages)
    return buffer.at[pages].get(mode="promise_in_bounds")


def returned(buffer: Buffer, new: Float[Array, "*tokens h"]) -> Float[Array, "*tokens h"]:
    """Returns vectors as they are read once they were written."""
    return buffer.returned(new) if isinstance(buffer, QuantizedBuffer) else new


def write(
    buffer: Buffer,
    new: Float[Array, "B S K h"],
    group: TokenGroup,
    spec: PartitionSpec,
    writer: CacheWriter,
) -> Buffer:
    """Returns the buffer with new vectors stored at their positions.

    Args:
        buffer: of all devices.
        new: the vectors.
        group: where they belong.
        spec: sharding of the buffer.
        writer: how they are written.
    """
    heads, in_mesh = PartitionSpec(None, None, *spec[1:2]), not jax.sharding.get_abstract_mesh().empty
    on_device: Callable[..., Any]
    if isinstance(buffer, QuantizedBuffer):
        on_device = partial(_write_quantized, writer=writer)
        if in_mesh and (spec == PAGES or writer.by_head):
            specs = buffer.specs(spec)
            on_device = jax.shard_map(
                on_device, in_specs=(specs, heads, heads, REPLICATED), out_specs=specs, check_vma=False
            )
        written: QuantizedBuffer = on_device(buffer, *quantized(new, buffer.kind), group)
        return written
    if not writer.by_head:  # the partitioner lets each device write its heads
        return (_write_chunks if group.chunks else _write_tokens)(buffer, new, group)
    if group.chunks:
        on_device = partial(_write_chunks, write_pages=writer.write_pages)
    else:
        on_device = partial(_write_rows, write_tokens=writer.write_tokens)
    if in_mesh:
        on_device = jax.shard_map(
            on_device, in_specs=(spec, heads, REPLICATED), out_specs=spec, check_vma=False
        )
    output: Array = on_device(buffer, new, group)
    return output


def _write_quantized(
    buffer: QuantizedBuffer,
    values: Shaped[Array, "B S K h"],
    scales: Float[Array, "B S K"],
    group: TokenGroup,
    writer: CacheWriter,
) -> QuantizedBuffer:
    """Writes on one device: rows of one head each, since a TPU moves a whole buffer to write wider ones."""
    pages, heads, page_size, _ = buffer.shape
    values = buffer.in_parts(values)
    if group.chunks:
        size = min(values.shape[1], page_size)
        of_values = _write_chunks(buffer.values, values, group, writer.write_pages)
        at, offsets = _place(group, group.positions[:, ::size], page_size)
        new = scales.reshape(*at.shape, size, heads).swapaxes(2, 3)
        if writer.write_scales is not None and size == page_size:
            written = writer.write_scales(buffer.scales, new.reshape(-1, heads, size), at.reshape(-1))
            return buffer.with_arrays(of_values, written)
        rows = buffer.scales.reshape(heads * pages, page_size)
        rows = _write_parts(rows, at[..., None] + pages * jnp.arange(heads), offsets[..., None], new)
        return buffer.with_arrays(of_values, rows.reshape(buffer.scales.shape))
    # of one head a CPU would copy the buffer to write to it in another shape
    if values.shape[2] == 1 and writer.write_tokens is None:
        of_values = _write_tokens(buffer.values, values, group)
    else:
        of_values = _write_rows(buffer.values, values, group, writer.write_tokens)
    at, offsets = _token_places(group, page_size)
    written = buffer.scales
    for i in range(values.shape[1]):
        written = _write_scales(written, scales[:, i], at[:, i], offsets[:, i], writer.write_scales)
    return buffer.with_arrays(of_values, written)


def _write_scales(
    scales: Float[Array, "K pages page_size"],
    new: Float[Array, "B K"],
    at: Int[Array, " B"],
    offsets: Int[Array, " B"],
    write_scales: PageWriter | None,
) -> Float[Array, "K pages page_size"]:
    """Writes the scales of one token of each row: all of a page again, since rows are written in place."""
    heads, pages, page_size = scales.shape
    rows, places = scales.reshape(heads * pages, page_size), at[:, None] + pages * jnp.arange(heads)
    here = jnp.arange(page_size) == offsets[:, None, None]
    # read before: fused with the write, GPUs would copy all scales first
    old = jax.lax.optimization_barrier(rows.at[places].get(mode="promise_in_bounds"))
    content = jnp.where(here, new[:, :, None], old)
    if write_scales is not None:
        return write_scales(scales, content, at)
    return rows.at[places].set(content, mode="promise_in_bounds").reshape(scales.shape)


def _write_parts(
    rows: Float[Array, "R page_size"],
    at: Int[Array, "B n K"],
    offsets: Int[Array, "B n 1"],
    new: Float[Array, "B n K size"],
) -> Float[Array, "R page_size"]:
    """Writes a part of a row, or a whole one, at each place."""
    if new.shape[-1] == rows.shape[-1]:
        return rows.at[at].set(new, mode="promise_in_bounds")
    indices = jnp.stack([at, jnp.broadcast_to(offsets, at.shape)], axis=-1)
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(3,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
    )
    return jax.lax.scatter(rows, indices, new, dimensions, mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def _write_tokens(
    buffer: Shaped[Array, "pages K page_size h"], new: Shaped[Array, "B S K h"], group: TokenGroup
) -> Shaped[Array, "pages K page_size h"]:
    """Writes token by token, wherever each is."""
    pages, offsets = _token_places(group, buffer.shape[2])
    return buffer.at[pages, :, offsets].set(new, mode="promise_in_bounds")


def _write_rows(
    buffer: Shaped[Array, "pages K page_size h"],
    new: Shaped[Array, "B S K h"],
    group: TokenGroup,
    write_tokens: TokenWriter | None = None,
) -> Shaped[Array, "pages K page_size h"]:
    """Writes what :func:`_write_tokens` writes, on one device, in rows of one head.

    Where a token's heads are one row, XLA for TPUs keeps the cache in a layout in which they are, and copies
    it at every layer for a kernel that reads it, or for a walk of another page group's layer.
    """
    num_pages, heads, page_size, width = buffer.shape
    pages, offsets = _token_places(group, page_size)
    if write_tokens is not None and width < _LANES and page_size % _TILE_POSITIONS == 0:
        for i in range(new.shape[1]):  # tokens of a row may lie in one tile
            buffer = write_tokens(buffer, new[:, i], pages[:, i], offsets[:, i])
        return buffer
    rows = buffer.reshape(num_pages * heads, page_size, width)
    places = pages[..., None] * heads + jnp.arange(heads, dtype=pages.dtype)
    rows = rows.at[places, offsets[..., None]].set(new, mode="promise_in_bounds")
    return rows.reshape(buffer.shape)


def _write_chunks(
    buffer: Shaped[Array, "pages K page_size h"],
    new: Shaped[Array, "B S K h"],
    group: TokenGroup,
    write_pages: PageWriter | None = None,
) -> Shaped[Array, "pages K page_size h"]:
    """Writes whole pages, or one part of a page of each chunk: no scatter by token.

    The padding at a chunk's end goes to later positions of its own sequence, which nothing has written yet,
    or to the null page.
    """
    page_size, length = buffer.shape[2], new.shape[1]
    size = min(length, page_size)
    pages, offsets = _place(group, group.positions[:, ::size], page_size)
    parts = new.reshape(-1, size, *new.shape[2:]).swapaxes(1, 2)  # [parts, K, size, h]
    if write_pages is not None and size == page_size:
        return write_pages(buffer, parts, pages.reshape(-1))
    indices = jnp.stack([pages.reshape(-1), offsets.reshape(-1)], axis=1)
    if len(parts) == 1:
        # XLA makes a slice update of a scatter of one part, in another layout than the scatter of tokens
        # beside it: a TPU would copy the whole cache at every step. A second part goes to the null page.
        parts, indices = jnp.repeat(parts, 2, axis=0), jnp.concatenate([indices, jnp.zeros_like(indices)])
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 2)
    )
    return jax.lax.scatter(
        buffer, indices, parts, dimensions, mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    )


def _token_places(group: TokenGroup, page_size: int) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """Returns page and offset of each token; those of padding get the null page."""
    pages, offsets = _place(group, group.positions, page_size)
    return pages if group.lengths is None else jnp.where(group.present, pages, NULL_PAGE), offsets


def _place(
    group: TokenGroup, positions: Int[Array, "B n"], page_size: int
) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
    """Returns page and offset of positions; those past the end of the block table get the null page."""
    blocks, offsets = jnp.divmod(positions, page_size)
    columns = group.block_tables.shape[1]
    if group.cyclic:  # columns of blocks without a page have the null page
        return jnp.take_along_axis(group.block_tables, blocks % columns, axis=1), offsets
    pages = jnp.take_along_axis(group.block_tables, blocks, axis=1, mode="clip")
    return jnp.where(blocks < columns, pages, NULL_PAGE), offsets
