"""Products with weights of 8 or 4 bits, each widened to the activations' dtype inside the product.

TPUs and GPUs fuse the widening into the product: the weight is read as it lies, and no wide copy of it
exists. XLA's CPU backend writes the copy of every weight of the program to memory first: a decode step of
SmolLM2-135M takes 9 times as long that way as in float32. There a loop widens blocks that stay in a core's
cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from tpjax.layers.products import Terms, place_of, product, spread
from tpjax.layers.weights import QuantizedWeight, specs_of
from tpjax.mesh import AXIS
from tpjax.sharding import PARTIAL_SUMS

_BLOCK_ELEMENTS = 1 << 18  # a megabyte of float32
_FEW_TOKENS, _LARGE_BLOCK_ELEMENTS = 32, 1 << 20  # a product of more tokens wants wider blocks
_LEAST_COLUMNS = 128  # of a weight [in, out], whose rows are read in pieces then: two cache lines or more


def widened_product(
    x: Float[Array, "*x"],
    weight: QuantizedWeight,
    subscripts: str,
    *,
    dtype: jnp.dtype | type,
    precision: jax.lax.Precision | None,
    scaled: bool,
) -> Float[Array, "*out"]:
    """Multiplies activations by a weight.

    Args:
        x: activations; axes that ``subscripts`` do not name are replicated.
        weight: the weight.
        subscripts: as for :func:`tpjax.layers.linear.dot`.
        dtype: dtype of the result.
        precision: precision of the multiplication.
        scaled: by the weight, which has scales for groups of inputs; else by its values alone.
    """
    settings: Any = {"subscripts": subscripts, "dtype": dtype, "precision": precision}
    kernel = _kernel(x, weight, subscripts, scaled=scaled)
    if kernel is not None:
        return _on_each_device(partial(kernel, dtype=dtype), x, weight, subscripts=subscripts)

    def on_each_device(product: Callable[..., Array], **more: Any) -> Callable[..., Array]:
        return partial(_on_each_device, partial(product, **settings, **more), subscripts=subscripts)

    cpu = on_each_device(product_by_blocks, scaled=scaled)
    if not scaled:
        at_once = partial(_product_at_once, **settings)
        return jax.lax.platform_dependent(x, weight, cpu=cpu, default=at_once)
    # Of row-parallel weights the partitioner adds up the float32 sums of devices; XLA for TPUs rounds them
    # before that, XLA for GPUs does not.
    by_groups = partial(product_by_groups, **settings)
    gpu = on_each_device(product_by_groups)
    return jax.lax.platform_dependent(x, weight, cpu=cpu, tpu=by_groups, default=gpu)


def _product_at_once(
    x: Float[Array, "*x"],
    weight: QuantizedWeight,
    *,
    subscripts: str,
    dtype: jnp.dtype | type,
    precision: jax.lax.Precision | None,
) -> Float[Array, "*out"]:
    wide = weight.values.astype(x.dtype)
    return jnp.einsum(subscripts, x, wide, precision=precision, preferred_element_type=dtype)


def product_by_groups(
    x: Float[Array, "*x"],
    weight: QuantizedWeight,
    *,
    subscripts: str,
    dtype: jnp.dtype | type,
    precision: jax.lax.Precision | None,
) -> Float[Array, "*out"]:
    """Computes one product for each group of inputs, and scales its sums: no widened weight exists.

    Where the product's outputs are the checkpoint's inputs, activations are scaled for each group instead.
    """
    inputs, axes, outputs = Terms.of(subscripts)
    axis = len(axes) + weight.inputs
    letter, groups = axes[axis], weight.scales.shape[axis]
    grouped = axes.replace(letter, f"z{letter}")  # z counts the groups
    of_scales = axes.replace(letter, "z")
    shape = (*weight.shape[:axis], groups, -1, *weight.shape[axis + 1 :])
    values = weight.values.reshape(shape).astype(x.dtype)
    scales = weight.scales.astype(jnp.float32)
    product = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    zeros = None if weight.zeros is None else weight.zeros.astype(jnp.float32)
    if letter in outputs:
        scaled = exact(f"{inputs},{of_scales}->{inputs}z", x.astype(jnp.float32), scales)
        of_y = outputs.replace(letter, f"z{letter}")
        y = product(f"{inputs}z,{grouped}->{of_y}", scaled.astype(x.dtype), values)
        at = place_of(outputs, letter, y.ndim - 1)
        if zeros is not None:
            zero = exact(f"{inputs}z,{of_scales}->{outputs.replace(letter, 'z')}", scaled, zeros)
            y = y - jnp.expand_dims(zero, at + 1)
        return y.reshape(*y.shape[:at], -1, *y.shape[at + 2 :]).astype(dtype)
    at = place_of(inputs, letter, x.ndim)
    split = x.reshape(*x.shape[:at], groups, -1, *x.shape[at + 1 :])
    of_x, of_y = inputs.replace(letter, f"z{letter}"), f"{outputs[:-1]}z{outputs[-1]}"
    y = product(f"{of_x},{grouped}->{of_y}", split, values)
    if zeros is not None:
        sums = split.astype(jnp.float32).sum(at + 1)
        y = y - exact(f"{of_x.replace(letter, '')},{of_scales}->{of_y}", sums, zeros)
    y = y * spread(scales, of_scales, of_y, y.ndim)
    return y.sum(place_of(of_y, "z", y.ndim)).astype(dtype)


def _kernel(
    x: Float[Array, "*x"], weight: QuantizedWeight, subscripts: str, *, scaled: bool
) -> Callable[..., Array] | None:
    """Returns the kernel that computes a product on each device, or ``None``: XLA does."""
    backend = weight.backend
    if not backend.is_kernel or not backend.products or x.dtype.itemsize != 2:
        return None  # Pallas is imported where it is used: that takes a while
    if backend.name == "gpu":
        # a weight that the kernel does not take lies [in, out]
        return partial(product_on_gpu, scaled=scaled) if subscripts == "...i,oi->...o" else None
    if not scaled or subscripts != "...i,io->...o" or x.dtype != jnp.bfloat16:
        return None
    return product_on_tpu if tpu_kernel_takes(weight, math.prod(x.shape[:-1]), _parts(weight)) else None


def tpu_kernel_takes(weight: QuantizedWeight, tokens: int, parts: int = 1) -> bool:
    """Returns whether the kernel for TPUs multiplies by a matrix [in, out], or by one of a stack.

    Args:
        weight: the matrix, or a stack of them.
        tokens: rows of the activations, bfloat16.
        parts: devices that the inputs are sharded over.
    """
    if weight.backend.name != "tpu" or not weight.backend.products or weight.inputs != -2:
        return False
    from tpjax.layers import quantized_tpu

    groups = weight.scales.shape[-2]
    group = weight.shape[-2] // groups
    return groups > 1 and quantized_tpu.takes(tokens, weight.values.dtype, groups // parts, group)


def _parts(weight: QuantizedWeight) -> int:
    """Returns the number of devices among which the inputs of a matrix [in, out] are sharded."""
    mesh = jax.sharding.get_abstract_mesh()
    sharded = tuple(weight.spec)[:1] == (AXIS,) and mesh.size > 1 and AxisType.Manual not in mesh.axis_types
    return mesh.size if sharded else 1


def product_on_tpu(
    x: Float[Array, "*batch D"], weight: QuantizedWeight, *, dtype: jnp.dtype | type
) -> Float[Array, "*batch F"]:
    """Computes the product with a matrix [D, F], or one of a stack, on one device by the kernel for TPUs."""
    from tpjax.layers.quantized_tpu import quantized_product

    rows, stack, number = x.reshape(-1, x.shape[-1]), weight, weight.number
    if number is None:
        stack, number = jax.tree.map(lambda one: one[None], weight), jnp.int32(0)
    interpret = weight.backend.interpret
    y = quantized_product(rows, stack.values, stack.scales, stack.zeros, number, interpret=interpret)
    return y.astype(dtype).reshape(*x.shape[:-1], -1)


def product_on_gpu(
    x: Float[Array, "*batch D"], weight: QuantizedWeight, *, dtype: jnp.dtype | type, scaled: bool
) -> Float[Array, "*batch F"]:
    """Computes the product with a matrix [F, D] on one device by the kernel for GPUs, scaled or not."""
    from tpjax.layers.quantized_gpu import quantized_product

    rows = x.reshape(-1, x.shape[-1])
    scales = weight.scales.T if scaled else None
    y = quantized_product(rows, weight.values, scales, interpret=weight.backend.interpret)
    if scaled and weight.zeros is not None:
        groups = weight.scales.shape[1]
        sums = rows.reshape(len(rows), groups, -1).astype(jnp.float32).sum(2)
        zeros = weight.zeros.astype(jnp.float32) * weight.scales.astype(jnp.float32)
        y = y - jnp.einsum("ng,fg->nf", sums, zeros, precision=jax.lax.Precision.HIGHEST)
    return y.astype(dtype).reshape(*x.shape[:-1], -1)


def product_by_blocks(
    x: Float[Array, "*x"],
    weight: QuantizedWeight,
    *,
    subscripts: str,
    dtype: jnp.dtype | type,
    precision: jax.lax.Precision | None,
    scaled: bool = False,
) -> Float[Array, "*out"]:
    """Computes the product on one device in a loop over blocks of outputs, each scaled or not."""
    inputs, axes, outputs = Terms.of(subscripts)
    values = weight.values
    letter = next(letter for letter in axes if letter in outputs)
    axis = axes.index(letter)
    size, rows = values.shape[axis], _rows(x, values, axes, inputs, axis)
    of_x = place_of(inputs, letter, x.ndim) if letter in inputs else None
    encoded = values
    if values.dtype == jnp.float8_e4m3fn:  # XLA's CPU backend would widen all of it before it takes a block
        encoded = jax.lax.bitcast_convert_type(values, jnp.uint8)

    def block(start: Array | int, rows: int) -> Array:
        part = jax.lax.dynamic_slice_in_dim(encoded, start, rows, axis)
        if encoded.dtype == jnp.uint8:
            wide = _float8(part).astype(x.dtype) * jnp.asarray(256, x.dtype)
        else:
            wide = part.astype(x.dtype)
        if scaled:
            wide = _scaled_block(wide, weight, axis, start)
        own = x if of_x is None else jax.lax.dynamic_slice_in_dim(x, start, rows, of_x)
        return product(own, wide, subscripts, dtype=dtype, precision=precision)

    shape = jax.eval_shape(lambda: block(0, size)).shape
    at = place_of(outputs, letter, len(shape))

    def body(i: Array, out: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(out, block(i * rows, rows), i * rows, at)

    out = jax.lax.fori_loop(0, size // rows, body, jnp.zeros(shape, dtype))
    if size % rows:
        start = size - size % rows
        out = jax.lax.dynamic_update_slice_in_dim(out, block(start, size % rows), start, at)
    return out


def _scaled_block(values: Array, weight: QuantizedWeight, axis: int, start: Array | int) -> Array:
    """Subtracts the zero points of a block of a weight, from ``start`` along ``axis``, and scales it."""
    at = values.ndim + weight.inputs

    def of_block(x: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(x, start, values.shape[axis], axis)
        return jnp.expand_dims(part.astype(jnp.float32), at + 1)

    groups = weight.scales.shape[at]
    wide = values.reshape(*values.shape[:at], groups, -1, *values.shape[at + 1 :]).astype(jnp.float32)
    if weight.zeros is not None:
        wide = wide - of_block(weight.zeros)
    return (wide * of_block(weight.scales)).reshape(values.shape).astype(values.dtype)


def _rows(x: Array, values: Array, axes: str, inputs: str, axis: int) -> int:
    """Returns the outputs of a block: at most half of them, since a single block would be no loop."""
    size = values.shape[axis]
    read = math.prod(n for letter, n in zip(axes, values.shape, strict=True) if letter in inputs)
    elements = _BLOCK_ELEMENTS if x.size // read <= _FEW_TOKENS else _LARGE_BLOCK_ELEMENTS
    least = 1 if axis == 0 else _LEAST_COLUMNS
    return min(max(least, elements * size // values.size), -(-size // 2))


def _float8(bits: Array) -> Array:
    """Returns the float16 numbers with these bits of float8 e4m3, over 256: all but NaN."""
    bits = bits.astype(jnp.uint16)
    return jax.lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16)


def _on_each_device(
    product: Callable[[Array, QuantizedWeight], Array], x: Array, weight: QuantizedWeight, *, subscripts: str
) -> Array:
    """Computes a product on each device with its part of the weight.

    Where inputs are sharded the devices' sums are added up: an all-reduce follows.
    """
    mesh, spec = jax.sharding.get_abstract_mesh(), weight.spec
    if AXIS not in spec or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return product(x, weight)
    inputs, axes, outputs = Terms.of(subscripts)
    letter, ndim = axes[tuple(spec).index(AXIS)], _ndim(inputs, outputs, x.ndim)
    of_x, specs = _sharded_along(inputs, letter, x.ndim), specs_of(weight, spec)
    if letter in outputs:
        of_out = _sharded_along(outputs, letter, ndim)
        return jax.shard_map(product, in_specs=(of_x, specs), out_specs=of_out, check_vma=False)(x, weight)
    partial_sums = jax.shard_map(
        lambda x, weight: product(x, weight)[None],
        in_specs=(of_x, specs),
        out_specs=PARTIAL_SUMS,
        check_vma=False,
    )(x, weight)
    return jax.lax.reduce_sum(partial_sums, (0,))  # all-reduce over tp


def quantized_rows(
    weight: QuantizedWeight, tokens: Int[Array, " N"], dtype: jnp.dtype
) -> Float[Array, "N D"]:
    """Looks up the rows of tokens in an embedding [V, D], sharded along V, and widens them.

    Where it is sharded, the rows that other devices have are zeros, and are added up: an all-reduce follows.
    """

    def rows(weight: QuantizedWeight, tokens: Int[Array, " N"]) -> Float[Array, "N D"]:
        # as bytes: XLA's CPU backend would widen all of a float8 array before it takes rows
        stored = weight.values.dtype
        encoded = weight.values
        if stored == jnp.float8_e4m3fn:
            encoded = jax.lax.bitcast_convert_type(encoded, jnp.uint8)
        values = encoded.at[tokens].get(mode="clip")
        if values.dtype != stored:
            values = jax.lax.bitcast_convert_type(values, stored)
        scales = weight.scales.at[tokens].get(mode="clip").astype(jnp.float32)
        wide = values.astype(jnp.float32).reshape(*scales.shape, -1)
        if weight.zeros is not None:
            wide = wide - weight.zeros.at[tokens].get(mode="clip")[..., None].astype(jnp.float32)
        return (wide * scales[..., None]).reshape(values.shape).astype(dtype)

    def own_rows(weight: QuantizedWeight, tokens: Int[Array, " N"]) -> Float[Array, "1 N D"]:
        local = tokens - jax.lax.axis_index(AXIS) * weight.shape[0]
        inside = (local >= 0) & (local < weight.shape[0])
        return jnp.where(inside[:, None], rows(weight, local), 0)[None]

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return rows(weight, tokens)
    specs = (specs_of(weight, weight.spec), PartitionSpec())
    partial_sums = jax.shard_map(own_rows, in_specs=specs, out_specs=PARTIAL_SUMS, check_vma=False)
    return jax.lax.reduce_sum(partial_sums(weight, tokens), (0,))  # all-reduce over tp


def _ndim(inputs: str, outputs: str, ndim: int) -> int:
    """Returns the axes of a product, whose activations have ``ndim``: ``...`` stands for the same in both."""
    return ndim - len(inputs.replace(".", "")) + len(outputs.replace(".", ""))


def _sharded_along(axes: str, letter: str, ndim: int) -> PartitionSpec:
    """Returns the spec of an array of ``ndim`` axes that is sharded along one of them, or along none."""
    place = place_of(axes, letter, ndim) if letter in axes else None
    return PartitionSpec(*(AXIS if axis == place else None for axis in range(ndim)))
