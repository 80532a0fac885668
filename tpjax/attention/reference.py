"""The definition of attention that every backend is held to, and which keys a query sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tpjax.activations import soft_capped


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
) -> Float[Array, "B S K G v"]:
    """Computes attention as defined: one softmax over the contiguous keys at positions 0 to T - 1.

    See :func:`tpjax.attention.xla.paged_attention` for the arguments.
    """
    scores = jnp.einsum("bskgh,btkh->bkgst", query, keys, preferred_element_type=jnp.float32) * scale
    visible = visible_keys(positions[:, :, None], jnp.arange(keys.shape[1]), window)
    scores = jnp.where(visible[:, None, None], soft_capped(scores, softcap), -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(sinks[None, :, :, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, column], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : keys.shape[1]]
    return jnp.einsum("bkgst,btkh->bskgh", weights, values, preferred_element_type=jnp.float32).astype(
        query.dtype
    )
