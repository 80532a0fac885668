"""Multi-head latent attention over a cache of latents (DeepSeek-V2, section 2.1).

A token's latent [r] gives every head's value, and its key but for the part that rotates, which all heads
share (https://arxiv.org/abs/2405.04434). The same product is computed in two ways. One token at a time,
projections are absorbed: ``q · (W c) = (W^T q) · c``, so that queries meet the cached latents as they are,
and what is read of the cache does not grow with the number of heads. A chunk computes the keys and values of
each page it walks: a projection per key, but the products of its many queries are then as wide as a head, not
as a latent.

Heads are cut over tp. The latents are the same on every device, since every head reads all of them. So are
the small projections into latents: cutting those would add a gather to the two all-reduces of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tpjax.attention import paged_attention
from tpjax.cache import BatchMetadata, LatentCache
from tpjax.config import ModelConfig
from tpjax.layers.linear import Linear, RowLinear, dot, parameter
from tpjax.layers.norm import Norm
from tpjax.layers.rope import Rotation, rotate
from tpjax.sharding import (
    COLUMN,
    HEAD_ROWS,
    HEADS,
    REPLICATED,
    HeadPlan,
    concatenated_layout,
    constrain,
    latent_head_layout,
    o_proj_layout,
    query_heads_layout,
    tensor_layout,
)

_LATENT_NORM_EPS = 1e-6  # of both latents' norms in the published code, whatever the configuration says

KeysValues = tuple[Float[Array, "B K T h"], Float[Array, "B K T v"]]


class LatentAttention(nnx.Module):
    """Replicated projections into latents; column-parallel queries; row-parallel output."""

    def __init__(self, config: ModelConfig, plan: HeadPlan, dtype: jnp.dtype) -> None:
        attention, latent, hidden = config.attention, config.attention.latent, config.hidden_size
        assert latent is not None
        q_rank = latent.q_lora_rank or 0
        latents = {"q_a_proj": q_rank} if q_rank else {}
        latents["kv_a_proj_with_mqa"] = latent.kv_lora_rank + config.rotated_dim
        self.a_proj = Linear(
            concatenated_layout(latents, hidden),
            concatenated_layout(latents, None) if attention.bias else None,
            REPLICATED,
            dtype,
        )
        norms = replace(config.norm, eps=_LATENT_NORM_EPS)
        self.q_a_layernorm = Norm("q_a_layernorm", q_rank, norms, dtype) if q_rank else None
        self.kv_a_layernorm = Norm("kv_a_layernorm", latent.kv_lora_rank, norms, dtype)
        queries = "q_b_proj.weight" if q_rank else "q_proj.weight"
        self.q_proj = Linear(
            query_heads_layout(queries, plan, attention.head_dim, in_features=q_rank or hidden),
            None,
            COLUMN,
            dtype,
        )
        self.kv_b_proj = KeyValueProjection(config, plan, dtype)
        self.o_proj = RowLinear(
            o_proj_layout(plan, latent.v_head_dim, hidden),
            tensor_layout("o_proj.bias", (hidden,)) if attention.out_bias else None,
            dtype,
        )
        self.num_heads = plan.num_padded_heads
        self.config = config
        self.latent = latent

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rotation: Rotation,
        cache: LatentCache,
        at: BatchMetadata,
        window: int | None,
    ) -> tuple[Float[Array, "*shares B S D"], LatentCache]:
        """Each device's share of the sum over heads, and the cache with the new latents."""
        config, rank = self.config, self.latent.kv_lora_rank
        q_rank = self.latent.q_lora_rank or 0
        x = constrain(x, REPLICATED)  # all-gather over tp where the residual is cut over positions
        queries, latent, key_turn = jnp.split(self.a_proj(x), [q_rank, q_rank + rank], -1)
        queries = x if self.q_a_layernorm is None else self.q_a_layernorm(queries)
        query = self.q_proj(queries).reshape(*x.shape[:2], self.num_heads, 1, config.attention.head_dim)
        query = constrain(query, HEADS)
        query, query_turn = jnp.split(query, [config.attention.head_dim - config.rotated_dim], -1)
        query_turn, key_turn = rotate(query_turn, rotation), rotate(key_turn, rotation)
        latents = jnp.concatenate([self.kv_a_layernorm(latent), key_turn], -1)[:, :, None]
        cache = cache.write(latents, at)

        absorbed = x.shape[1] == 1
        if absorbed:
            query = self.kv_b_proj.absorb(query)
            view = _View(cache, lambda cached: (cached, cached[..., :rank]))
        else:
            view = _View(cache, self.kv_b_proj.expand)
        key, value = (part.swapaxes(1, 2) for part in view.compute(latents.swapaxes(1, 2)))
        query = jnp.concatenate([query, query_turn], -1)
        mixed = paged_attention(
            query,
            key,
            value,
            view,
            at,
            scale=config.attention.query_scale,
            window=window,
            softcap=config.attention.softcap,
        )
        if absorbed:
            mixed = self.kv_b_proj.values_of(mixed)
        return self.o_proj(mixed.reshape(*x.shape[:2], -1)), cache


