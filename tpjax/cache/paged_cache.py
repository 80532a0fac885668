"""The cache of all layers: shapes, shardings and memory layouts of its buffers, and their bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as MemoryLayout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpjax.cache.layer_cache import LatentCache, LayerCache
from tpjax.cache.layer_places import LayerPlace, layer_places, num_entries
from tpjax.cache_quantization import QuantizedBuffer, part_width, vector_bytes
from tpjax.config import KVDtype, ModelConfig
from tpjax.hardware import LANES
from tpjax.sharding import PAGES, REPLICATED, head_plan, pad_to_multiple
from tpjax.windows import ONE_GROUP, Windows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedKVCache:
    """The cache of all layers.

    Attributes:
        entries: keys and values; each is shared by one layer of every page group.
        places: place of each layer.
        windows: window of each page group.
    """

    entries: tuple[LayerCache | LatentCache, ...]
    places: tuple[LayerPlace, ...] = field(metadata={"static": True})
    windows: Windows = field(default=ONE_GROUP, metadata={"static": True})

    def with_entries(self, entries: Sequence[LayerCache | LatentCache]) -> PagedKVCache:
        """Returns a cache with other content."""
        return replace(self, entries=tuple(entries))


@dataclass(frozen=True)
class CacheLayout:
    """The buffers of each entry, all of the same shape.

    Attributes:
        layer: class that holds them.
        count: buffers per entry.
        shape: shape of a buffer.
        spec: sharding of a buffer.
    """

    layer: type[LayerCache] | type[LatentCache]
    count: int
    shape: tuple[int, int, int, int]
    spec: PartitionSpec


def cache_layout(config: ModelConfig, tp: int, num_pages: int, page_size: int) -> CacheLayout:
    """Returns the layout of each entry of the cache."""
    if config.attention.latent is not None:
        width = config.attention.latent.kv_lora_rank + config.rotated_dim
        return CacheLayout(LatentCache, 1, (num_pages, 1, page_size, width), REPLICATED)
    heads = head_plan(config, tp).num_head_slots
    return CacheLayout(LayerCache, 2, (num_pages, heads, page_size, config.attention.head_dim), PAGES)


def page_bytes_per_device(
    config: ModelConfig,
    tp: int,
    page_size: int,
    dtype: jnp.dtype,
    platform: str = "cpu",
    windows: Windows = ONE_GROUP,
    kv_dtype: KVDtype = "auto",
) -> int:
    """Returns the bytes that one page takes on each device of a platform: of all layers of a page group.

    Args:
        config: the architecture.
        tp: devices.
        page_size: positions per page.
        dtype: dtype of activations.
        platform: of the devices.
        windows: window of each page group.
        kv_dtype: what keys and values are kept in; ``auto``: ``dtype``.
    """
    layout = cache_layout(config, tp, 1, page_size)
    devices = tp if layout.spec == PAGES else 1
    *rows, width = layout.shape
    size = vector_bytes(pad_to_multiple(width, LANES.get(platform, 1)), kv_dtype, dtype)
    return num_entries(config, windows) * layout.count * math.prod(rows) // devices * size


def allocate(
    config: ModelConfig,
    mesh: Mesh,
    *,
    num_pages: int,
    page_size: int,
    dtype: jnp.dtype,
    windows: Windows = ONE_GROUP,
    kv_dtype: KVDtype = "auto",
) -> PagedKVCache:
    """Allocates a cache of zeros; each device allocates its own shard only."""
    shapes = abstract(
        config,
        mesh,
        num_pages=num_pages,
        page_size=page_size,
        dtype=dtype,
        windows=windows,
        kv_dtype=kv_dtype,
    )

    def zeros(buffer: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=buffer.format)(
            buffer.shape, buffer.dtype
        )

    cache: PagedKVCache = jax.tree.map(zeros, shapes)
    return cache


def abstract(
    config: ModelConfig,
    mesh: Mesh,
    *,
    num_pages: int,
    page_size: int,
    dtype: jnp.dtype,
    windows: Windows = ONE_GROUP,
    kv_dtype: KVDtype = "auto",
) -> PagedKVCache:
    """Returns the shapes, dtypes and shardings of :func:`allocate`, without the memory."""
    layout = cache_layout(config, mesh.size, num_pages, page_size)
    buffer: Any
    if kv_dtype == "auto":
        buffer = jax.ShapeDtypeStruct(layout.shape, dtype, sharding=_format(mesh, layout.spec, 4))
    else:
        of_values = _format(mesh, layout.spec, 4)
        of_scales = _format(mesh, PartitionSpec(*layout.spec[1:2]), 3)
        part = part_width(layout.shape[-1], mesh.devices.flat[0].platform)
        buffer = QuantizedBuffer.abstract(
            layout.shape, kv_dtype, jnp.dtype(dtype), part, of_values, of_scales
        )
    entries = (layout.layer(*[buffer] * layout.count) for _ in range(num_entries(config, windows)))
    return PagedKVCache(tuple(entries), layer_places(config, windows), windows)


def _format(mesh: Mesh, spec: PartitionSpec, ndim: int) -> Format | NamedSharding:
    """Returns the sharding of a buffer and, on a TPU, its memory layout.

    A TPU would store rows of fewer than 128 elements with positions last, and every step would transpose the
    whole cache to write to it.
    """
    sharding = NamedSharding(mesh, spec)
    if mesh.devices.flat[0].platform not in LANES:
        return sharding
    return Format(MemoryLayout(tuple(range(ndim))), sharding)
