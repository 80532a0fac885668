"""The whole architecture on one screen.

Dimension letters, here and everywhere: B batch, S positions, D hidden, H query heads, K KV heads (head slots
of the ``HeadPlan``), G query heads per KV head, h head_dim, F MLP width, V vocabulary;
E experts, k experts a token, N tokens.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tpjax.activations import soft_capped
from tpjax.cache import BatchMetadata, LatentCache, LayerCache, PagedKVCache
from tpjax.config import LayerType, ModelConfig
from tpjax.layers.attention import Attention
from tpjax.layers.latent_attention import LatentAttention
from tpjax.layers.linear import Embedding, PositionEmbedding
from tpjax.layers.mlp import MLP
from tpjax.layers.moe import MoE
from tpjax.layers.norm import Norm
from tpjax.layers.rope import Rotation, rotation
from tpjax.sharding import LOGITS, REPLICATED, HeadPlan, constrain, head_plan, reduce_partials


class DecoderLayer(nnx.Module):
    """Attention and MLP, each added to the residual; ``config.block`` says where the layer norms.

    The residual is replicated, or sharded over positions (``sharding.SEQUENCE_PARALLEL``). With sequence
    parallelism, norms and sums compute 1/tp of the rows, and each all-reduce becomes an all-gather before
    attention or MLP and a reduce-scatter of their partial sums.

    Args:
        config: the architecture.
        plan: the head plan.
        dtype: dtype of weights and activations.
        sparse: a mixture of experts stands in for the MLP.
    """

    def __init__(self, config: ModelConfig, plan: HeadPlan, dtype: jnp.dtype, *, sparse: bool) -> None:
        def norm(name: str) -> Norm:
            return Norm(name, config.hidden_size, config.norm, dtype)

        if config.block != "post":
            self.input_layernorm = norm("input_layernorm")
        # each takes the kind of cache that ``cache_layout`` gives it
        self.self_attn: Any = (LatentAttention if config.attention.latent else Attention)(config, plan, dtype)
        if config.block != "parallel":
            self.post_attention_layernorm = norm("post_attention_layernorm")
        if config.block == "sandwich":
            self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm")
        self.mlp = (
            MoE(config, plan.tp, dtype)
            if sparse
            else MLP(config.mlp, config.hidden_size, plan.tp, dtype, partial_sums=config.parallel)
        )
        if config.block in ("sandwich", "post"):
            self.post_feedforward_layernorm = norm("post_feedforward_layernorm")
        self.block = config.block
        self.scale = config.residual_scale

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rotation: Rotation | None,
        cache: LayerCache | LatentCache,
        at: BatchMetadata,
        window: int | None,
        residual: PartitionSpec,
    ) -> tuple[Float[Array, "B S D"], LayerCache | LatentCache]:
        """The residual after this layer, in the layout ``residual``, and the layer's cache."""
        normed = x if self.block == "post" else self.input_layernorm(x)
        mixed, cache = self.self_attn(normed, rotation, cache, at, window)
        if self.block in ("parallel", "parallel_two_norms"):
            read = normed if self.block == "parallel" else self.post_attention_layernorm(x)
            mixed = reduce_partials(mixed + self.mlp(read), residual)  # all-reduce over tp, one for both
            return self._add(x, mixed), cache
        mixed = constrain(mixed, residual)  # all-reduce or reduce-scatter over tp
        match self.block:
            case "pre":
                x = self._add(x, mixed)
                mixed = constrain(self.mlp(self.post_attention_layernorm(x)), residual)  # likewise
            case "sandwich":
                x = self._add(x, self.post_attention_layernorm(mixed))
                mixed = constrain(self.mlp(self.pre_feedforward_layernorm(x)), residual)  # likewise
                mixed = self.post_feedforward_layernorm(mixed)
            case "post":
                x = self._add(x, self.post_attention_layernorm(mixed))
                mixed = constrain(self.mlp(x), residual)  # likewise
                mixed = self.post_feedforward_layernorm(mixed)
        return self._add(x, mixed), cache

    def _add(self, x: Float[Array, "B S D"], mixed: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return x + mixed if self.scale == 1 else x + mixed * jnp.asarray(self.scale, x.dtype)


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
        if config.position_embedding == "learned":
            self.embed_positions = PositionEmbedding(
                "embed_positions.weight", config.max_position_embeddings, config.hidden_size, dtype
            )
        plan = head_plan(config, tp)
        self.layers = nnx.List(
            [DecoderLayer(config, plan, dtype, sparse=sparse) for sparse in config.sparse_layers]
        )
        self.norm = Norm("norm", config.hidden_size, config.norm, dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Embedding("lm_head.weight", config.vocab_size, config.hidden_size, tp, dtype)
        )

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        cache: PagedKVCache,
        at: BatchMetadata,
        residual: PartitionSpec = REPLICATED,
    ) -> tuple[Float[Array, "B S D"], PagedKVCache]:
        """Final hidden states of the tokens, and the cache with their keys and values.

        Args:
            tokens: of a step or a chunk.
            cache: of all layers.
            at: where the tokens sit.
            residual: layout of the residual, and of what comes out: ``REPLICATED`` or ``SEQUENCE_PARALLEL``.
        """
        config = self.config
        x = constrain(self.embed_tokens(tokens), REPLICATED)  # all-reduce over tp
        x = constrain(x, residual) * jnp.asarray(config.embedding_scale, x.dtype)
        rotations: dict[LayerType, Rotation] = {}
        if config.position_embedding == "learned":
            x = x + self.embed_positions(at.positions)
        else:
            rotations = {
                kind: rotation(
                    config.rope.parameters_of(kind), config.rotated_dim, at.positions, at.max_length
                )
                for kind in dict.fromkeys(config.attention.layer_types)
            }
        written = []
        for i, (layer, layer_cache) in enumerate(zip(self.layers, cache, strict=True)):
            kind = config.attention.layer_types[i]
            turn = rotations[kind] if config.rotates(i) else None
            x, layer_cache = layer(x, turn, layer_cache, at, config.attention.window_of(kind), residual)
            written.append(layer_cache)
        return self.norm(x), tuple(written)

    def logits(self, hidden: Float[Array, "N D"]) -> Float[Array, "N V"]:
        """Scores of the padded vocabulary, float32, cut along V; padding scores minus infinity."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        hidden = constrain(hidden, REPLICATED)  # all-gather over tp where positions are cut
        scores = constrain(head.attend(hidden), LOGITS)  # stays sharded: no collective
        scores = soft_capped(scores * self.config.logit_scale, self.config.logit_softcap)
        token = jnp.arange(scores.shape[-1])
        return jnp.where(token < self.config.vocab_size, scores, -jnp.inf)
