"""How modules declare their weights: as parameters, or kept in 8 bits with a scale for each output."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from tpjax.config import Quantize
from tpjax.sharding import Layout

STORED_DTYPES: dict[Quantize, jnp.dtype] = {
    "int8": jnp.dtype(jnp.int8),
    "fp8": jnp.dtype(jnp.float8_e4m3fn),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is kept in 8 bits: ``values * scales``.

    Attributes:
        values: int8 or float8 e4m3.
        scales: one for each output; the axes of ``values``, with size 1 where inputs share a scale.
        spec: how ``values`` are sharded; means nothing inside ``shard_map``, where each device has its own.
    """

    values: Shaped[Array, "*weight"]
    scales: Float[Array, "*scales"]
    spec: PartitionSpec = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.values.shape


Weight: TypeAlias = Float[Array, "..."] | QuantizedWeight


def split_axis(weight: Weight, axis: int, sizes: tuple[int, ...]) -> Weight:
    """Splits an axis of a weight into several.

    Args:
        weight: the weight.
        axis: the axis.
        sizes: sizes of the axes in its place; one of them may be -1.
    """

    def split(x: Array) -> Array:
        new = sizes if x.shape[axis] > 1 else (1,) * len(sizes)  # of scales: inputs share one
        return x.reshape(*x.shape[:axis], *new, *x.shape[axis + 1 :])

    parts = jax.tree.map(split, weight)
    if isinstance(weight, QuantizedWeight):  # the first of the new axes stays sharded
        spec = [*weight.spec, *[None] * (len(weight.shape) - len(weight.spec))]
        spec[axis + 1 : axis + 1] = [None] * (len(sizes) - 1)
        parts = replace(parts, spec=PartitionSpec(*spec))
    return parts


def specs_of(weight: Weight, spec: PartitionSpec) -> PartitionSpec | QuantizedWeight:
    """Returns the specs of the arrays of a weight whose values are sharded as ``spec`` says."""
    if not isinstance(weight, QuantizedWeight):
        return spec
    parts = zip(spec, weight.scales.shape, strict=True)
    scales = PartitionSpec(*(None if size == 1 else part for part, size in parts))
    specs: dict[str, Any] = {"values": spec, "scales": scales}
    return replace(weight, **specs)


def parameter(
    layout: Layout, spec: PartitionSpec, dtype: jnp.dtype, *, inputs: int | None = None
) -> nnx.Param:
    """Declares a parameter: its stored shape, its sharding, and the canonical tensors it is made of.

    The loader reads all of these back from the abstract model; nothing else lists parameters.

    Args:
        layout: stored shape and canonical tensors.
        spec: its sharding.
        dtype: its dtype.
        inputs: of a weight that :func:`quantize_weights` may keep in 8 bits: the stored axis of the inputs,
            which share the scale of their output; ``None``: it stays as it is.
    """
    return nnx.Param(jnp.zeros(layout.shape, dtype), out_sharding=tuple(spec), layout=layout, inputs=inputs)


class QuantizedParameter(nnx.Module):
    """The parameters of a weight that is kept in 8 bits.

    Args:
        layout: layout of the weight.
        spec: its sharding; scales are sharded as the outputs that they belong to.
        dtype: dtype of the values.
        inputs: stored axis of the inputs, which share the scale of their output.
    """

    def __init__(self, layout: Layout, spec: PartitionSpec, dtype: jnp.dtype, inputs: int) -> None:
        parts = [*spec, *[None] * (len(layout.shape) - len(spec))]
        del parts[inputs]
        self.values = parameter(layout, spec, dtype)
        self.scales = parameter(
            layout.per_output(inputs),
            PartitionSpec(*parts) if any(parts) else PartitionSpec(),
            jnp.dtype(jnp.float32),
        )
        self.inputs = inputs

    def __getitem__(self, index: EllipsisType) -> QuantizedWeight:
        """Returns the weight."""
        spec = PartitionSpec(*self.values.get_metadata("out_sharding"))
        scales = jnp.expand_dims(self.scales[index], self.inputs)
        return QuantizedWeight(self.values[index], scales, spec)


def quantize_weights(model: nnx.Module, kind: Quantize) -> None:
    """Replaces every parameter that declares its inputs by values of 8 bits and their scales.

    Values are zeros: the loader fills them.
    """
    for _, module in list(nnx.iter_modules(model)):
        for name, value in list(vars(module).items()):
            inputs = value.get_metadata("inputs") if isinstance(value, nnx.Param) else None
            if inputs is not None:
                layout, spec = (
                    value.get_metadata("layout"),
                    PartitionSpec(*value.get_metadata("out_sharding")),
                )
                setattr(module, name, QuantizedParameter(layout, spec, STORED_DTYPES[kind], inputs))
