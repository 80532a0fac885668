"""Element-wise functions: the activations of MLPs, and the soft cap of scores and logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tpjax.config import Activation


def activate(x: Float[Array, "*batch F"], kind: Activation) -> Float[Array, "*batch F"]:
    """Applies the activation of an MLP. All of them map 0 to 0, so that padding stays 0."""
    match kind:
        case "silu":
            return jax.nn.silu(x)
        case "relu":
            return jax.nn.relu(x)
        case _:
            return jax.nn.gelu(x, approximate=kind == "gelu_tanh")


def soft_capped(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """Bounds values smoothly to (-cap, cap); returns them unchanged if ``cap`` is ``None``."""
    return x if cap is None else cap * jnp.tanh(x / cap)
