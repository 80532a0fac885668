"""How modules declare their weights: as parameters, or kept in 8 or 4 bits with scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from tpjax.attention import XLA, Backend
from tpjax.config import Quantize
from tpjax.sharding import SCALE_SUFFIX, ZERO_SUFFIX, Layout, WeightLayout

_FLOAT32 = jnp.dtype(jnp.float32)


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is kept in 8 or 4 bits: ``(values - zeros) * scales``.

    Attributes:
        values: dtype of the values: int8, float8 e4m3, int4 or float4 e2m1.
        group: inputs that share a scale of an output; ``None``: all of them.
        scales: dtype of the scales.
        zeros: whether each scale has a zero point beside it, int8.
    """

    values: jnp.dtype
    group: int | None = None
    scales: jnp.dtype = _FLOAT32
    zeros: bool = False

    def values_on(self, platform: str) -> jnp.dtype:
        """Returns the dtype of the values in a device's memory.

        XLA's CPU backend widens whole arrays of 4 bits before it takes a part of one, and its GPU backend
        those of float4: these take a byte each there.
        """
        wide = {jnp.dtype(jnp.float4_e2m1fn): jnp.dtype(jnp.float8_e4m3fn)}
        if platform == "cpu":
            wide[jnp.dtype(jnp.int4)] = jnp.dtype(jnp.int8)
        return self.values if platform == "tpu" else wide.get(self.values, self.values)

    @property
    def described(self) -> str:
        """Names the format in messages."""
        names = {"float8_e4m3fn": "float8", "float4_e2m1fn": "float4"}
        shared = "each output" if self.group is None else f"{self.group} inputs of each output"
        zeros = " and a zero point" if self.zeros else ""
        return f"{names.get(self.values.name, self.values.name)} with a scale{zeros} for {shared}"


def dtype_bits(dtype: jnp.dtype) -> int:
    """Returns the bits of an element in a device's memory; numpy gives a byte to those of 4 bits."""
    narrow = dtype in (jnp.dtype(jnp.int4), jnp.dtype(jnp.float4_e2m1fn))
    return 4 if narrow else 8 * jnp.dtype(dtype).itemsize


FORMATS: dict[Quantize, WeightFormat] = {
    "int8": WeightFormat(jnp.dtype(jnp.int8)),
    "fp8": WeightFormat(jnp.dtype(jnp.float8_e4m3fn)),
    "int4": WeightFormat(jnp.dtype(jnp.int4), 128, jnp.dtype(jnp.bfloat16)),
}
_HEAD_FORMATS: dict[Quantize, Quantize] = {"int8": "int8", "fp8": "fp8", "int4": "int8"}
FormatOf: TypeAlias = Callable[[str], WeightFormat | None]  # of a canonical tensor; None: it stays as it is


