"""Projections and the embedding: what bears nearly all the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tpjax.sharding import (
    BIAS,
    COLUMN,
    PARTIAL_SUMS,
    REPLICATED,
    ROW,
    VOCAB,
    Layout,
    WeightLayout,
    constrain,
    pad_to_multiple,
    tensor_layout,
)


def parameter(layout: Layout, spec: PartitionSpec, dtype: jnp.dtype) -> nnx.Param:
    """Declares a parameter: its stored shape, its sharding, and what of the checkpoint it is made of.

    The loader reads all three back from the abstract model; nothing else lists parameters.
    """
    return nnx.Param(jnp.zeros(layout.shape, dtype), out_sharding=tuple(spec), layout=layout)


class ColumnLinear(nnx.Module):
    """``y = x @ weight + bias`` with the weight stored [in, out] and cut along out: no collective.

    Args:
        weight: layout of the weight.
        bias: layout of the bias, if there is one.
        dtype: of both.
    """

    def __init__(self, weight: WeightLayout, bias: WeightLayout | None, dtype: jnp.dtype) -> None:
        self.weight = parameter(weight, COLUMN, dtype)
        self.bias = None if bias is None else parameter(bias, BIAS, dtype)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Each device's share of the outputs."""
        y = jnp.matmul(x, self.weight[...], preferred_element_type=x.dtype)
        return y if self.bias is None else y + self.bias[...]


class ReplicatedLinear(nnx.Module):
    """``y = x @ weight + bias`` with the weight stored [in, out], whole on every device: no collective.

    Args:
        weight: layout of the weight.
        bias: layout of the bias, if there is one.
        dtype: of both.
    """

    def __init__(self, weight: WeightLayout, bias: WeightLayout | None, dtype: jnp.dtype) -> None:
        self.weight = parameter(weight, REPLICATED, dtype)
        self.bias = None if bias is None else parameter(bias, REPLICATED, dtype)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """All outputs, on every device."""
        y = jnp.matmul(x, self.weight[...], preferred_element_type=x.dtype)
        return y if self.bias is None else y + self.bias[...]


class RowLinear(nnx.Module):
    """``y = x @ weight.T + bias`` with the weight stored [out, in] and cut along in: an all-reduce follows.

    The weight lies as the checkpoint has it. With one row of ``x``, contracting along the last axis of both
    reads memory in order: SmolLM2's ``down_proj`` runs at 36 GB/s on a CPU that way, at 25 as [in, out].

    Args:
        weight: layout of the weight.
        bias: layout of the bias, if there is one.
        dtype: of both.
        shares: devices, where the caller adds products up before it sums their shares; ``None``: a sum.
    """

    def __init__(
        self, weight: WeightLayout, bias: WeightLayout | None, dtype: jnp.dtype, shares: int | None = None
    ) -> None:
        self.weight = parameter(weight, ROW, dtype)
        self.bias = None if bias is None else parameter(bias, REPLICATED, dtype)
        self.shares = shares

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "... out"]:
        """The sum over all devices' inputs; where the caller fixes its layout, the all-reduce happens.

        With ``shares``, each device's own part of it, along a first axis that is cut: no collective.
        """
        if self.shares is not None:
            inputs = x.reshape(*x.shape[:-1], self.shares, -1)
            weight = self.weight[...].reshape(-1, *inputs.shape[-2:])
            y = jnp.einsum("...ti,oti->t...o", inputs, weight, preferred_element_type=x.dtype)
            y = constrain(y, PARTIAL_SUMS)
            if self.bias is None:
                return y
            first = (jnp.arange(self.shares) == 0).reshape(-1, *[1] * (y.ndim - 1))
            return y + jnp.where(first, self.bias[...], 0)
        # The result keeps the activations' dtype, so that the all-reduce moves bfloat16 where the model is
        # bfloat16. Accelerators accumulate a product in float32 all the same.
        y = _contract_last(x, self.weight[...], x.dtype)
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
        self.weight = parameter(tensor_layout(source, (vocab_size, hidden_size), padded=padded), VOCAB, dtype)

    def __call__(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Looks up tokens."""
        return self.weight[...].at[tokens].get(mode="clip")

    def attend(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Scores every token of the padded vocabulary, in float32."""
        return _contract_last(x, self.weight[...], jnp.float32)


class PositionEmbedding(nnx.Module):
    """A learned vector per position [positions, D], on every device.

    Args:
        source: canonical name of the tensor, relative to the parent module.
        positions: longest sequence, tokens.
        hidden_size: D.
        dtype: of the weight.
    """

    def __init__(self, source: str, positions: int, hidden_size: int, dtype: jnp.dtype) -> None:
        self.weight = parameter(tensor_layout(source, (positions, hidden_size)), REPLICATED, dtype)

    def __call__(self, positions: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Looks up positions; those of a chunk's padding may lie beyond the last."""
        return self.weight[...].at[positions].get(mode="clip")


def _contract_last(
    x: Float[Array, "*batch in"], weight: Float[Array, "out in"], dtype: jnp.dtype | type
) -> Float[Array, "*batch out"]:
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)
