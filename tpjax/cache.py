"""The paged, head-sharded key-value cache (Kwon et al. 2023, https://arxiv.org/abs/2309.06180).

Each layer keeps one buffer of keys and one of values, [pages, K, page_size, h], cut along K. Which page
holds which positions of which sequence is said by block tables, which are arguments of every call and not
state. Page 0 is never given to a sequence: rows and positions that do not exist write there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from tpjax.config import ModelConfig
from tpjax.sharding import PAGES, HeadPlan

NULL_PAGE = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Placement:
    """Where a batch of tokens sits: its sequences' pages and each token's position.

    Attributes:
        block_tables: page of each block of positions, per sequence.
        positions: of each token. In a chunk of several tokens they are consecutive and the first is a
            multiple of the page size.
        reach: tokens each sequence may get to, which the frequencies of some rotary embeddings go by.
    """

    block_tables: Int[Array, "B blocks"]
    positions: Int[Array, "B S"]
    reach: Int[Array, B] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values."""

    keys: Float[Array, "pages K page_size h"]
    values: Float[Array, "pages K page_size h"]

    @property
    def page_size(self) -> int:
        """Positions per page."""
        return self.keys.shape[2]

    def write(
        self, keys: Float[Array, "B S K h"], values: Float[Array, "B S K h"], at: Placement
    ) -> LayerCache:
        """Stores new keys and values at their positions."""
        write = _write_token if keys.shape[1] == 1 else _write_chunk
        return LayerCache(write(self.keys, keys, at), write(self.values, values, at))


PagedKVCache = tuple[LayerCache, ...]


def cache_shape(config: ModelConfig, tp: int, num_pages: int, page_size: int) -> tuple[int, int, int, int]:
    """Shape of each layer's keys, and of its values."""
    slots = HeadPlan(config.num_heads, config.num_kv_heads, tp).num_slots
    return (num_pages, slots, page_size, config.head_dim)


def page_bytes_per_device(config: ModelConfig, tp: int, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes one page takes on each device, all layers together."""
    _, slots, _, head_dim = cache_shape(config, tp, 1, page_size)
    return 2 * config.num_layers * slots // tp * page_size * head_dim * jnp.dtype(dtype).itemsize


def allocate(
    config: ModelConfig, mesh: Mesh, *, num_pages: int, page_size: int, dtype: jnp.dtype
) -> PagedKVCache:
    """A cache of zeros; each device allocates only its own heads."""
    shape = cache_shape(config, mesh.size, num_pages, page_size)
    zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=NamedSharding(mesh, PAGES))
    return tuple(LayerCache(zeros(shape, dtype), zeros(shape, dtype)) for _ in range(config.num_layers))


def abstract(
    config: ModelConfig, mesh: Mesh, *, num_pages: int, page_size: int, dtype: jnp.dtype
) -> PagedKVCache:
    """The shapes, dtypes and shardings of :func:`allocate`, without the memory."""
    shape = cache_shape(config, mesh.size, num_pages, page_size)
    buffer: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PAGES))
    return tuple(LayerCache(buffer, buffer) for _ in range(config.num_layers))


def _write_token(
    pages: Float[Array, "pages K page_size h"], new: Float[Array, "B 1 K h"], at: Placement
) -> Float[Array, "pages K page_size h"]:
    block, offset = jnp.divmod(at.positions[:, 0], pages.shape[2])
    page = jnp.take_along_axis(at.block_tables, block[:, None], axis=1, mode="clip")[:, 0]
    return pages.at[page, :, offset].set(new[:, 0], mode="promise_in_bounds")


def _write_chunk(
    pages: Float[Array, "pages K page_size h"], new: Float[Array, "B S K h"], at: Placement
) -> Float[Array, "pages K page_size h"]:
    # Chunks start on a page boundary, so whole pages go in with one slice update each: no scatter by token.
    batch, length = new.shape[:2]
    page_size = pages.shape[2]
    new = new.swapaxes(1, 2)
    first = at.positions[:, 0] // page_size
    blocks = at.block_tables.shape[1]
    for row in range(batch):
        for block in range(0, length, page_size):
            index = first[row] + block // page_size
            # past the table's end there is no page: that is padding, and goes to the null page
            page = jnp.where(index < blocks, at.block_tables[row, jnp.minimum(index, blocks - 1)], NULL_PAGE)
            part = new[row : row + 1, :, block : block + page_size]
            pages = jax.lax.dynamic_update_slice(pages, part, (page, 0, 0, 0))
    return pages
