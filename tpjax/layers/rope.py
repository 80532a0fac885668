"""Rotary position embedding, in the half-split form of Hugging Face checkpoints."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpjax.config import RopeConfig


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, float32."""

    cos: Float[Array, "B S half"]
    sin: Float[Array, "B S half"]


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of dimensions, float32 [head_dim / 2].

    ``llama3`` follows the Llama 3.1 reference code: wavelengths longer than original / low_freq_factor
    are stretched by ``factor``, shorter than original / high_freq_factor kept, linearly mixed between.
    """
    frequencies = 1.0 / (rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))
    if rope.kind == "linear":
        frequencies /= rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        frequencies *= kept + (1 - kept) / rope.factor
    if rope.divisors is not None:
        frequencies /= np.asarray(rope.divisors)
    return frequencies.astype(np.float32)


def rotation(rope: RopeConfig, head_dim: int, positions: Int[Array, "B S"]) -> Rotation:
    """The rotation of each position. One per kind of layer and step, shared by its layers."""
    angles = positions.astype(jnp.float32)[..., None] * inverse_frequencies(rope, head_dim)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B S *heads h"], by: Rotation) -> Float[Array, "B S *heads h"]:
    """Rotates each pair (i, i + h/2) of the last axis by its position's angle, in float32."""
    cos, sin = (jnp.expand_dims(part, range(2, x.ndim - 1)) for part in by)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
