"""Root-mean-square layer norm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tpjax.config import ModelConfig
from tpjax.layers.linear import parameter
from tpjax.sharding import REPLICATED, whole


class RMSNorm(nnx.Module):
    """``x / rms(x) * (offset + weight)`` over the last axis, computed in float32.

    Args:
        source: canonical name of the weight, relative to the parent module.
        size: length of the last axis.
        config: gives epsilon and offset.
        dtype: of the weight.
    """

    def __init__(self, source: str, size: int, config: ModelConfig, dtype: jnp.dtype) -> None:
        self.weight = parameter(whole(source, (size,)), REPLICATED, dtype)
        self.eps = config.rms_norm_eps
        self.offset = config.norm_offset

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        """Norms the last axis."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        weight = self.weight[...].astype(jnp.float32) + self.offset
        return (x32 * jax.lax.rsqrt(mean_square + self.eps) * weight).astype(x.dtype)
