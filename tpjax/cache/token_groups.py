"""Tokens of a step by what attention and the cache need of them: positions, block tables, padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


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
        walk: blocks of pages that the page walk visits in all sequences together, at most, where that is
            compiled in; 0: it ends with the longest context.
    """

    block_tables: Int[Array, "B blocks"]
    positions: Int[Array, "B S"]
    lengths: Int[Array, " B"] | None = None
    max_length: Int[Array, " B"] | None = None
    chunks: bool = field(default=False, metadata={"static": True})
    cyclic: bool = field(default=False, metadata={"static": True})
    walk: int = field(default=0, metadata={"static": True})

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
