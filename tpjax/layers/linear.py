"""Projections and the embedding: what bears nearly all the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tpjax.sharding import VOCAB, WeightLayout, pad_to_multiple, whole


def parameter(layout: WeightLayout, spec: PartitionSpec, dtype: jnp.dtype) -> nnx.Param:
    """Declares a parameter: its stored shape, its sharding, and what of the checkpoint it is made of.

    The loader reads all three back from the abstract model; nothing else lists parameters.
    """
    return nnx.Param(jnp.zeros(layout.shape, dtype), out_sharding=tuple(spec), layout=layout)


class Linear(nnx.Module):
    """``y = x @ weight + bias``, the weight stored [in, out].

    Args:
        weight: layout of the weight.
        spec: ``COLUMN`` or ``ROW``.
        bias: layout of the bias, if there is one.
        bias_spec: ``BIAS`` after a column-parallel product, ``REPLICATED`` after a row-parallel one.
        dtype: of weight and bias.
    """

    def __init__(
        self,
        weight: WeightLayout,
        spec: PartitionSpec,
        *,
        dtype: jnp.dtype,
        bias: WeightLayout | None = None,
        bias_spec: PartitionSpec | None = None,
    ) -> None:
        self.weight = parameter(weight, spec, dtype)
        self.bias = None if bias is None else parameter(bias, bias_spec or PartitionSpec(), dtype)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Multiplies by the weight and adds the bias."""
        # The result keeps the activations' dtype, so that the all-reduce after a row-parallel product moves
        # bfloat16 where the model is bfloat16. Accelerators accumulate in float32 all the same.
        y = jnp.matmul(x, self.weight[...], preferred_element_type=x.dtype)
        return y if self.bias is None else y + self.bias[...]


class Embedding(nnx.Module):
    """Token embeddings [V, D], cut along the vocabulary; also the vocabulary projection where tied.

    Args:
        source: canonical name of the tensor, relative to the parent module.
        vocab_size: V.
        hidden_size: D.
        tp: devices; V is zero-padded to a multiple.
        dtype: of the weight.
    """

    def __init__(self, source: str, vocab_size: int, hidden_size: int, tp: int, dtype: jnp.dtype) -> None:
        padded = pad_to_multiple(vocab_size, tp)
        self.weight = parameter(whole(source, (vocab_size, hidden_size), padded=padded), VOCAB, dtype)

    def __call__(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Looks up tokens."""
        return self.weight[...].at[tokens].get(mode="clip")

    def attend(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Scores every token of the padded vocabulary, in float32."""
        return jax.lax.dot_general(
            x,
            self.weight[...],
            (((x.ndim - 1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
