"""Multi-head latent attention over a cache of latents (DeepSeek-V2, section 2.1).

The values of all heads are projections of a token's latent [r], and so are their keys, except for the part
with a rotary embedding, which all heads share (https://arxiv.org/abs/2405.04434). The same products are
computed in two ways. For one token, projections are absorbed: ``q · (W c) = (W^T q) · c``. Queries are
multiplied with the cached latents directly, and the bytes read of the cache do not grow with the number of
heads. A chunk that walks pages computes the keys and values of each: a projection per key, but the products
of its many queries are then as wide as a head, not as a latent. A kernel reads the cache as it is stored: for
it a chunk's projections are absorbed too.

Heads are sharded over tp. The latents are replicated, since every head reads all of them. So are the small
projections into latents: sharding those would add an all-gather to the two all-reduces of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tpjax.attention import XLA, Backend, cache_writer, paged_attention
from tpjax.cache import BatchMetadata, LatentCache, LatentPages, TokenGroup
from tpjax.config import ModelConfig
from tpjax.layers.linear import Linear, RowLinear, dot
from tpjax.layers.norm import Norm
from tpjax.layers.rope import RotaryEmbedding, apply_rotary
from tpjax.layers.weights import QuantizedParameter, parameter, split_axis
from tpjax.sharding import (
    COLUMN,
    HEADS,
    REPLICATED,
    HeadPlan,
    concatenated_layout,
    constrain,
    latent_heads_layout,
    o_proj_layout,
    query_heads_layout,
    tensor_layout,
)

_LATENT_NORM_EPS = 1e-6  # the published code fixes it for both latents, whatever the configuration says

KeysValues = tuple[Float[Array, "B K T h"], Float[Array, "B K T v"]]


class LatentAttention(nnx.Module):
    """Replicated projections into latents; column-parallel queries; row-parallel output.

    Args:
        config: the architecture; ``config.attention.latent`` is set.
        plan: the head plan.
        dtype: dtype of weights and activations.
        backend: what computes attention.
    """

    def __init__(self, config: ModelConfig, plan: HeadPlan, dtype: jnp.dtype, backend: Backend = XLA) -> None:
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
        self.kv_b_proj = KeyValueProjection(config, plan.num_padded_heads, dtype)
        self.o_proj = RowLinear(
            o_proj_layout(plan, latent.v_head_dim, hidden),
            tensor_layout("o_proj.bias", (hidden,)) if attention.out_bias else None,
            dtype,
            partial_sums=plan.tp if config.parallel else None,
        )
        self.num_heads = plan.num_padded_heads
        self.config = config
        self.latent = latent
        self.backend = backend

    def __call__(
        self,
        x: Float[Array, "N D"],
        rotary: RotaryEmbedding,
        cache: LatentCache,
        metadata: BatchMetadata,
        window: int | None,
    ) -> tuple[Float[Array, "*tp N D"], LatentCache]:
        """Returns each device's partial sum over heads, and the cache with the new latents."""
        config, rank = self.config, self.latent.kv_lora_rank
        q_rank = self.latent.q_lora_rank or 0
        x = constrain(x, REPLICATED)  # all-gather over tp with sequence parallelism
        queries, latent, rotary_key = jnp.split(self.a_proj(x), [q_rank, q_rank + rank], -1)
        queries = x if self.q_a_layernorm is None else self.q_a_layernorm(queries)
        query = self.q_proj(queries).reshape(len(x), self.num_heads, 1, config.attention.head_dim)
        query = constrain(query, HEADS)
        query, rotary_query = jnp.split(query, [config.attention.head_dim - config.rotated_dim], -1)
        rotary_query, rotary_key = apply_rotary(rotary_query, rotary), apply_rotary(rotary_key, rotary)
        latents = jnp.concatenate([self.kv_a_layernorm(latent), rotary_key], -1)[:, None]
        parts = list(zip(metadata.groups, *map(metadata.split, (query, rotary_query, latents)), strict=True))
        with jax.named_scope("cache_write"):  # of all groups first: a chunk may continue another
            for group, _, _, part in parts:
                cache = cache.write(part, group, cache_writer(self.backend))
        outputs = [
            self._attend(group, queries, rotary_queries, cache.returned(part), cache, window)
            for group, queries, rotary_queries, part in parts
        ]
        return self.o_proj(metadata.join(outputs).reshape(len(x), -1)), cache

    def _attend(
        self,
        group: TokenGroup,
        query: Float[Array, "B S K 1 n"],
        rotary_query: Float[Array, "B S K 1 rotary"],
        latents: Float[Array, "B S 1 r"],
        cache: LatentCache,
        window: int | None,
    ) -> Float[Array, "B S K 1 v"]:
        """Attends from one group of tokens to the cache, which holds their own latents already."""
        config, rank = self.config, self.latent.kv_lora_rank
        absorbed = not group.chunks or self.backend.is_kernel
        pages: LatentPages | _ExpandedPages
        if absorbed:
            query = self.kv_b_proj.absorb(query)
            key, value, pages = latents, latents[..., :rank], LatentPages(cache, rank)
        else:
            expand = self.kv_b_proj.expand
            key, value = (part.swapaxes(1, 2) for part in expand(latents.swapaxes(1, 2)))
            pages = _ExpandedPages(cache, expand)
        query = jnp.concatenate([query, rotary_query], -1)
        output = paged_attention(
            query,
            key,
            value,
            pages,
            group,
            scale=config.attention.query_scale,
            window=window,
            softcap=config.attention.softcap,
            backend=self.backend,
        )
        return self.kv_b_proj.project_values(output) if absorbed else output


