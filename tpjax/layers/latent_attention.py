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

from tpjax.cache import BatchMetadata, LatentCache
from tpjax.config import ModelConfig
from tpjax.layers.attention import paged_attention
from tpjax.layers.linear import ColumnLinear, ReplicatedLinear, RowLinear, parameter
from tpjax.layers.norm import Norm
from tpjax.layers.rope import Rotation, rotate
from tpjax.sharding import (
    HEAD_ROWS,
    HEADS,
    REPLICATED,
    HeadPlan,
    Segment,
    WeightLayout,
    column_layout,
    constrain,
    row_layout,
    tensor_layout,
)

_LATENT_NORM_EPS = 1e-6  # of both latents' norms in the published code, whatever the configuration says

KeysValues = tuple[Float[Array, "B K T h"], Float[Array, "B K T v"]]


class LatentAttention(nnx.Module):
    """Replicated projections into latents; column-parallel queries; row-parallel output."""

    def __init__(self, config: ModelConfig, tp: int, dtype: jnp.dtype) -> None:
        assert config.latent is not None
        latent, hidden, heads = config.latent, config.hidden_size, config.num_heads
        self.num_heads = HeadPlan(heads, heads, tp).num_slots
        q_rank = latent.q_lora_rank or 0
        latents = {"kv_a_proj_with_mqa": latent.kv_lora_rank + config.rotated_dim}
        if q_rank:
            latents = {"q_a_proj": q_rank, **latents}

        def into_latents(kind: str) -> WeightLayout:
            sizes = {f"{name}.{kind}": size for name, size in latents.items()}
            segments = [
                Segment(name, 0, size, q_rank if name.startswith("kv") else 0) for name, size in sizes.items()
            ]
            inputs = hidden if kind == "weight" else None
            return column_layout(sum(sizes.values()), segments, sizes, in_features=inputs)

        norms = replace(config, norm_eps=_LATENT_NORM_EPS)
        self.a_proj = ReplicatedLinear(
            into_latents("weight"), into_latents("bias") if config.attention_bias else None, dtype
        )
        self.q_a_layernorm = Norm("q_a_layernorm", q_rank, norms, dtype) if q_rank else None
        self.kv_a_layernorm = Norm("kv_a_layernorm", latent.kv_lora_rank, norms, dtype)
        queries = "q_b_proj.weight" if q_rank else "q_proj.weight"
        width = heads * config.head_dim
        self.q_proj = ColumnLinear(
            column_layout(
                self.num_heads * config.head_dim,
                [Segment(queries, 0, width, 0)],
                {queries: width},
                in_features=q_rank or hidden,
            ),
            None,
            dtype,
        )
        self.kv_b_proj = KeyValueProjection(config, self.num_heads, dtype)
        width = heads * latent.v_head_dim
        self.o_proj = RowLinear(
            row_layout(
                self.num_heads * latent.v_head_dim,
                [Segment("o_proj.weight", 0, width, 0)],
                {"o_proj.weight": width},
                out_features=hidden,
            ),
            tensor_layout("o_proj.bias", (hidden,)) if config.attention_out_bias else None,
            dtype,
        )
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
        query = self.q_proj(queries).reshape(*x.shape[:2], self.num_heads, 1, config.head_dim)
        query = constrain(query, HEADS)
        query, query_turn = jnp.split(query, [config.head_dim - config.rotated_dim], -1)
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
            query, key, value, view, at, scale=config.query_scale, window=window, softcap=config.attn_softcap
        )
        if absorbed:
            mixed = self.kv_b_proj.values_of(mixed)
        return self.o_proj(mixed.reshape(*x.shape[:2], -1)), cache


class KeyValueProjection(nnx.Module):
    """From a latent to the keys and values of all heads.

    The checkpoint holds one matrix, head by head the key's rows and the value's. Here the two are apart: one
    token needs each in another product, and a slice of a weight would be copied at every step.
    """

    def __init__(self, config: ModelConfig, num_heads: int, dtype: jnp.dtype) -> None:
        assert config.latent is not None
        rank, name = config.latent.kv_lora_rank, "kv_b_proj.weight"
        key_dim, value_dim = config.head_dim - config.rotated_dim, config.latent.v_head_dim
        both = key_dim + value_dim

        def declare(start: int, size: int) -> nnx.Param:
            segments = tuple(
                Segment(name, head * both + start, size, head * size) for head in range(config.num_heads)
            )
            layout = WeightLayout((num_heads * size, rank), 0, segments, ((name, config.num_heads * both),))
            return parameter(layout, HEAD_ROWS, dtype)

        self.key = declare(0, key_dim)
        self.value = declare(key_dim, value_dim)
        self.num_heads = num_heads
        self.rank = rank

    def absorb(self, query: Float[Array, "B S K 1 n"]) -> Float[Array, "B S K 1 r"]:
        """What a query multiplies a latent with, to get its product with the latent's key."""
        return self._product("bskgn,knr->bskgr", query, self.key)

    def values_of(self, mixed: Float[Array, "B S K 1 r"]) -> Float[Array, "B S K 1 v"]:
        """Each head's value of a mix of latents."""
        return self._product("bskgr,kvr->bskgv", mixed, self.value)

    def expand(self, latents: Float[Array, "B 1 T r"]) -> KeysValues:
        """Each head's keys, with the part that rotates, and values."""
        latent, turned = jnp.split(latents, [self.rank], -1)
        keys = self._product("btr,knr->bktn", latent[:, 0], self.key)
        values = self._product("btr,kvr->bktv", latent[:, 0], self.value)
        turned = jnp.broadcast_to(turned, (*keys.shape[:3], turned.shape[-1]))
        return jnp.concatenate([keys, turned], -1), values

    def _product(self, indices: str, x: Float[Array, "*x"], weight: nnx.Param) -> Float[Array, "*y"]:
        heads = weight[...].reshape(self.num_heads, -1, self.rank)
        return jnp.einsum(indices, x, heads, preferred_element_type=x.dtype)


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