def rounded_format(quantize: Quantize, *, head: bool = False) -> WeightFormat:
    """Returns what weights are rounded to: embedding and head to 8 bits at least.

    Args:
        quantize: the user's choice.
        head: of embedding and head.
    """
    return FORMATS[_HEAD_FORMATS[quantize] if head else quantize]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is kept in 8 or 4 bits: ``(values - zeros) * scales``.

    Attributes:
        values: as a :class:`WeightFormat` says.
        scales: with the axes of ``values``: along that of the inputs, one for each group of as many.
        zeros: zero points, int8, in the shape of the scales; ``None``: all are 0.
        spec: how ``values`` are sharded; means nothing inside ``shard_map``, where each device has its own.
        inputs: axis of the checkpoint's inputs, counted from the last, -1.
        backend: where it is a kernel, so is the product with scales for groups of inputs.
        number: which of a stack of weights it is, for the kernel for TPUs; ``None``: it is no stack.
    """

    values: Shaped[Array, "*weight"]
    scales: Float[Array, "*scales"]
    zeros: Int[Array, "*scales"] | None
    spec: PartitionSpec = field(metadata={"static": True})
    inputs: int = field(metadata={"static": True})
    backend: Backend = field(default=XLA, metadata={"static": True})
    number: Int[Array, ""] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.values.shape

    @property
    def per_output(self) -> bool:
        """Whether outputs have one scale each and no zero point: the outputs of a product can be scaled."""
        return self.zeros is None and self.scales.shape[self.inputs] == 1


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
        more = len(sizes) - 1
        spec = [*weight.spec, *[None] * (len(weight.shape) - len(weight.spec))]
        spec[axis + 1 : axis + 1] = [None] * more
        behind = axis - len(weight.shape) > weight.inputs  # the inputs' axis is counted from the last
        inputs = weight.inputs - more if behind else weight.inputs
        parts = replace(parts, spec=PartitionSpec(*spec), inputs=inputs)
    return parts


def specs_of(weight: Weight, spec: PartitionSpec) -> PartitionSpec | QuantizedWeight:
    """Returns the specs of the arrays of a weight whose values are sharded as ``spec`` says."""
    if not isinstance(weight, QuantizedWeight):
        return spec
    whole = (*spec, *[None] * (len(weight.shape) - len(spec)))
    parts = zip(whole, weight.scales.shape, strict=True)
    scales = PartitionSpec(*(None if size == 1 else part for part, size in parts))
    zeros = None if weight.zeros is None else scales
    specs: dict[str, Any] = {"values": spec, "scales": scales, "zeros": zeros}
    return replace(weight, **specs)


def parameter(
    layout: Layout,
    spec: PartitionSpec,
    dtype: jnp.dtype,
    *,
    inputs: int | None = None,
    swappable: bool = False,
) -> nnx.Param:
    """Declares a parameter: its stored shape, its sharding, and the canonical tensors it is made of.

    The loader reads all of these back from the abstract model; nothing else lists parameters.

    Args:
        layout: stored shape and canonical tensors.
        spec: its sharding.
        dtype: its dtype.
        inputs: of a weight that :func:`quantize_weights` may keep in 8 or 4 bits: the stored axis of the
            inputs; ``None``: it stays as it is.
        swappable: a matrix [out, in] whose module takes it as [in, out] too, where it is kept in 8 or 4 bits.
    """
    metadata: dict[str, Any] = {"layout": layout, "inputs": inputs, "swappable": swappable}
    return nnx.Param(jnp.zeros(layout.shape, dtype), out_sharding=tuple(spec), **metadata)


class QuantizedParameter(nnx.Module):
    """The parameters of a weight that is kept in 8 or 4 bits.

    A CPU keeps it in the checkpoint's order, [out, in]: in int4 SmolLM2-135M decodes 1.2 times as fast so.
    TPUs keep it with its inputs first, [in, out]: for 8 rows by [1792, 4096] a v5e takes an estimated 10k
    cycles in int8 then, 19k as [out, in], and 14k in groups of 128, 93k as [out, in]. In bfloat16 it takes
    8k, and 27k to read the weight. GPUs keep it so where it has scales for groups of inputs and the kernel
    does not take it.

    Args:
        layout: layout of the weight.
        spec: its sharding; scales are sharded as the outputs and inputs that they belong to.
        kept: how it is kept.
        inputs: stored axis of the inputs.
        tp: devices.
        platform: of the devices.
        backend: as of :class:`QuantizedWeight`.
        swappable: it may be stored as [in, out].
    """

    def __init__(
        self,
        layout: Layout,
        spec: PartitionSpec,
        kept: WeightFormat,
        inputs: int,
        tp: int,
        platform: str,
        backend: Backend = XLA,
        *,
        swappable: bool = False,
    ) -> None:
        parts = [*spec, *[None] * (len(layout.shape) - len(spec))]
        dtype = kept.values_on(platform)
        self.group: int | None = None  # stored inputs that share a scale
        self.outputs_first = False  # for the kernel for GPUs, whose scales are [groups, out]
        zeros: nnx.Param | None = None
        if kept.group is None and not kept.zeros:
            if platform == "tpu" and swappable and isinstance(layout, WeightLayout):
                layout, spec, inputs = layout.swapped(), PartitionSpec(*reversed(parts)), 0
                parts.reverse()
            self.values = parameter(layout, spec, dtype)
            del parts[inputs]
            spec = PartitionSpec(*parts) if any(parts) else PartitionSpec()
            self.scales = parameter(layout.per_output(inputs), spec, kept.scales)
        else:
            self.group = layout.stored_group(inputs, kept.group, tp if parts[inputs] else 1)
            if isinstance(layout, WeightLayout):
                outputs = layout.shape[1 - inputs] // (tp if parts[1 - inputs] else 1)
                self.outputs_first = _gpu_kernel_takes(backend, dtype, self.group, outputs)
                by_rows = self.outputs_first or (
                    platform == "cpu" and backend.name != "tpu"
                )  # or interpreted
                if swappable and not by_rows:
                    layout, spec, inputs = layout.swapped(), PartitionSpec(*reversed(parts)), 0
                    parts.reverse()
            self.values = parameter(layout, spec, dtype)
            axis = inputs
            if self.outputs_first and isinstance(layout, WeightLayout):
                layout, spec, axis = layout.swapped(), PartitionSpec(*reversed(parts)), 0
            of_scales, of_zeros = (
                layout.per_group(axis, self.group, suffix) for suffix in (SCALE_SUFFIX, ZERO_SUFFIX)
            )
            self.scales = parameter(of_scales, spec, kept.scales)
            if kept.zeros:
                zeros = parameter(of_zeros, spec, jnp.dtype(jnp.int8))
        self.zeros = zeros
        self.inputs = inputs
        self.kept = kept
        by_kernel = self.outputs_first or (backend.name == "tpu" and self.group is not None)
        self.backend = backend if by_kernel else XLA

    def __getitem__(self, index: EllipsisType) -> QuantizedWeight:
        """Returns the weight."""
        spec = PartitionSpec(*self.values.get_metadata("out_sharding"))
        values, scales = self.values[index], self.scales[index]
        zeros = None if self.zeros is None else self.zeros[index]
        if self.group is None:
            scales = jnp.expand_dims(scales, self.inputs)
        if self.outputs_first:
            scales, zeros = scales.T, None if zeros is None else zeros.T
        return QuantizedWeight(values, scales, zeros, spec, self.inputs - len(values.shape), self.backend)


def _gpu_kernel_takes(backend: Backend, values: jnp.dtype, group: int, outputs: int) -> bool:
    """Returns whether the kernel for GPUs multiplies by a matrix of such values with scales for groups."""
    if backend.name != "gpu" or not backend.products:
        return False
    from tpjax.layers import quantized_gpu  # Pallas is imported where it is used: that takes a while

    return quantized_gpu.supports(dtype_bits(values), group, outputs)


def quantize_weights(
    model: nnx.Module, format_of: FormatOf, tp: int, platform: str, backend: Backend = XLA
) -> None:
    """Replaces parameters that declare their inputs by values of 8 or 4 bits and their scales, all zeros.

    The loader fills them. A parameter whose canonical tensors are not all kept in one format stays as it is.

    Args:
        model: the model.
        format_of: returns how a canonical tensor is kept.
        tp: devices.
        platform: of the devices.
        backend: where it is a kernel, so are products with scales for groups of inputs.
    """
    for path, module in list(nnx.iter_modules(model)):
        for name, value in list(vars(module).items()):
            inputs = value.get_metadata("inputs") if isinstance(value, nnx.Param) else None
            if inputs is None:
                continue
            layout = value.get_metadata("layout")
            sources = (".".join(map(str, (*path[:-1], one))) for one in layout.canonical_shapes())
            formats = set(map(format_of, sources))
            kept = formats.pop()
            if kept is not None and not formats:
                spec = PartitionSpec(*value.get_metadata("out_sharding"))
                swappable = value.get_metadata("swappable")
                quantized = QuantizedParameter(
                    layout, spec, kept, inputs, tp, platform, backend, swappable=swappable
                )
                setattr(module, name, quantized)
