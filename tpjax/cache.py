"""The paged key-value cache (Kwon et al. 2023, https://arxiv.org/abs/2309.06180).

Each layer keeps one buffer of keys and one of values, [pages, K, page_size, h], sharded along K. With latent
attention it keeps one replicated buffer of latents, [pages, 1, page_size, r]: all heads read all of it. Block
tables say which page holds which positions of which sequence; they are arguments of every call, not state.
Page 0 is never assigned to a sequence: padding rows and padding positions write to it.

A buffer may be kept in 8 bits, with its scales in a buffer beside it: see :mod:`tpjax.cache_quantization`.

Where some layers see all keys and others only a window, layers form page groups: a sequence has pages of its
own in each, and those of a group with a window are given back once no query can see them. All groups take
pages from one pool, and the n-th layers of all groups share a buffer, so that any page can serve any group:
the memory goes where the sequences need it, long or short (vLLM's hybrid cache is built so,
https://docs.vllm.ai/en/latest/design/hybrid_kv_cache_manager.html).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as MemoryLayout
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from tpjax.cache_quantization import QuantizedBuffer, quantized, vector_bytes
from tpjax.config import KVDtype, ModelConfig
from tpjax.errors import ConfigError
from tpjax.sharding import PAGES, REPLICATED, head_plan, pad_to_multiple
from tpjax.windows import ONE_GROUP, Windows

# takes the buffer of one device, whole pages [n, K, page_size, h], and which they are
PageWriter: TypeAlias = Callable[[Array, Array, Array], Array]
Buffer: TypeAlias = Float[Array, "pages K page_size h"] | QuantizedBuffer

_LANES = {"tpu": 128}  # rows of a buffer are padded to a multiple of this many elements
NULL_PAGE = 0
MOST_PAGE_GROUPS = 8  # each has a block table of every row, which every dispatch uploads


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenGroup:
    """Tokens of a step that attention treats alike: B sequences with S consecutive tokens each.

    Attributes:
        block_tables: page of each block of positions of each sequence.
        positions: position of each token.
        lengths: tokens of each sequence that are not padding, 0 to S; ``None``: all are tokens.
        max_length: longest length each sequence may reach, tokens. The frequencies of some rotary embeddings
            depend on it.
        chunks: whether these are prompt chunks: a chunk shorter than a page lies within one, a longer one
            begins at a page and is whole pages long. Of other sequences, tokens may cross from a page to the
            next anywhere.
        cyclic: whether the page of block b is in column b modulo the number of columns: such a table holds
            the blocks that the tokens of this step can see, and their own.
    """

    block_tables: Int[Array, "B blocks"]
    positions: Int[Array, "B S"]
    lengths: Int[Array, " B"] | None = None
    max_length: Int[Array, " B"] | None = None
    chunks: bool = field(default=False, metadata={"static": True})
    cyclic: bool = field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """B and S."""
        batch, length = self.positions.shape
        return batch, length

    @property
    def size(self) -> int:
        """Tokens, padding included."""
        return math.prod(self.shape)

    @property
    def present(self) -> Bool[Array, "B S"]:
        """Whether each token is one, and not padding."""
        if self.lengths is None:
            return jnp.ones(self.shape, jnp.bool_)
        return jnp.arange(self.shape[1]) < self.lengths[:, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchMetadata:
    """Where the tokens of a step belong.

    A step holds its tokens flat, [N, ...], group after group, and padding after the last. Only attention and
    the cache see the groups.

    Attributes:
        groups: in the order of their tokens; at least one.
        padding: tokens after those of the groups.
    """

    groups: tuple[TokenGroup, ...]
    padding: int = field(default=0, metadata={"static": True})

    @property
    def positions(self) -> Int[Array, " N"]:
        """Position of each token; 0 for padding after the groups."""
        return self._flat([group.positions for group in self.groups])

    @property
    def max_length(self) -> Int[Array, " N"] | None:
        """Longest length of the sequence of each token, if the groups say it."""
        lengths = [
            jnp.broadcast_to(group.max_length[:, None], group.shape)
            for group in self.groups
            if group.max_length is not None
        ]
        return self._flat(lengths) if lengths else None

    @property
    def present(self) -> Bool[Array, " N"]:
        """Whether each token is one, and not padding."""
        return self._flat([group.present for group in self.groups])

    def split(self, x: Shaped[Array, "N ..."]) -> list[Array]:
        """Returns the part of each group, [B, S, ...]."""
        parts, start = [], 0
        for group in self.groups:
            parts.append(x[start : start + group.size].reshape(*group.shape, *x.shape[1:]))
            start += group.size
        return parts

    def join(self, parts: Sequence[Array]) -> Shaped[Array, "N ..."]:
        """Returns the parts of the groups, [B, S, ...], as flat tokens; those of padding are zeros."""
        flat = [part.reshape(-1, *part.shape[2:]) for part in parts]
        if self.padding:
            flat.append(jnp.zeros((self.padding, *flat[0].shape[1:]), flat[0].dtype))
        return jnp.concatenate(flat) if len(flat) > 1 else flat[0]

    def _flat(self, parts: Sequence[Array]) -> Shaped[Array, " N"]:
        return self.join([part[..., None] for part in parts])[:, 0]


class StoredPages(NamedTuple):
    """The buffers in which keys and values are stored, for kernels that read pages themselves.

    Attributes:
        keys: of all pages. K may be 1: all heads share them.
        values: of all pages; ``None``: the beginning of each key is the value.
    """

    keys: Buffer
    values: Buffer | None


@runtime_checkable  # tests check types at run time
class Pages(Protocol):
    """Keys and values of cached positions, read page by page."""

    @property
    def page_size(self) -> int:
        """Positions per page."""
        ...

    @property
    def stored(self) -> StoredPages | None:
        """The buffers that hold keys and values; ``None`` if they are computed from what is stored."""
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

    keys: Buffer
    values: Buffer

    @property
    def page_size(self) -> int:
        """Positions per page."""
        return self.keys.shape[2]

    @property
    def stored(self) -> StoredPages:
        """The buffers."""
        return StoredPages(self.keys, self.values)

    def write(
        self,
        keys: Float[Array, "B S K h"],
        values: Float[Array, "B S K h"],
        group: TokenGroup,
        write_pages: PageWriter | None = None,
    ) -> LayerCache:
        """Returns the cache with new keys and values stored at their positions.

        Args:
            keys: new keys.
            values: new values.
            group: where they belong.
            write_pages: what writes whole pages; ``None``: XLA.
        """
        return LayerCache(
            _write(self.keys, keys, group, PAGES, write_pages),
            _write(self.values, values, group, PAGES, write_pages),
        )

    def read(
        self, pages: Int[Array, " B"]
    ) -> tuple[Float[Array, "B K page_size h"], Float[Array, "B K page_size h"]]:
        """Reads the keys and values of one page of each sequence."""
        return _read(self.keys, pages), _read(self.values, pages)

    def returned(
        self, keys: Float[Array, "*tokens K h"], values: Float[Array, "*tokens K h"]
    ) -> tuple[Float[Array, "*tokens K h"], Float[Array, "*tokens K h"]]:
        """Returns keys and values as they are read once they were written."""
        return _returned(self.keys, keys), _returned(self.values, values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LatentCache:
    """The latents of one layer, each followed by the rotary part of its key."""

    latents: Buffer  # K is 1

    @property
    def page_size(self) -> int:
        """Positions per page."""
        return self.latents.shape[2]

    def write(
        self, latents: Float[Array, "B S 1 r"], group: TokenGroup, write_pages: PageWriter | None = None
    ) -> LatentCache:
        """Returns the cache with new latents stored at their positions; ``write_pages`` as for a layer's."""
        return LatentCache(_write(self.latents, latents, group, REPLICATED, write_pages))

    def read(self, pages: Int[Array, " B"]) -> Float[Array, "B 1 page_size r"]:
        """Reads the latents of one page of each sequence."""
        return _read(self.latents, pages)

    def returned(self, latents: Float[Array, "*tokens 1 r"]) -> Float[Array, "*tokens 1 r"]:
        """Returns latents as they are read once they were written."""
        return _returned(self.latents, latents)


