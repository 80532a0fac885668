"""The keys and values of one layer, or its latents, and how attention reads them page by page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from tpjax.cache import buffers
from tpjax.cache.buffers import BY_TOKEN, Buffer, CacheWriter
from tpjax.cache.token_groups import TokenGroup
from tpjax.sharding import PAGES, REPLICATED


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
        writer: CacheWriter = BY_TOKEN,
    ) -> LayerCache:
        """Returns the cache with new keys and values stored at their positions.

        Args:
            keys: new keys.
            values: new values.
            group: where they belong.
            writer: how they are written.
        """
        return LayerCache(
            buffers.write(self.keys, keys, group, PAGES, writer),
            buffers.write(self.values, values, group, PAGES, writer),
        )

    def read(
        self, pages: Int[Array, " B"]
    ) -> tuple[Float[Array, "B K page_size h"], Float[Array, "B K page_size h"]]:
        """Reads the keys and values of one page of each sequence."""
        return buffers.read(self.keys, pages), buffers.read(self.values, pages)

    def returned(
        self, keys: Float[Array, "*tokens K h"], values: Float[Array, "*tokens K h"]
    ) -> tuple[Float[Array, "*tokens K h"], Float[Array, "*tokens K h"]]:
        """Returns keys and values as they are read once they were written."""
        return buffers.returned(self.keys, keys), buffers.returned(self.values, values)


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
        self, latents: Float[Array, "B S 1 r"], group: TokenGroup, writer: CacheWriter = BY_TOKEN
    ) -> LatentCache:
        """Returns the cache with new latents stored at their positions; ``writer`` as for a layer's cache."""
        return LatentCache(buffers.write(self.latents, latents, group, REPLICATED, writer))

    def read(self, pages: Int[Array, " B"]) -> Float[Array, "B 1 page_size r"]:
        """Reads the latents of one page of each sequence."""
        return buffers.read(self.latents, pages)

    def returned(self, latents: Float[Array, "*tokens 1 r"]) -> Float[Array, "*tokens 1 r"]:
        """Returns latents as they are read once they were written."""
        return buffers.returned(self.latents, latents)


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
