"""The definition of attention that every backend is held to, and which keys a query sees.

As a backend it gathers all pages of each sequence into contiguous keys: for tests, and for checking others.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tpjax.activations import soft_capped
from tpjax.cache import Pages, TokenGroup

_NEVER = np.iinfo(np.int32).max  # a position after every query


def visible_keys(
    query_positions: Int[Array, " ..."], key_positions: Int[Array, " ..."], window: int | None
) -> Bool[Array, " ..."]:
    """Returns which keys a query sees: at or before its position and, if ``window`` is set, within it.

    The two arguments broadcast against each other.
    """
    causal = key_positions <= query_positions
    return causal if window is None else causal & (key_positions > query_positions - window)


def reference_attention(
    query: Float[Array, "B S K G h"],
    keys: Float[Array, "B T K h"],
    values: Float[Array, "B T K v"],
    positions: Int[Array, "B S"],
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Float[Array, "K G"] | None = None,
    key_positions: Int[Array, "B T"] | None = None,
) -> Float[Array, "B S K G v"]:
    """Computes attention as defined: one softmax over all keys that a query sees.

    See :func:`tpjax.attention.paged_attention` for the other arguments.

    Args:
        query: queries.
        keys: contiguous keys.
        values: contiguous values.
        positions: of the queries.
        scale: multiplies query-key products.
        window: keys that a query sees.
        softcap: bounds the scaled products.
        sinks: scores of an extra key.
        key_positions: of the keys; ``None``: 0 to T - 1.
    """
    if key_positions is None:
        key_positions = jnp.broadcast_to(jnp.arange(keys.shape[1], dtype=jnp.int32), keys.shape[:2])
    scores = jnp.einsum("bskgh,btkh->bkgst", query, keys, preferred_element_type=jnp.float32) * scale
    visible = visible_keys(positions[:, :, None], key_positions[:, None, :], window)
    scores = jnp.where(visible[:, None, None], soft_capped(scores, softcap), -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(sinks[None, :, :, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, column], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : keys.shape[1]]
    return jnp.einsum("bkgst,btkh->bskgh", weights, values, preferred_element_type=jnp.float32).astype(
        query.dtype
    )


def paged_attention(
    query: Float[Array, "B S K G h"],
    key: Float[Array, "B S #K h"],
    value: Float[Array, "B S #K v"],
    cache: Pages,
    group: TokenGroup,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Float[Array, "K G"] | None = None,
) -> Float[Array, "B S K G v"]:
    """Gathers the pages of each sequence and computes :func:`reference_attention`.

    See :func:`tpjax.attention.paged_attention` for the arguments.
    """
    batch, columns = group.block_tables.shape
    heads = query.shape[2]

    def contiguous(pages: Float[Array, "rows k page h"]) -> Float[Array, "B T K h"]:
        flat = pages.reshape(batch, columns, *pages.shape[1:]).swapaxes(2, 3)
        flat = flat.reshape(batch, columns * cache.page_size, *flat.shape[3:])
        return jnp.broadcast_to(flat, (*flat.shape[:2], heads, flat.shape[3]))

    keys, values = map(contiguous, cache.read(group.block_tables.reshape(-1)))
    first, lengths = group.positions[:, 0], group.lengths
    stop = first + (query.shape[1] if lengths is None else lengths)
    blocks = jnp.broadcast_to(jnp.arange(columns), (batch, columns))
    if group.cyclic:  # each column holds the last block that is its own
        last = jnp.maximum(stop - 1, 0)[:, None] // cache.page_size
        blocks = last - (last - blocks) % columns
    key_positions = blocks[:, :, None] * cache.page_size + jnp.arange(cache.page_size)
    key_positions = key_positions.reshape(batch, -1)
    written = (key_positions >= 0) & (key_positions < stop[:, None])
    # what an earlier user left behind may not be a number, and 0 times that is not 0
    values = jnp.where(written[:, :, None, None], values, 0)
    output = reference_attention(
        query,
        keys,
        values,
        group.positions,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        key_positions=jnp.where(written, key_positions, _NEVER),
    )
    return output if lengths is None else jnp.where((lengths > 0)[:, None, None, None, None], output, 0)
