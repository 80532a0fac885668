"""Products of activations with weights, written as ``einsum`` takes them."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_FEW_ROWS = 128  # a CPU computes a product of more in the order that it is written in


class Terms(NamedTuple):
    """The axes of a product with a weight, a letter each; ``...`` stands for as many as there are.

    Attributes:
        x: axes of the activations.
        weight: axes of the weight.
        out: axes of the result.
    """

    x: str
    weight: str
    out: str

    @classmethod
    def of(cls, subscripts: str) -> Terms:
        """Splits what ``einsum`` takes, activations first."""
        terms, out = subscripts.split("->")
        x, weight = terms.split(",")
        return cls(x, weight, out)

    @property
    def is_by_rows(self) -> bool:
        """Whether each output is the product of a row of activations with a row of a weight [out, in]."""
        return self.weight == self.out[-1] + self.x[-1] and self.x[:-1] == self.out[:-1]


def product(
    x: Float[Array, "*x"],
    weight: Float[Array, "*weight"],
    subscripts: str,
    *,
    dtype: jnp.dtype | type,
    precision: jax.lax.Precision | None = None,
) -> Float[Array, "*out"]:
    """Multiplies activations by a weight that is not quantised.

    For 2 to 32 rows of float32, XLA's CPU backend takes about half the time for ``weight @ x.T`` that it
    takes for ``x @ weight.T`` or ``x @ weight``, nearly as long as for one row, and for 128 rows 0.8 to 0.95:
    its kernels pack the right operand, and that is not the weight then. From 160 on both take as long. A
    barrier keeps XLA from turning the product around again.

    Args:
        x: activations.
        weight: the weight.
        subscripts: the axes, as ``einsum`` takes them.
        dtype: dtype of the result.
        precision: precision of the multiplication; ``None``: the backend's default.
    """
    as_written = partial(jnp.einsum, subscripts, precision=precision, preferred_element_type=dtype)
    few = 1 < x.size // x.shape[-1] <= _FEW_ROWS
    if not few or x.dtype != jnp.float32 or not Terms.of(subscripts).is_by_rows:
        return as_written(x, weight)

    def weight_first(x: Array, weight: Array) -> Array:
        contracted = (((1,), (x.ndim - 1,)), ((), ()))
        y = jax.lax.dot_general(weight, x, contracted, precision=precision, preferred_element_type=dtype)
        return jnp.moveaxis(jax.lax.optimization_barrier(y), 0, -1)

    return jax.lax.platform_dependent(x, weight, cpu=weight_first, default=as_written)


def place_of(axes: str, letter: str, ndim: int) -> int:
    """Returns the axis that a letter stands for; ``...`` stands for as many as there are."""
    before, _, after = axes.partition("...")
    return before.index(letter) if letter in before else ndim - len(after) + after.index(letter)


def spread(x: Array, axes: str, onto: str, ndim: int) -> Array:
    """Gives an array the order and number of axes of another, so that it broadcasts against that.

    Args:
        x: the array; axes that the other lacks have size 1.
        axes: its axes as letters.
        onto: those of the other.
        ndim: their number.
    """
    places = {axis: place_of(onto, axis, ndim) for axis in axes if axis in onto}
    shape = [1] * ndim
    for axis, size in zip(axes, x.shape, strict=True):
        if axis in places:
            shape[places[axis]] = size
    order = sorted(range(x.ndim), key=lambda i: places.get(axes[i], ndim))
    return x.transpose(order).reshape(shape)
