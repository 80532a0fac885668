"""The products with weights, and the modules that hold nearly all weights: projections and embeddings."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tpjax.layers.products import Terms, product, spread
from tpjax.layers.weights import QuantizedWeight, Weight, parameter, split_axis
from tpjax.layers.widening import product_on_tpu, quantized_rows, widened_product
from tpjax.sharding import (
    PARTIAL_SUMS,
    REPLICATED,
    ROW,
    VOCAB,
    WeightLayout,
    constrain,
    pad_to_multiple,
    tensor_layout,
)


def dot(
    x: Float[Array, "*x"],
    weight: Weight,
    subscripts: str,
    *,
    dtype: jnp.dtype | type | None = None,
    precision: jax.lax.Precision | None = None,
) -> Float[Array, "*out"]:
    """Multiplies activations by a weight: every product with a weight is this one, or :func:`grouped_dot`.

    Args:
        x: activations.
        weight: the weight in its stored order. No caller transposes it: that would copy it at every step. One
            that is kept in 8 or 4 bits is widened inside the product, and each output multiplied by its
            scale, or the sum over each group of inputs by the group's.
        subscripts: which axes are contracted, as ``einsum`` takes them, activations first: ``...i,io->...o``.
        dtype: dtype of the result; ``None``: that of ``x``, so that an all-reduce of bfloat16 products moves
            bfloat16. Accelerators accumulate in float32 all the same.
        precision: precision of the multiplication; ``None``: the backend's default.
    """
    dtype = dtype or x.dtype
    if not isinstance(weight, QuantizedWeight):
        return product(x, weight, subscripts, dtype=dtype, precision=precision)
    if weight.number is not None:
        return product_on_tpu(x, weight, dtype=dtype)
    # Products of float16 and unscaled values could exceed its range.
    summed = jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype
    widened = partial(widened_product, subscripts=subscripts, dtype=summed, precision=precision)
    if not weight.per_output:
        return widened(x, weight, scaled=True).astype(dtype)
    scales = weight.scales.astype(jnp.float32)
    inputs, axes, outputs = Terms.of(subscripts)
    scales_inputs = any(
        size > 1 and axis not in outputs for axis, size in zip(axes, weight.scales.shape, strict=True)
    )
    if scales_inputs:  # an output of the checkpoint's matrix is summed over here
        x = (x.astype(jnp.float32) * spread(scales, axes, inputs, x.ndim)).astype(x.dtype)
    y = widened(x, weight, scaled=False)
    if not scales_inputs:
        y = y.astype(jnp.float32) * spread(scales, axes, outputs, y.ndim)
    return y.astype(dtype)


def grouped_dot(
    x: Float[Array, "M D"], weights: Weight, group_sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """Multiplies each run of rows by its own weight of a stack.

    Args:
        x: rows, sorted by the weight they are multiplied by.
        weights: the stack [E, D, F]; of a quantised one each output has one scale.
        group_sizes: rows for each weight.
    """
    if not isinstance(weights, QuantizedWeight):
        return jax.lax.ragged_dot(x, weights, group_sizes, preferred_element_type=x.dtype)
    values = weights.values.astype(x.dtype)
    y = jax.lax.ragged_dot(x, values, group_sizes, preferred_element_type=jnp.float32)
    group = jnp.repeat(jnp.arange(group_sizes.size), group_sizes, total_repeat_length=x.shape[0])
    return (y * weights.scales[:, 0][group].astype(jnp.float32)).astype(x.dtype)


class Linear(nnx.Module):
    """``y = x @ weight.T + bias``: no collective.

    The weight keeps the checkpoint's order, [out, in], here and in :class:`RowLinear`: nothing is transposed
    while it is loaded, TPUs read it in this order for the few rows of a decode step (as [in, out] each step
    had a relayout of it: two layers of Llama-3-8B and the head took an estimated 0.57 ms on v5e:2x4, not
    0.41), and so do CPUs (:func:`tpjax.layers.products.product`).

    Args:
        weight: layout of the weight.
        bias: layout of the bias; ``None``: there is none.
        spec: ``COLUMN``: each device computes some of the outputs; ``REPLICATED``: each computes all.
        dtype: dtype of both.
    """

    def __init__(
        self, weight: WeightLayout, bias: WeightLayout | None, spec: PartitionSpec, dtype: jnp.dtype
    ) -> None:
        self.weight = parameter(weight, spec, dtype, inputs=1, swappable=True)
        self.bias = None if bias is None else parameter(bias, PartitionSpec(*spec[:1]), dtype)
        self.spec = spec

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Returns the outputs, sharded as ``spec`` says."""
        weight = self.weight[...]
        y = dot(x, weight, f"...i,{_axes(weight)}->...o")
        return y if self.bias is None else y + self.bias[...]


