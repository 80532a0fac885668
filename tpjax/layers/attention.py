"""Grouped-query attention: the projections around :mod:`tpjax.attention`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from tpjax.attention import XLA, Backend, cache_writer, paged_attention
from tpjax.cache import BatchMetadata, LayerCache
from tpjax.config import ModelConfig
from tpjax.layers.linear import Linear, RowLinear
from tpjax.layers.norm import HeadScale, Norm, normalised
from tpjax.layers.rope import RotaryEmbedding, apply_rotary
from tpjax.layers.weights import parameter
from tpjax.sharding import (
    BIAS,
    COLUMN,
    HEADS,
    REPLICATED,
    HeadPlan,
    constrain,
    key_heads_layout,
    o_proj_layout,
    qkv_layout,
    query_heads_layout,
    tensor_layout,
)


class Attention(nnx.Module):
    """Fused column-parallel q, k and v; attention with each head on one device; row-parallel output.

    The outputs of the fused product are ordered by head slot (see ``HeadPlan``): its queries, its key, its
    value.

    Args:
        config: the architecture.
        plan: the head plan.
        dtype: dtype of weights and activations.
        backend: what computes attention.
    """

    def __init__(self, config: ModelConfig, plan: HeadPlan, dtype: jnp.dtype, backend: Backend = XLA) -> None:
        hidden, head_dim = config.hidden_size, config.attention.head_dim
        self.qkv_proj = Linear(
            qkv_layout(plan, head_dim, hidden),
            qkv_layout(plan, head_dim, None) if config.attention.bias else None,
            COLUMN,
            dtype,
        )
        self.o_proj = RowLinear(
            o_proj_layout(plan, head_dim, hidden),
            tensor_layout("o_proj.bias", (hidden,)) if config.attention.out_bias else None,
            dtype,
            partial_sums=plan.tp if config.parallel else None,
        )
        self.q_norm: Norm | HeadScale
        self.k_norm: Norm | HeadScale
        if config.attention.qk_norm == "head":
            self.q_norm = Norm("q_norm", head_dim, config.norm, dtype)
            self.k_norm = Norm("k_norm", head_dim, config.norm, dtype)
        elif config.attention.qk_norm != "none":
            self.q_norm = HeadScale(query_heads_layout("q_norm.weight", plan, head_dim), dtype)
            self.k_norm = HeadScale(key_heads_layout("k_norm.weight", plan, head_dim), dtype)
        sinks = query_heads_layout("self_attn.sinks", plan, 1)
        self.sinks = parameter(sinks, BIAS, jnp.dtype(jnp.float32)) if config.attention.sinks else None
        self.config = config
        self.plan = plan
        self.backend = backend

    def __call__(
        self,
        x: Float[Array, "N D"],
        rotary: RotaryEmbedding | None,
        cache: LayerCache,
        metadata: BatchMetadata,
        window: int | None,
    ) -> tuple[Float[Array, "*tp N D"], LayerCache]:
        """Returns each device's partial sum over heads, and the cache with the new keys and values."""
        x = constrain(x, REPLICATED)  # all-gather over tp with sequence parallelism
        query, key, value = self._queries_keys_values(x)
        if rotary is not None:
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        head_shape = self.plan.num_head_slots, self.plan.group_size
        scoring: Any = {
            "scale": self.config.attention.query_scale,
            "window": window,
            "softcap": self.config.attention.softcap,
            "sinks": None if self.sinks is None else self.sinks[...].reshape(head_shape),
            "backend": self.backend,
        }
        parts = list(zip(metadata.groups, *map(metadata.split, (query, key, value)), strict=True))
        with jax.named_scope("cache_write"):  # of all groups first: a chunk may continue another
            for group, _, keys, values in parts:
                cache = cache.write(keys, values, group, cache_writer(self.backend))
        outputs = [
            paged_attention(queries, *cache.returned(keys, values), cache, group, **scoring)
            for group, queries, keys, values in parts
        ]
        return self.o_proj(metadata.join(outputs).reshape(len(x), -1)), cache

    def _queries_keys_values(
        self, x: Float[Array, "N D"]
    ) -> tuple[Float[Array, "N K G h"], Float[Array, "N K h"], Float[Array, "N K h"]]:
        """Projects to queries, keys and values; normalises queries and keys."""
        config, plan, group = self.config, self.plan, self.plan.group_size
        head_dim = config.attention.head_dim
        qkv = self.qkv_proj(x).reshape(len(x), plan.num_head_slots, group + 2, head_dim)
        qkv = constrain(qkv, HEADS)
        query, key, value = qkv[..., :group, :], qkv[..., group, :], qkv[..., group + 1, :]
        if config.attention.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        elif config.attention.qk_norm == "each_head":
            query = self.q_norm(normalised(query, config.norm)).astype(x.dtype)
            key = self.k_norm(normalised(key, config.norm)).astype(x.dtype)
        elif config.attention.qk_norm == "projection":
            by_query, by_key = _inverse_rms(qkv, plan, config.norm.eps)
            query, key = query.astype(jnp.float32), key.astype(jnp.float32)
            query = self.q_norm(query * by_query[..., None, None, None]).astype(x.dtype)
            key = self.k_norm(key * by_key[..., None, None]).astype(x.dtype)
        return query, key, value


def _inverse_rms(
    qkv: Float[Array, "N K parts h"], plan: HeadPlan, eps: float
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Returns 1 / RMS of all queries as one vector, and of all keys as one vector; float32.

    Padding heads are zeros. A KV head that fills several head slots counts in the first of them only.
    """
    counted = np.zeros((plan.num_head_slots, plan.group_size + 2, 2), np.float32)
    counted[:, : plan.group_size, 0] = 1
    kv_heads = plan.stored_kv_heads
    for head in range(plan.num_kv_heads):
        counted[kv_heads.index(head), plan.group_size, 1] = 1
    squares = jnp.square(qkv.astype(jnp.float32))
    sums = jnp.einsum("nkph,kpt->nt", squares, counted)
    sums = constrain(sums, REPLICATED)  # all-reduce over tp, two numbers a token
    sizes = np.array([plan.num_heads, plan.num_kv_heads], np.float32) * qkv.shape[-1]
    inverse = jax.lax.rsqrt(sums / sizes + eps)
    return inverse[..., 0], inverse[..., 1]
