"""Grouped-query attention over the paged cache.

``paged_attention`` walks the pages in use with an online softmax (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867; Dao et al. 2022, https://arxiv.org/abs/2205.14135): its cost follows the
longest context in the batch and nothing is gathered whole. ``reference_attention`` is the definition it is
held to.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tpjax.cache import LayerCache, Placement
from tpjax.config import ModelConfig
from tpjax.layers.linear import Linear
from tpjax.layers.norm import RMSNorm
from tpjax.layers.rope import Rotation, rotate
from tpjax.sharding import (
    BIAS,
    COLUMN,
    HEADS,
    REPLICATED,
    ROW,
    HeadPlan,
    Segment,
    columns,
    constrain,
    rows,
    whole,
)

_MASKED = -1e30  # finite, so that a page with no visible key gives no NaN


class Attention(nnx.Module):
    """Fused column-parallel q, k and v; attention on whole heads; row-parallel output.

    The fused product's outputs lie slot by slot (see ``HeadPlan``): the slot's queries, its key, its value.
    """

    def __init__(self, config: ModelConfig, tp: int, dtype: jnp.dtype) -> None:
        self.plan = HeadPlan(config.num_heads, config.num_kv_heads, tp)
        hidden, head_dim = config.hidden_size, config.head_dim
        width = self.plan.num_slots * (self.plan.group_size + 2) * head_dim
        self.qkv_proj = Linear(
            columns(width, *_qkv_segments(self.plan, head_dim, "weight"), in_features=hidden),
            COLUMN,
            bias=columns(width, *_qkv_segments(self.plan, head_dim, "bias"), in_features=None)
            if config.attention_bias
            else None,
            bias_spec=BIAS,
            dtype=dtype,
        )
        self.o_proj = Linear(
            rows(
                self.plan.num_padded_heads * head_dim,
                _output_segments(self.plan, head_dim),
                {"o_proj.weight": config.num_heads * head_dim},
                out_features=hidden,
            ),
            ROW,
            bias=whole("o_proj.bias", (hidden,)) if config.attention_out_bias else None,
            bias_spec=REPLICATED,
            dtype=dtype,
        )
        self.q_norm = RMSNorm("q_norm.weight", head_dim, config, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm("k_norm.weight", head_dim, config, dtype) if config.qk_norm else None
        self.head_dim = head_dim
        self.scale = config.query_scale

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rotation: Rotation,
        cache: LayerCache,
        at: Placement,
        window: int | None,
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """Each device's share of the sum over heads, and the cache with the new keys and values."""
        group = self.plan.group_size
        qkv = self.qkv_proj(x).reshape(*x.shape[:2], self.plan.num_slots, group + 2, self.head_dim)
        qkv = constrain(qkv, HEADS)
        query, key, value = qkv[..., :group, :], qkv[..., group, :], qkv[..., group + 1, :]
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        cache = cache.write(key, value, at)
        mixed = paged_attention(query, cache, at, scale=self.scale, window=window)
        return self.o_proj(mixed.reshape(*x.shape[:2], -1)), cache


def paged_attention(
    query: Float[Array, "B S K G h"],
    cache: LayerCache,
    at: Placement,
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "B S K G h"]:
    """Causal attention of each query to the cached keys at or before its position.

    Args:
        query: G query heads for each of the K KV heads.
        cache: holds the keys of every position up to the queries' own.
        at: pages of each sequence, and the queries' positions.
        scale: multiplies query-key products.
        window: keys a query sees, its own included; ``None``: all.

    Returns:
        The mixed values, in the query's dtype; softmax and sums are float32.
    """
    batch, length, heads, group, head_dim = query.shape
    page_size = cache.page_size
    query = query.transpose(0, 2, 3, 1, 4).reshape(batch, heads, group * length, head_dim)
    positions = jnp.tile(at.positions, (1, group))[:, None, :, None]  # of each row of `query`

    first = 0 if window is None else jnp.maximum(jnp.min(at.positions) - (window - 1), 0) // page_size
    last = jnp.max(at.positions) // page_size + 1

    def page(index: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, total, mixed = carry
        pages = jax.lax.dynamic_index_in_dim(at.block_tables, index, axis=1, keepdims=False)
        keys = cache.keys.at[pages].get(mode="promise_in_bounds")
        values = cache.values.at[pages].get(mode="promise_in_bounds")
        scores = jnp.einsum("bkqh,bkph->bkqp", query, keys, preferred_element_type=jnp.float32) * scale
        key_positions = index * page_size + jnp.arange(page_size)
        visible = key_positions <= positions
        if window is not None:
            visible &= key_positions > positions - window
        scores = jnp.where(visible, scores, _MASKED)
        new_best = jnp.maximum(best, scores.max(axis=-1, keepdims=True))
        weights = jnp.where(visible, jnp.exp(scores - new_best), 0.0)
        keep = jnp.exp(best - new_best)
        total = total * keep + weights.sum(axis=-1, keepdims=True)
        mixed = mixed * keep + jnp.einsum(
            "bkqp,bkph->bkqh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        return new_best, total, mixed

    shape = (batch, heads, group * length)
    start = (
        jnp.full((*shape, 1), _MASKED, jnp.float32),
        jnp.zeros((*shape, 1), jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    _, total, mixed = jax.lax.fori_loop(first, last, page, start)
    # rows that see nothing (padding of a batch) have total 0: give zeros, not NaN
    mixed = (mixed / jnp.maximum(total, 1e-30)).astype(query.dtype)
    return mixed.reshape(batch, heads, group, length, head_dim).transpose(0, 3, 1, 2, 4)


def reference_attention(
    query: Float[Array, "B S K G h"],
    keys: Float[Array, "B T K h"],
    values: Float[Array, "B T K h"],
    positions: Int[Array, "B S"],
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "B S K G h"]:
    """What :func:`paged_attention` computes, written as the definition: one softmax over contiguous keys."""
    scores = jnp.einsum("bskgh,btkh->bkgst", query, keys, preferred_element_type=jnp.float32) * scale
    at, key_at = positions[:, :, None], jnp.arange(keys.shape[1])
    visible = key_at <= at
    if window is not None:
        visible &= key_at > at - window
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgst,btkh->bskgh", weights, values, preferred_element_type=jnp.float32).astype(
        query.dtype
    )


def _qkv_segments(plan: HeadPlan, head_dim: int, kind: str) -> tuple[list[Segment], dict[str, int]]:
    q, k, v = (f"{name}_proj.{kind}" for name in "qkv")
    segments = []
    for slot, (kv_head, heads) in enumerate(plan.slots):
        at = slot * (plan.group_size + 2) * head_dim
        segments += [
            Segment(q, head * head_dim, head_dim, at + place * head_dim)
            for place, head in enumerate(heads)
            if head is not None
        ]
        if kv_head is not None:
            segments += [
                Segment(name, kv_head * head_dim, head_dim, at + (plan.group_size + part) * head_dim)
                for part, name in enumerate((k, v))
            ]
    sizes = {q: plan.num_heads * head_dim, k: plan.num_kv_heads * head_dim, v: plan.num_kv_heads * head_dim}
    return segments, sizes


def _output_segments(plan: HeadPlan, head_dim: int) -> list[Segment]:
    places = [head for _, heads in plan.slots for head in heads]
    return [
        Segment("o_proj.weight", head * head_dim, head_dim, place * head_dim)
        for place, head in enumerate(places)
        if head is not None
    ]