class RowLinear(nnx.Module):
    """``y = x @ weight.T + bias`` with the weight [out, in] sharded along in: an all-reduce follows.

    Args:
        weight: layout of the weight.
        bias: layout of the bias; ``None``: there is none.
        dtype: dtype of both.
        partial_sums: devices, if the caller adds further products before the reduction; ``None``: the product
            is reduced by itself.
    """

    def __init__(
        self,
        weight: WeightLayout,
        bias: WeightLayout | None,
        dtype: jnp.dtype,
        partial_sums: int | None = None,
    ) -> None:
        self.weight = parameter(weight, ROW, dtype, inputs=1, swappable=True)
        self.bias = None if bias is None else parameter(bias, REPLICATED, dtype)
        self.partial_sums = partial_sums

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "... out"]:
        """Returns the sum over all inputs; the all-reduce happens where the caller fixes its layout.

        With ``partial_sums``, returns one partial sum per device along a new first axis: no collective.
        """
        if self.partial_sums is not None:
            return self._partial_sums(x, self.partial_sums)
        weight = self.weight[...]
        y = dot(x, weight, f"...i,{_axes(weight)}->...o")
        return y if self.bias is None else y + self.bias[...]

    def _partial_sums(self, x: Float[Array, "*batch in"], tp: int) -> Float[Array, "tp *batch out"]:
        inputs = x.reshape(*x.shape[:-1], tp, -1)
        weight = self.weight[...]
        if _axes(weight) == "io":
            y = dot(inputs, split_axis(weight, 0, (tp, -1)), "...ti,tio->t...o")
        else:
            y = dot(inputs, split_axis(weight, 1, (tp, -1)), "...ti,oti->t...o")
        y = constrain(y, PARTIAL_SUMS)
        if self.bias is None:
            return y
        first = (jnp.arange(tp) == 0).reshape(-1, *[1] * (y.ndim - 1))
        return y + jnp.where(first, self.bias[...], 0)


def _axes(weight: Weight) -> str:
    """Returns the order in which a matrix is stored: ``oi``, or ``io`` of some that are quantised."""
    return "io" if isinstance(weight, QuantizedWeight) and weight.inputs == -2 else "oi"


class Embedding(nnx.Module):
    """Token embeddings [V, D], sharded along the vocabulary; also the vocabulary projection if tied.

    Args:
        source: canonical name of the tensor, relative to the parent module.
        vocab_size: V.
        hidden_size: D.
        tp: devices; V is zero-padded to a multiple.
        dtype: dtype of the weight.
    """

    def __init__(self, source: str, vocab_size: int, hidden_size: int, tp: int, dtype: jnp.dtype) -> None:
        padded = pad_to_multiple(vocab_size, tp)
        layout = tensor_layout(source, (vocab_size, hidden_size), padded=padded)
        self.weight = parameter(layout, VOCAB, dtype, inputs=1)
        self.dtype = dtype

    def __call__(self, tokens: Int[Array, " N"]) -> Float[Array, "N D"]:
        """Looks up the rows of tokens."""
        weight = self.weight[...]
        if isinstance(weight, QuantizedWeight):
            return quantized_rows(weight, tokens, self.dtype)
        return weight.at[tokens].get(mode="clip")

    def attend(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Computes the logits of the padded vocabulary, float32, sharded along V."""
        return dot(x, self.weight[...], "...d,vd->...v", dtype=jnp.dtype(jnp.float32))


class PositionEmbedding(nnx.Module):
    """Learned position embeddings [positions, D], replicated.

    Args:
        source: canonical name of the tensor, relative to the parent module.
        positions: longest sequence, tokens.
        hidden_size: D.
        dtype: dtype of the weight.
    """

    def __init__(self, source: str, positions: int, hidden_size: int, dtype: jnp.dtype) -> None:
        self.weight = parameter(tensor_layout(source, (positions, hidden_size)), REPLICATED, dtype)

    def __call__(self, positions: Int[Array, " N"]) -> Float[Array, "N D"]:
        """Looks up the rows of positions; the padding of a chunk may lie beyond the last."""
        return self.weight[...].at[positions].get(mode="clip")
