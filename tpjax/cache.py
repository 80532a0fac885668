"""The paged key-value cache (Kwon et al. 2023, https://arxiv.org/abs/2309.06180).

Each layer keeps one buffer of keys and one of values, [pages, K, page_size, h], sharded along K. With latent
attention it keeps one replicated buffer of latents, [pages, 1, page_size, r]: all heads read all of it. Block
tables say which page holds which positions of which sequence; they are arguments of every call, not state.
Page 0 is never assigned to a sequence: padding rows and padding positions write to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as MemoryLayout
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from tpjax.config import ModelConfig
from tpjax.sharding import PAGES, REPLICATED, head_plan, pad_to_multiple

_LANES = {"tpu": 128}  # rows of a buffer are padded to a multiple of this many elements
NULL_PAGE = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchMetadata:
    """Block tables and positions of a batch.

    Attributes:
        block_tables: page of each block of positions of each sequence.
        positions: position of each token. The positions of a chunk are consecutive. A chunk shorter than a
            page does not cross a page boundary; a longer one begins at a boundary.
        max_length: longest length each sequence may reach, tokens. The frequencies of some rotary embeddings
            depend on it.
    """

    block_tables: Int[Array, "B blocks"]
    positions: Int[Array, "B S"]
    max_length: Int[Array, " B"] | None = None


@runtime_checkable  # tests check types at run time
class Pages(Protocol):
    """Keys and values of cached positions, read page by page."""

    @property
    def page_size(self) -> int:
        """Positions per page."""
        ...

    def read(
        self, pages: Int[Array, " B"]
    ) -> tuple[Float[Array, "B K page_size h"], Float[Array, "B K page_size v"]]:
        """Reads the keys and values of one page of each sequence. K may be 1: all heads share them."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """The keys and values of one layer."""

    keys: Float[Array, "pages K page_size h"]
    values: Float[Array, "pages K page_size h"]

    @property
    def page_size(self) -> int:
        """Positions per page."""
        return self.keys.shape[2]

    def write(
        self, keys: Float[Array, "B S K h"], values: Float[Array, "B S K h"], metadata: BatchMetadata
    ) -> LayerCache:
        """Returns the cache with new keys and values stored at their positions."""
        return LayerCache(_write(self.keys, keys, metadata), _write(self.values, values, metadata))

    def read(
        self, pages: Int[Array, " B"]
    ) -> tuple[Float[Array, "B K page_size h"], Float[Array, "B K page_size h"]]:
        """Reads the keys and values of one page of each sequence."""
        return _read(self.keys, pages), _read(self.values, pages)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LatentCache:
    """The latents of one layer, each followed by the rotary part of its key."""

    latents: Float[Array, "pages 1 page_size r"]

    @property
    def page_size(self) -> int:
        """Positions per page."""
        return self.latents.shape[2]

    def write(self, latents: Float[Array, "B S 1 r"], metadata: BatchMetadata) -> LatentCache:
        """Returns the cache with new latents stored at their positions."""
        return LatentCache(_write(self.latents, latents, metadata))

    def read(self, pages: Int[Array, " B"]) -> Float[Array, "B 1 page_size r"]:
        """Reads the latents of one page of each sequence."""
        return _read(self.latents, pages)


PagedKVCache = tuple[LayerCache | LatentCache, ...]


@dataclass(frozen=True)
class CacheLayout:
    """The buffers of each layer, all of the same shape.

    Attributes:
        layer: class that holds them.
        count: buffers per layer.
        shape: shape of a buffer.
        spec: sharding of a buffer.
    """

    layer: type[LayerCache] | type[LatentCache]
    count: int
    shape: tuple[int, int, int, int]
    spec: PartitionSpec


def cache_layout(config: ModelConfig, tp: int, num_pages: int, page_size: int) -> CacheLayout:
    """Returns the layout of the cache of each layer."""
    if config.attention.latent is not None:
        width = config.attention.latent.kv_lora_rank + config.rotated_dim
        return CacheLayout(LatentCache, 1, (num_pages, 1, page_size, width), REPLICATED)
    heads = head_plan(config, tp).num_head_slots
    return CacheLayout(LayerCache, 2, (num_pages, heads, page_size, config.attention.head_dim), PAGES)


def page_bytes_per_device(
    config: ModelConfig, tp: int, page_size: int, dtype: jnp.dtype, platform: str = "cpu"
) -> int:
    """Returns the bytes that one page takes on each device of a platform, all layers together."""
    layout = cache_layout(config, tp, 1, page_size)
    devices = tp if layout.spec == PAGES else 1
    *rows, width = layout.shape
    size = math.prod(rows) // devices * pad_to_multiple(width, _LANES.get(platform, 1))
    return config.num_layers * layout.count * size * jnp.dtype(dtype).itemsize


def allocate(
    config: ModelConfig, mesh: Mesh, *, num_pages: int, page_size: int, dtype: jnp.dtype
) -> PagedKVCache:
    """Allocates a cache of zeros; each device allocates its own shard only."""
    layout = cache_layout(config, mesh.size, num_pages, page_size)
    zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=_format(mesh, layout))
    return tuple(
        layout.layer(*(zeros(layout.shape, dtype) for _ in range(layout.count)))
        for _ in range(config.num_layers)
    )


def abstract(
    config: ModelConfig, mesh: Mesh, *, num_pages: int, page_size: int, dtype: jnp.dtype
) -> PagedKVCache:
    """Returns the shapes, dtypes and shardings of :func:`allocate`, without the memory."""
    layout = cache_layout(config, mesh.size, num_pages, page_size)
    buffer: Any = jax.ShapeDtypeStruct(layout.shape, dtype, sharding=_format(mesh, layout))
    return tuple(layout.layer(*[buffer] * layout.count) for _ in range(config.num_layers))


def _format(mesh: Mesh, layout: CacheLayout) -> Format | NamedSharding:
    """Returns the sharding of a buffer and, on a TPU, its memory layout.

    A TPU would store rows of fewer than 128 elements with positions last, and every step would transpose the
    whole cache to write to it.
    """
    sharding = NamedSharding(mesh, layout.spec)
    if mesh.devices.flat[0].platform not in _LANES:
        return sharding
    return Format(MemoryLayout(tuple(range(len(layout.shape)))), sharding)


def _read(
    buffer: Float[Array, "pages K page_size h"], pages: Int[Array, " B"]
) -> Float[Array, "B K page_size h"]:
    return buffer.at[pages].get(mode="promise_in_bounds")


def _write(
    buffer: Float[Array, "pages K page_size h"], new: Float[Array, "B S K h"], metadata: BatchMetadata
) -> Float[Array, "pages K page_size h"]:
    return (_write_token if new.shape[1] == 1 else _write_chunk)(buffer, new, metadata)


def _write_token(
    pages: Float[Array, "pages K page_size h"], new: Float[Array, "B 1 K h"], metadata: BatchMetadata
) -> Float[Array, "pages K page_size h"]:
    block, offset = jnp.divmod(metadata.positions[:, 0], pages.shape[2])
    page = jnp.take_along_axis(metadata.block_tables, block[:, None], axis=1, mode="clip")[:, 0]
    return pages.at[page, :, offset].set(new[:, 0], mode="promise_in_bounds")


def _write_chunk(
    pages: Float[Array, "pages K page_size h"], new: Float[Array, "B S K h"], metadata: BatchMetadata
) -> Float[Array, "pages K page_size h"]:
    # a chunk is a part of one page, or whole pages: one slice update each, no scatter by token
    batch, length = new.shape[:2]
    page_size = pages.shape[2]
    new = new.swapaxes(1, 2)
    first, offset = jnp.divmod(metadata.positions[:, 0], page_size)
    tables, blocks = metadata.block_tables, metadata.block_tables.shape[1]
    for row in range(batch):
        for block in range(0, length, page_size):
            index = first[row] + block // page_size
            # positions past the end of the block table are padding: they go to the null page
            page = jnp.where(index < blocks, tables[row, jnp.minimum(index, blocks - 1)], NULL_PAGE)
            part = new[row : row + 1, :, block : block + page_size]
            pages = jax.lax.dynamic_update_slice(
                pages, part, (page, 0, offset[row] if length < page_size else 0, 0)
            )
    return pages