class KeyValueProjection(nnx.Module):
    """Projects latents to the keys and values of all heads.

    The checkpoint holds one matrix with the rows of each head's key and then of its value. Here keys and
    values are stored apart: a single token needs them in two different products, and a slice of a weight
    would be copied at every step.

    Args:
        config: the architecture; ``config.attention.latent`` is set.
        num_heads: heads over all devices, padding included.
        dtype: dtype of the weights.
    """

    def __init__(self, config: ModelConfig, num_heads: int, dtype: jnp.dtype) -> None:
        attention, latent = config.attention, config.attention.latent
        assert latent is not None
        self.rank = latent.kv_lora_rank
        key_dim, value_dim = attention.head_dim - config.rotated_dim, latent.v_head_dim

        def declare(start: int, size: int) -> nnx.Param:
            layout = latent_heads_layout(
                "kv_b_proj.weight",
                attention.num_heads,
                num_heads,
                rows=range(start, start + size),
                per_head=key_dim + value_dim,
                rank=self.rank,
            )
            return parameter(layout, COLUMN, dtype, inputs=1)

        self.key = declare(0, key_dim)
        self.value = declare(key_dim, value_dim)
        self.num_heads = num_heads

    def absorb(self, query: Float[Array, "B S K 1 n"]) -> Float[Array, "B S K 1 r"]:
        """Projects queries so that their product with a latent is the query's product with its key."""
        return self._dot(query, self.key, "bskgn,knr->bskgr")

    def project_values(self, latents: Float[Array, "B S K 1 r"]) -> Float[Array, "B S K 1 v"]:
        """Projects each head's weighted sum of latents to its weighted sum of values."""
        return self._dot(latents, self.value, "bskgr,kvr->bskgv")

    def expand(self, latents: Float[Array, "B 1 T r"]) -> KeysValues:
        """Computes the keys of each head, rotary part included, and its values."""
        latent, rotary_key = jnp.split(latents, [self.rank], -1)
        keys = self._dot(latent[:, 0], self.key, "btr,knr->bktn")
        values = self._dot(latent[:, 0], self.value, "btr,kvr->bktv")
        rotary_key = jnp.broadcast_to(rotary_key, (*keys.shape[:3], rotary_key.shape[-1]))
        return jnp.concatenate([keys, rotary_key], -1), values

    def _dot(
        self, x: Float[Array, "*x"], weight: nnx.Param | QuantizedParameter, subscripts: str
    ) -> Float[Array, "*out"]:
        return dot(x, split_axis(weight[...], 0, (self.num_heads, -1)), subscripts)


@dataclass(frozen=True)
class _ExpandedPages:
    """Presents cached latents to :func:`paged_attention` as pages of the keys and values of all heads."""

    cache: LatentCache
    expand: Callable[[Float[Array, "B 1 T r"]], KeysValues]
    stored: None = None  # what is read is computed

    @property
    def page_size(self) -> int:
        return self.cache.page_size

    def read(self, pages: Int[Array, " B"]) -> KeysValues:
        return self.expand(self.cache.read(pages))