@dataclass(frozen=True)
class LatentPages:
    """Latents as pages of keys and values: each is a key, and its beginning the value.

    Attributes:
        cache: the latents.
        value_dim: width of the values.
    """

    cache: LatentCache
    value_dim: int

    @property
    def page_size(self) -> int:
        """Positions per page."""
        return self.cache.page_size

    @property
    def stored(self) -> StoredPages:
        """The buffer."""
        return StoredPages(self.cache.latents, None)

    def read(
        self, pages: Int[Array, " B"]
    ) -> tuple[Float[Array, "B 1 page_size r"], Float[Array, "B 1 page_size v"]]:
        """Reads the latents of one page of each sequence."""
        latents = self.cache.read(pages)
        return latents, latents[..., : self.value_dim]


class LayerPlace(NamedTuple):
    """Where the keys and values of a layer are.

    Attributes:
        group: the page group whose block tables it reads.
        entry: which of the cache's entries holds them; other groups have pages there too.
    """

    group: int
    entry: int


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


def page_groups(config: ModelConfig) -> Windows:
    """Returns the windows of the page groups that suit an architecture.

    Groups have the same number of layers, padded where that does not divide: as many as see all keys, or as
    see a window if these are fewer or little more. The padding is memory that is not used.
    """
    counts = Counter(config.attention.window_of(kind) for kind in config.attention.layer_types)
    fewest, most = min(counts.values()), max(counts.values())
    size = most if most < _NEARLY_AS_MANY * fewest else fewest
    while sum(-(-count // size) for count in counts.values()) > MOST_PAGE_GROUPS:
        size += 1
    windows = sorted(counts, key=lambda window: (window is not None, window or 0))
    return tuple(window for window in windows for _ in range(-(-counts[window] // size)))


_NEARLY_AS_MANY = 1.25


def layer_places(config: ModelConfig, windows: Windows) -> tuple[LayerPlace, ...]:
    """Returns the place of each layer, given the window of each page group."""
    kinds = [config.attention.window_of(kind) for kind in config.attention.layer_types]
    if windows == ONE_GROUP:
        kinds = [None] * len(kinds)
    size = max(-(-count // windows.count(window)) for window, count in Counter(kinds).items())
    numbers: Counter[int | None] = Counter()
    places = []
    for window in kinds:
        number = numbers[window]
        numbers[window] += 1
        places.append(LayerPlace(windows.index(window) + number // size, number % size))
    return tuple(places)


def num_entries(config: ModelConfig, windows: Windows) -> int:
    """Returns the number of the cache's entries: the layers of a page group."""
    return 1 + max(place.entry for place in layer_places(config, windows))


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

    Raises:
        ConfigError: the platform cannot write such vectors in ``kv_dtype`` in place.
    """
    layout = cache_layout(config, tp, 1, page_size)
    devices = tp if layout.spec == PAGES else 1
    *rows, width = layout.shape
    _check_in_place(config, width, platform, kv_dtype)
    size = vector_bytes(pad_to_multiple(width, _LANES.get(platform, 1)), kv_dtype, dtype)
    return num_entries(config, windows) * layout.count * math.prod(rows) // devices * size


def _check_in_place(config: ModelConfig, width: int, platform: str, kv_dtype: KVDtype) -> None:
    """Raises a ``ConfigError`` if XLA would copy a cache of 8 bits to write to it.

    On a TPU it reads rows of 8 bits in tiles of 32 and writes them in tiles of 8. Rows that are wider than a
    tile lie differently in the two.
    """
    most = _LANES.get(platform, width)
    if kv_dtype != "auto" and width > most:
        what = "heads" if config.attention.latent is None else "latents"
        raise ConfigError(
            f"kv_dtype={kv_dtype!r} on TPUs needs {what} of at most {most} elements, and these have {width}: "
            "every step would copy the cache"
        )


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

    def zeros(buffer: jax.ShapeDtypeStruct) -> Array:
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
    _check_in_place(config, layout.shape[-1], mesh.devices.flat[0].platform, kv_dtype)
    buffer: Any
    if kv_dtype == "auto":
        buffer = jax.ShapeDtypeStruct(layout.shape, dtype, sharding=_format(mesh, layout.spec, 4))
    else:
        of_values = _format(mesh, layout.spec, 4)
        of_scales = _format(mesh, PartitionSpec(*layout.spec[1:2]), 3)
        buffer = QuantizedBuffer.abstract(layout.shape, kv_dtype, jnp.dtype(dtype), of_values, of_scales)
    entries = (layout.layer(*[buffer] * layout.count) for _ in range(num_entries(config, windows)))
    return PagedKVCache(tuple(entries), layer_places(config, windows), windows)


def _format(mesh: Mesh, spec: PartitionSpec, ndim: int) -> Format | NamedSharding:
    """Returns the sharding of a buffer and, on a TPU, its memory layout.

    A TPU would store rows of fewer than 128 elements with positions last, and every step would transpose the
    whole cache to write to it.
    """
    sharding = NamedSharding(mesh, spec)
    if mesh.devices.flat[0].platform not in _LANES:
        return sharding
    return Format(MemoryLayout(tuple(range(ndim))), sharding)


def _read(buffer: Buffer, pages: Int[Array, " B"]) -> Float[Array, "B K page_size h"]:
    if isinstance(buffer, QuantizedBuffer):
        return buffer.read(pages)
    return buffer.at[pages].get(mode="promise_in_bounds")


def _returned(buffer: Buffer, new: Float[Array, "*tokens h"]) -> Float[Array, "*tokens h"]:
    return buffer.returned(new) if isinstance(buffer, QuantizedBuffer) else new


def _write(
    buffer: Buffer,
    new: Float[Array, "B S K h"],
    group: TokenGroup,
    spec: PartitionSpec,
    write_pages: PageWriter | None,
) -> Buffer:
    heads, in_mesh = PartitionSpec(None, None, *spec[1:2]), not jax.sharding.get_abstract_mesh().empty
    write: Callable[..., Any]
    if isinstance(buffer, QuantizedBuffer):
        write = partial(_write_quantized, write_pages=write_pages)
        if in_mesh and (spec == PAGES or write_pages is not None):
            specs = buffer.specs(spec)
            write = jax.shard_map(
                write, in_specs=(specs, heads, heads, REPLICATED), out_specs=specs, check_vma=False
            )
        written: QuantizedBuffer = write(buffer, *quantized(new, buffer.kind), group)
        return written
    if write_pages is None:  # the partitioner lets each device write its heads
        return (_write_chunks if group.chunks else _write_tokens)(buffer, new, group)
    write = partial(_write_chunks, write_pages=write_pages) if group.chunks else _write_rows
    if in_mesh:
        write = jax.shard_map(write, in_specs=(spec, heads, REPLICATED), out_specs=spec, check_vma=False)
    output: Array = write(buffer, new, group)
    return output


def _write_quantized(
    buffer: QuantizedBuffer,
    values: Shaped[Array, "B S K h"],
    scales: Float[Array, "B S K"],
    group: TokenGroup,
    write_pages: PageWriter | None,
) -> QuantizedBuffer:
    """Writes on one device: rows of one head each, since a TPU moves a whole buffer to write wider ones."""
    pages, heads, page_size, _ = buffer.shape
    rows = buffer.scales.reshape(heads * pages, page_size)
    if group.chunks:
        size = min(values.shape[1], page_size)
        of_values = _write_chunks(buffer.values, values, group, write_pages)
        at, offsets = _place(group, group.positions[:, ::size], page_size)
        new = scales.reshape(*at.shape, size, heads).swapaxes(2, 3)
        rows = _write_parts(rows, at[..., None] + pages * jnp.arange(heads), offsets[..., None], new)
        return buffer.with_parts(of_values, rows.reshape(buffer.scales.shape))
    at, offsets = _token_places(group, page_size)
    # of one head a CPU would copy the buffer to write to it in another shape
    of_values = (_write_tokens if heads == 1 else _write_rows)(buffer.values, values, group)
    for i in range(values.shape[1]):  # all scales of a page again: it writes rows in place, not elements
        scale_rows = at[:, i, None] + pages * jnp.arange(heads)
        here = jnp.arange(page_size) == offsets[:, i, None, None]
        # read before: fused with the write, GPUs would copy all scales first
        old = jax.lax.optimization_barrier(rows.at[scale_rows].get(mode="promise_in_bounds"))
        new = jnp.where(here, scales[:, i, :, None], old)
        rows = rows.at[scale_rows].set(new, mode="promise_in_bounds")
    return buffer.with_parts(of_values, rows.reshape(buffer.scales.shape))


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
    buffer: Shaped[Array, "pages K page_size h"], new: Shaped[Array, "B S K h"], group: TokenGroup
) -> Shaped[Array, "pages K page_size h"]:
    """Writes what :func:`_write_tokens` writes, on one device, in rows of one head.

    Where a token's heads are one row, XLA for TPUs keeps the cache in a layout in which they are, and copies
    it at every layer for a kernel that reads it.
    """
    num_pages, heads, page_size, width = buffer.shape
    pages, offsets = _token_places(group, page_size)
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
