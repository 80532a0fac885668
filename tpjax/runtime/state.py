"""What lives on the devices between dispatches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from tpjax.cache import PagedKVCache
from tpjax.runtime.limits import Limits
from tpjax.sampling import History
from tpjax.sharding import REPLICATED, Leaf, pad_to_multiple


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StageState:
    """What lives on the devices of a pipeline stage between dispatches, unless it is the last stage.

    Every program takes the state by donation and returns the next.

    Attributes:
        cache: keys and values of the stage's layers.
    """

    cache: PagedKVCache

    def formats(self) -> StageState:
        """Returns the memory layout and sharding of each buffer, as a tree of the same structure."""
        formats: StageState = jax.tree.map(lambda buffer: buffer.format, self)
        return formats

    def zeros(self) -> StageState:
        """Allocates a state of zeros with these shapes; each device allocates only its shards."""

        def zeros() -> Any:
            state: Any = jax.tree.map(lambda buffer: jnp.zeros(buffer.shape, buffer.dtype), self)
            return state

        allocated: StageState = jax.jit(zeros, out_shardings=self.formats())()
        return allocated

    def delete(self) -> None:
        """Frees the buffers. Dropping references would not: tracebacks may hold some."""
        for buffer in jax.tree.leaves(self):
            if not buffer.is_deleted():
                buffer.delete()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceState(StageState):
    """The state of the only or the last stage, which samples.

    Attributes:
        tokens: last token of each slot. The last slot is spare: padding rows use it.
        history: what penalties, biases and masks need; masks have the spare slot too.
    """

    tokens: Int[Leaf, " slots"]
    history: History

    @property
    def spare_slot(self) -> int:
        """The slot of padding rows and of rows that have ended."""
        return self.tokens.shape[0] - 1

    @classmethod
    def abstract(cls, cache: PagedKVCache, vocab_size: int, mesh: Mesh, limits: Limits) -> DeviceState:
        """Returns the state's shapes, dtypes and shardings, without its memory.

        Args:
            cache: of the stage's layers, without its memory.
            vocab_size: of the model.
            mesh: the mesh.
            limits: number of slots.
        """
        shape, replicated = (limits.max_slots + 1,), NamedSharding(mesh, REPLICATED)
        tokens: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated)
        padded_vocab = pad_to_multiple(vocab_size, mesh.size)
        return cls(cache, tokens, History.abstract(limits.max_slots, limits.history_rows, padded_vocab, mesh))
