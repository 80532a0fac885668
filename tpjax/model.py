"""The architecture on one screen.

Dimension letters, here and everywhere: N tokens of a step, in groups of B sequences with S tokens each;
D hidden, H query heads, K KV heads (head slots of the ``HeadPlan``), G query heads per KV head, h head_dim,
F MLP width, V vocabulary; E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tpjax.activations import soft_capped
from tpjax.attention import XLA, Backend
from tpjax.cache import BatchMetadata, LatentCache, LayerCache, PagedKVCache
from tpjax.config import Block, LayerType, ModelConfig, Quantize
from tpjax.layers.attention import Attention
from tpjax.layers.latent_attention import LatentAttention
from tpjax.layers.linear import Embedding, PositionEmbedding
from tpjax.layers.mlp import MLP
from tpjax.layers.moe import MoE
from tpjax.layers.norm import Norm
from tpjax.layers.rope import RotaryEmbedding, rotary_embedding
from tpjax.sharding import LOGITS, REPLICATED, HeadPlan, constrain, head_plan, reduce_partials


class BlockNorms(NamedTuple):
    """Names of the norms before and after attention and MLP; ``None``: there is no norm."""

    attention_input: str | None
    attention_output: str | None
    mlp_input: str | None
    mlp_output: str | None


BLOCK_NORMS: dict[Block, BlockNorms] = {
    "pre": BlockNorms("input_layernorm", None, "post_attention_layernorm", None),
    "post": BlockNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "sandwich": BlockNorms(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "parallel": BlockNorms("input_layernorm", None, "input_layernorm", None),
    "parallel_two_norms": BlockNorms("input_layernorm", None, "post_attention_layernorm", None),
}


class DecoderLayer(nnx.Module):
    """Attention and MLP, each added to the residual; ``BLOCK_NORMS`` says where the norms are.

    The residual is replicated, or sharded over tokens (``sharding.SEQUENCE_PARALLEL``). With sequence
    parallelism, norms and sums compute 1/tp of the rows, and each all-reduce becomes an all-gather before
    attention or MLP and a reduce-scatter of their partial sums.

    Args:
        config: the architecture.
        plan: the head plan.
        dtype: dtype of weights and activations.
        sparse: the layer has a mixture of experts in place of the MLP.
        backend: what computes attention, and on GPUs experts.
    """

    def __init__(
        self, config: ModelConfig, plan: HeadPlan, dtype: jnp.dtype, *, sparse: bool, backend: Backend = XLA
    ) -> None:
        # each takes the kind of cache that ``cache_layout`` gives it
        attention: Any = LatentAttention if config.attention.latent else Attention
        self.self_attn = attention(config, plan, dtype, backend)
        self.mlp = (
            MoE(config, plan.tp, dtype, backend)
            if sparse
            else MLP(config.mlp, config.hidden_size, plan.tp, dtype, partial_sums=config.parallel)
        )
        for name in filter(None, BLOCK_NORMS[config.block]):
            setattr(self, name, Norm(name, config.hidden_size, config.norm, dtype))
        self.config = config

    def __call__(
        self,
        x: Float[Array, "N D"],
        rotary: RotaryEmbedding | None,
        cache: LayerCache | LatentCache,
        metadata: BatchMetadata,
        window: int | None,
        residual: PartitionSpec,
    ) -> tuple[Float[Array, "N D"], LayerCache | LatentCache]:
        """Returns the residual after this layer, in the layout ``residual``, and the cache of the layer."""
        norms = BLOCK_NORMS[self.config.block]
        normed = self._normed(norms.attention_input, x)
        with jax.named_scope("attention"):
            y, cache = self.self_attn(normed, rotary, cache, metadata, window)
        if self.config.parallel:
            if norms.mlp_input != norms.attention_input:
                normed = self._normed(norms.mlp_input, x)
            y = y + self._mlp(normed, metadata)
            return self._add(x, reduce_partials(y, residual)), cache  # one all-reduce over tp for both
        y = constrain(y, residual)  # all-reduce or reduce-scatter over tp
        x = self._add(x, self._normed(norms.attention_output, y))
        normed = self._normed(norms.mlp_input, x)
        y = constrain(self._mlp(normed, metadata), residual)  # all-reduce or reduce-scatter over tp
        return self._add(x, self._normed(norms.mlp_output, y)), cache

    def _mlp(self, x: Float[Array, "N D"], metadata: BatchMetadata) -> Float[Array, "*tp N D"]:
        """Returns each device's partial sum of the MLP or the experts."""
        with jax.named_scope("mlp"):
            return self.mlp(x, metadata.present) if isinstance(self.mlp, MoE) else self.mlp(x)

    def _normed(self, name: str | None, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        return x if name is None else getattr(self, name)(x)

    def _add(self, x: Float[Array, "N D"], y: Float[Array, "N D"]) -> Float[Array, "N D"]:
        scale = self.config.residual_scale
        return x + y if scale == 1 else x + y * jnp.asarray(scale, x.dtype)


@partial(jax.jit, static_argnames=("graph", "window", "residual"))
def _decoder_layer(
    weights: nnx.State,
    x: Float[Array, "N D"],
    rotary: RotaryEmbedding | None,
    cache: LayerCache | LatentCache,
    metadata: BatchMetadata,
    *,
    graph: nnx.GraphDef[DecoderLayer],
    window: int | None,
    residual: PartitionSpec,
) -> tuple[Float[Array, "N D"], LayerCache | LatentCache]:
    """Runs a layer of split parts: layers of equal structure are traced and lowered once, not one by one.

    XLA inlines the calls. A model of 30 layers is lowered in a sixth of the time.
    """
    return nnx.merge(graph, weights)(x, rotary, cache, metadata, window, residual)


class Decoder(nnx.Module):
    """A decoder-only transformer over a paged cache, or the part of it that a pipeline stage runs.

    The first stage has the embedding, the last the final norm and the vocabulary projection; a tied embedding
    is on both. In between, a stage takes hidden states and returns hidden states. Its layers are numbered
    from 0 in ``layers``, whichever of the model's they are.

    Args:
        config: the architecture, of the whole model.
        tp: devices of the mesh; decides padding and the order of heads.
        dtype: dtype of weights and activations.
        backend: what computes attention.
        layers: which of the model's layers these are; ``None``: all.

    Attributes:
        quantize: what the weights of attention, MLPs and experts are kept in; ``None``: ``dtype``.
        layer_range: numbers of its layers in the model.
    """

    quantize: Quantize | None = None

    def __init__(
        self,
        config: ModelConfig,
        tp: int,
        dtype: jnp.dtype,
        backend: Backend = XLA,
        layers: range | None = None,
    ) -> None:
        self.config = config
        self.tp = tp
        self.backend = backend
        self.layer_range = range(config.num_layers) if layers is None else layers
        if self.is_first or (self.is_last and config.tie_word_embeddings):
            self.embed_tokens = Embedding(
                "embed_tokens.weight", config.vocab_size, config.hidden_size, tp, dtype
            )
        if self.is_first and config.position_embedding == "learned":
            self.embed_positions = PositionEmbedding(
                "embed_positions.weight", config.max_position_embeddings, config.hidden_size, dtype
            )
        plan = head_plan(config, tp)
        self.layers = nnx.List(
            [
                DecoderLayer(config, plan, dtype, sparse=config.sparse_layers[i], backend=backend)
                for i in self.layer_range
            ]
        )
        if self.is_last:
            self.norm = Norm("norm", config.hidden_size, config.norm, dtype)
        self.lm_head = (
            Embedding("lm_head.weight", config.vocab_size, config.hidden_size, tp, dtype)
            if self.is_last and not config.tie_word_embeddings
            else None
        )

    @property
    def is_first(self) -> bool:
        """Whether its layers are the model's first: it takes token ids."""
        return self.layer_range.start == 0

    @property
    def is_last(self) -> bool:
        """Whether its layers are the model's last: it computes logits."""
        return self.layer_range.stop == self.config.num_layers

    def __call__(
        self,
        tokens: Int[Array, " N"] | Float[Array, "N D"],
        cache: PagedKVCache,
        metadata: Sequence[BatchMetadata],
        residual: PartitionSpec = REPLICATED,
    ) -> tuple[Float[Array, "N D"], PagedKVCache]:
        """Returns the hidden states of the tokens after its layers, and the cache with keys and values.

        After the model's last layer they are normalised.

        Args:
            tokens: token ids of a step, in the order of the groups of ``metadata``, then padding; after the
                first stage, their hidden states, in the layout ``residual``.
            cache: the cache of its layers.
            metadata: positions of the tokens and, of each page group, the block tables.
            residual: layout of the residual and of the result: ``REPLICATED`` or ``SEQUENCE_PARALLEL``.
        """
        config = self.config
        x = self._embed(tokens, metadata[0], residual) if self.is_first else tokens
        rotary = self._rotary_embeddings(metadata[0])
        entries = list(cache.entries)
        for i, layer, place in zip(self.layer_range, self.layers, cache.places, strict=True):
            kind = config.attention.layer_types[i]
            layer_rotary = rotary[kind] if config.rotates(i) else None
            graph, weights = nnx.split(layer)
            x, entries[place.entry] = _decoder_layer(
                weights,
                x,
                layer_rotary,
                entries[place.entry],
                metadata[place.group],
                graph=graph,
                window=config.attention.window_of(kind),
                residual=residual,
            )
        return self.norm(x) if self.is_last else x, cache.with_entries(entries)

    def _embed(
        self, tokens: Int[Array, " N"], metadata: BatchMetadata, residual: PartitionSpec
    ) -> Float[Array, "N D"]:
        with jax.named_scope("embed"):
            x = constrain(self.embed_tokens(tokens), REPLICATED)  # all-reduce over tp
            x = constrain(x, residual) * jnp.asarray(self.config.embedding_scale, x.dtype)
            if self.config.position_embedding == "learned":
                x = x + self.embed_positions(metadata.positions)
            return x

    def _rotary_embeddings(self, metadata: BatchMetadata) -> dict[LayerType, RotaryEmbedding]:
        """Computes the rotary embedding of each type of layer."""
        config = self.config
        if config.position_embedding != "rope":
            return {}
        with jax.named_scope("rotary_embedding"):
            return {
                kind: rotary_embedding(
                    config.rope.parameters_of(kind),
                    config.rotated_dim,
                    metadata.positions,
                    metadata.max_length,
                )
                for kind in dict.fromkeys(config.attention.layer_types[i] for i in self.layer_range)
            }

    def logits(self, hidden: Float[Array, "N D"]) -> Float[Array, "N V"]:
        """Returns the logits of the padded vocabulary, float32, sharded along V; padding gets -inf."""
        with jax.named_scope("logits"):
            head = self.embed_tokens if self.lm_head is None else self.lm_head
            hidden = constrain(hidden, REPLICATED)  # all-gather over tp with sequence parallelism
            logits = constrain(head.attend(hidden), LOGITS)  # stays sharded: no collective
            logits = soft_capped(logits * self.config.logit_scale, self.config.logit_softcap)
            token = jnp.arange(logits.shape[-1])
            return jnp.where(token < self.config.vocab_size, logits, -jnp.inf)