class KeyValueProjection(nnx.Module):
    """From a latent to the keys and values of all heads.

    The checkpoint holds one matrix, head by head the key's rows and the value's. Here the two are apart: one
    token needs each in another product, and a slice of a weight would be copied at every step.
    """

    def __init__(self, config: ModelConfig, plan: HeadPlan, dtype: jnp.dtype) -> None:
        latent = config.attention.latent
        assert latent is not None
        self.rank = latent.kv_lora_rank
        key_dim, value_dim = config.attention.head_dim - config.rotated_dim, latent.v_head_dim

        def declare(start: int, size: int) -> nnx.Param:
            layout = latent_head_layout(
                "kv_b_proj.weight", plan, start=start, size=size, per_head=key_dim + value_dim, rank=self.rank
            )
            return parameter(layout, HEAD_ROWS, dtype)

        self.key = declare(0, key_dim)
        self.value = declare(key_dim, value_dim)
        self.num_heads = plan.num_padded_heads

    def absorb(self, query: Float[Array, "B S K 1 n"]) -> Float[Array, "B S K 1 r"]:
        """What a query multiplies a latent with, to get its product with the latent's key."""
        return self._dot(query, self.key, "bskgn,knr->bskgr")

    def values_of(self, mixed: Float[Array, "B S K 1 r"]) -> Float[Array, "B S K 1 v"]:
        """Each head's value of a mix of latents."""
        return self._dot(mixed, self.value, "bskgr,kvr->bskgv")

    def expand(self, latents: Float[Array, "B 1 T r"]) -> KeysValues:
        """Each head's keys, with the part that rotates, and values."""
        latent, turned = jnp.split(latents, [self.rank], -1)
        keys = self._dot(latent[:, 0], self.key, "btr,knr->bktn")
        values = self._dot(latent[:, 0], self.value, "btr,kvr->bktv")
        turned = jnp.broadcast_to(turned, (*keys.shape[:3], turned.shape[-1]))
        return jnp.concatenate([keys, turned], -1), values

    def _dot(self, x: Float[Array, "*x"], weight: nnx.Param, subscripts: str) -> Float[Array, "*out"]:
        return dot(x, weight[...].reshape(self.num_heads, -1, self.rank), subscripts)


@dataclass(frozen=True)
class _View:
    """Cached latents as the keys and values that :func:`paged_attention` walks."""

    cache: LatentCache
    compute: Callable[[Float[Array, "B 1 T r"]], KeysValues]

    @property
    def page_size(self) -> int:
        return self.cache.page_size

    def read(self, pages: Int[Array, " B"]) -> KeysValues:
        return self.compute(self.cache.read(pages))
