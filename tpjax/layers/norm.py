"""Norms: root mean square (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467) and layer norm.

Layer norm: Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450. Both compute in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tpjax.config import NormConfig
from tpjax.layers.weights import parameter
from tpjax.sharding import BIAS, REPLICATED, WeightLayout, tensor_layout


def normalised(x: Float[Array, "*batch size"], config: NormConfig) -> Float[Array, "*batch size"]:
    """Scales the last axis to a root mean square of 1, in float32; a layer norm first subtracts its mean."""
    x = x.astype(jnp.float32)
    if config.kind == "layer":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + config.eps)


class Norm(nnx.Module):
    """``normalised(x) * (offset + weight) + bias`` over the last axis.

    Args:
        name: canonical name of the module, relative to its parent.
        size: length of the last axis.
        config: kind of norm, epsilon, offset, and whether there is a bias.
        dtype: dtype of weight and bias.
    """

    def __init__(self, name: str, size: int, config: NormConfig, dtype: jnp.dtype) -> None:
        def declare(kind: str) -> nnx.Param:
            return parameter(tensor_layout(f"{name}.{kind}", (size,)), REPLICATED, dtype)

        self.weight = declare("weight")
        self.bias = declare("bias") if config.bias else None
        self.name = name
        self.config = config

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        """Normalises the last axis."""
        with jax.named_scope(self.name):
            weight = self.weight[...].astype(jnp.float32) + self.config.offset
            y = normalised(x, self.config) * weight
            return (y if self.bias is None else y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class HeadScale(nnx.Module):
    """The weight of a norm of queries or keys with a separate weight per head, sharded over heads.

    Args:
        layout: layout of the weight, in the order of the head slots.
        dtype: dtype of the weight.
    """

    def __init__(self, layout: WeightLayout, dtype: jnp.dtype) -> None:
        self.weight = parameter(layout, BIAS, dtype)

    def __call__(self, x: Float[Array, "N *heads h"]) -> Float[Array, "N *heads h"]:
        """Scales each head, in float32."""
        return x * self.weight[...].astype(jnp.float32).reshape(x.shape[1:])
