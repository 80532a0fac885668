"""The whole architecture on one screen.

Dimension letters, here and everywhere: B batch, S positions, D hidden, H query heads, K KV heads (slots of
the ``HeadPlan``), G query heads per KV head, h head_dim, F MLP width, V vocabulary;
E experts, k experts a token, N tokens.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tpjax.cache import LatentCache, LayerCache, PagedKVCache, Placement
from tpjax.config import ModelConfig
from tpjax.layers.attention import Attention
from tpjax.layers.latent_attention import LatentAttention
from tpjax.layers.linear import Embedding
from tpjax.layers.mlp import MLP
from tpjax.layers.moe import MoE
from tpjax.layers.norm import RMSNorm
from tpjax.layers.rope import Rotation, rotation
from tpjax.sharding import LOGITS, REPLICATED, constrain


class DecoderLayer(nnx.Module):
    """Attention and MLP, each normed going in, and coming out too where ``sandwich_norms``.

    Args:
        config: the architecture.
        tp: devices.
        dtype: of weights and activations.
        sparse: a mixture of experts stands in for the MLP.
    """

    def __init__(self, config: ModelConfig, tp: int, dtype: jnp.dtype, *, sparse: bool) -> None:
        def norm(name: str) -> RMSNorm:
            return RMSNorm(f"{name}.weight", config.hidden_size, config, dtype)

        self.input_layernorm = norm("input_layernorm")
        # each takes the kind of cache that ``cache_layout`` gives it
        self.self_attn: Any = (LatentAttention if config.latent else Attention)(config, tp, dtype)
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm") if config.sandwich_norms else None
        self.mlp = MoE(config, tp, dtype) if sparse else MLP(config, tp, dtype)
        self.post_feedforward_layernorm = (
            norm("post_feedforward_layernorm") if config.sandwich_norms else None
        )

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rotation: Rotation,
        cache: LayerCache | LatentCache,
        at: Placement,
        window: int | None,
    ) -> tuple[Float[Array, "B S D"], LayerCache | LatentCache]:
        """The residual after this layer, on every device, and its cache."""
        mixed, cache = self.self_attn(self.input_layernorm(x), rotation, cache, at, window)
        mixed = constrain(mixed, REPLICATED)  # all-reduce over tp
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            x = x + mixed
            x = x + constrain(self.mlp(self.post_attention_layernorm(x)), REPLICATED)  # all-reduce over tp
        else:
            x = x + self.post_attention_layernorm(mixed)
            mixed = constrain(self.mlp(self.pre_feedforward_layernorm(x)), REPLICATED)  # all-reduce over tp
            x = x + self.post_feedforward_layernorm(mixed)
        return x, cache


class Decoder(nnx.Module):
    """A decoder-only transformer over a paged cache.

    Args:
        config: the architecture.
        tp: devices of the mesh; decides padding and the order of heads.
        dtype: of weights and activations.
    """

    def __init__(self, config: ModelConfig, tp: int, dtype: jnp.dtype) -> None:
        self.config = config
        self.embed_tokens = Embedding("embed_tokens.weight", config.vocab_size, config.hidden_size, tp, dtype)
        self.layers = nnx.List(
            [DecoderLayer(config, tp, dtype, sparse=sparse) for sparse in config.sparse_layers]
        )
        self.norm = RMSNorm("norm.weight", config.hidden_size, config, dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Embedding("lm_head.weight", config.vocab_size, config.hidden_size, tp, dtype)
        )

    def __call__(
        self, tokens: Int[Array, "B S"], cache: PagedKVCache, at: Placement
    ) -> tuple[Float[Array, "B S D"], PagedKVCache]:
        """Final hidden states of the tokens, and the cache with their keys and values."""
        config = self.config
        x = constrain(self.embed_tokens(tokens), REPLICATED)  # all-reduce over tp
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
        rotations = {
            kind: rotation(config.rope_of(kind), config.rotated_dim, at.positions)
            for kind in dict.fromkeys(config.layer_types)
        }
        written = []
        for layer, layer_cache, kind in zip(self.layers, cache, config.layer_types, strict=True):
            x, layer_cache = layer(x, rotations[kind], layer_cache, at, config.window_of(kind))
            written.append(layer_cache)
        return self.norm(x), tuple(written)

    def logits(self, hidden: Float[Array, "N D"]) -> Float[Array, "N V"]:
        """Scores of the padded vocabulary, float32, cut along V; padding scores minus infinity."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        scores = constrain(head.attend(hidden), LOGITS)  # stays sharded: no collective
        token = jnp.arange(scores.shape[-1])
        return jnp.where(token < self.config.vocab_size, scores, -jnp.inf)
