"""Products with weights of 8 bits, each widened to the activations' dtype inside the product.

TPUs and GPUs fuse the widening into the product: the weight is read as it lies, and no wide copy of it
exists. XLA's CPU backend writes the copy of every weight of the program to memory first: a decode step of
SmolLM2-135M takes 9 times as long that way as in float32. There a loop widens blocks that stay in a core's
cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Shaped

from tpjax.mesh import AXIS
from tpjax.sharding import PARTIAL_SUMS

_BLOCK_ELEMENTS = 1 << 18  # a megabyte of float32
_FEW_TOKENS, _LARGE_BLOCK_ELEMENTS = 32, 1 << 20  # a product of more tokens wants wider blocks
_LEAST_COLUMNS = 128  # of a weight [in, out], whose rows are read in pieces then: two cache lines or more


def widened_product(
    x: Float[Array, "*x"],
    values: Shaped[Array, "*weight"],
    spec: PartitionSpec,
    subscripts: str,
    *,
    dtype: jnp.dtype | type,
    precision: jax.lax.Precision | None,
) -> Float[Array, "*out"]:
    """Multiplies activations by the values of a weight, without its scales.

    Args:
        x: activations; axes that ``subscripts`` do not name are replicated.
        values: int8 or float8 e4m3.
        spec: how the values are sharded; inside ``shard_map`` it means nothing.
        subscripts: as for :func:`tpjax.layers.linear.dot`.
        dtype: dtype of the result.
        precision: precision of the multiplication.
    """

    def at_once(x: Array, values: Array) -> Array:
        wide = values.astype(x.dtype)
        return jnp.einsum(subscripts, x, wide, precision=precision, preferred_element_type=dtype)

    by_blocks = partial(product_by_blocks, subscripts=subscripts, dtype=dtype, precision=precision)
    on_each = partial(_on_each_device, by_blocks, subscripts=subscripts, spec=spec)
    return jax.lax.platform_dependent(x, values, cpu=on_each, default=at_once)


def product_by_blocks(
    x: Float[Array, "*x"],
    values: Shaped[Array, "*weight"],
    *,
    subscripts: str,
    dtype: jnp.dtype | type,
    precision: jax.lax.Precision | None,
) -> Float[Array, "*out"]:
    """Computes the product on one device in a loop over blocks of outputs."""
    terms, outputs = subscripts.split("->")
    inputs, axes = terms.split(",")
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
        own = x if of_x is None else jax.lax.dynamic_slice_in_dim(x, start, rows, of_x)
        return jnp.einsum(subscripts, own, wide, precision=precision, preferred_element_type=dtype)

    shape = jax.eval_shape(lambda: block(0, size)).shape
    at = place_of(outputs, letter, len(shape))

    def body(i: Array, out: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(out, block(i * rows, rows), i * rows, at)

    out = jax.lax.fori_loop(0, size // rows, body, jnp.zeros(shape, dtype))
    if size % rows:
        start = size - size % rows
        out = jax.lax.dynamic_update_slice_in_dim(out, block(start, size % rows), start, at)
    return out


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
    product: Callable[[Array, Array], Array], x: Array, values: Array, *, subscripts: str, spec: PartitionSpec
) -> Array:
    """Computes a product on each device with its part of the weight.

    Where inputs are sharded the devices' sums are added up: an all-reduce follows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AXIS not in spec or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return product(x, values)
    terms, outputs = subscripts.split("->")
    inputs, axes = terms.split(",")
    letter, ndim = axes[tuple(spec).index(AXIS)], jax.eval_shape(product, x, values).ndim
    of_x = _sharded_along(inputs, letter, x.ndim)
    if letter in outputs:
        of_out = _sharded_along(outputs, letter, ndim)
        return jax.shard_map(product, in_specs=(of_x, spec), out_specs=of_out, check_vma=False)(x, values)
    partial_sums = jax.shard_map(
        lambda x, values: product(x, values)[None],
        in_specs=(of_x, spec),
        out_specs=PARTIAL_SUMS,
        check_vma=False,
    )(x, values)
    return jax.lax.reduce_sum(partial_sums, (0,))  # all-reduce over tp


def _sharded_along(axes: str, letter: str, ndim: int) -> PartitionSpec:
    """Returns the spec of an array of ``ndim`` axes that is sharded along one of them, or along none."""
    place = place_of(axes, letter, ndim) if letter in axes else None
    return PartitionSpec(*(AXIS if axis == place else None for axis in range(ndim)))


def place_of(axes: str, letter: str, ndim: int) -> int:
    """Returns the axis that a letter stands for; ``...`` stands for as many as there are."""
    before, _, after = axes.partition("...")
    return before.index(letter) if letter in before else ndim - len(after) + after.index(letter)
