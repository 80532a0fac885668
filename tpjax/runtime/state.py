"""What lives on the devices between dispatches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from tpjax import cache as kv
from tpjax.cache import PagedKVCache
from tpjax.config import ModelConfig
from tpjax.runtime.limits import Limits
from tpjax.sampling import History
from tpjax.sharding import REPLICATED, Leaf, pad_to_multiple


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceState:
    """What lives on the devices between dispatches; every program takes it by donation and returns the next.

    Attributes:
        cache: keys and values.
        tokens: last token of each slot. The last slot is spare: padding rows use it.
        history: what penalties, biases and masks need; masks have the spare slot too.
    """

    cache: PagedKVCache
    tokens: Int[Leaf, " slots"]
    history: History

    @property
    def spare_slot(self) -> int:
        """The slot of padding rows and of rows that have ended."""
        return self.tokens.shape[0] - 1

    @classmethod
    def abstract(cls, config: ModelConfig, mesh: Mesh, limits: Limits, dtype: jnp.dtype) -> DeviceState:
        """Returns the state's shapes, dtypes and shardings, without its memory.

        Args:
            config: the architecture.
            mesh: the mesh.
            limits: number of slots and pages.
            dtype: of the cache.
        """
        shape, replicated = (limits.max_slots + 1,), NamedSharding(mesh, REPLICATED)
        tokens: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated)
        cache = kv.abstract(
            config,
            mesh,
            num_pages=limits.num_pages,
            page_size=limits.page_size,
            dtype=dtype,
            windows=limits.windows,
        )
        padded_vocab = pad_to_multiple(config.vocab_size, mesh.size)
        history = History.abstract(limits.max_slots, limits.history_rows, padded_vocab, mesh)
        return cls(cache, tokens, history)

    def formats(self) -> DeviceState:
        """Returns the memory layout and sharding of each buffer, as a tree of the same structure."""
        formats: DeviceState = jax.tree.map(lambda buffer: buffer.format, self)
        return formats

    def zeros(self) -> DeviceState:
        """Allocates a state of zeros with these shapes; each device allocates only its shards."""

        def zeros() -> DeviceState:
            state: DeviceState = jax.tree.map(lambda buffer: jnp.zeros(buffer.shape, buffer.dtype), self)
            return state

        allocated: DeviceState = jax.jit(zeros, out_shardings=self.formats())()
        return allocated

    def delete(self) -> None:
        """Frees the buffers. Dropping references would not: tracebacks may hold some."""
        for buffer in jax.tree.leaves(self):
            if not buffer.is_deleted():
                buffer.delete()
