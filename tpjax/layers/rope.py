"""Rotary position embedding, in the half-split form of Hugging Face checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpjax.config import RopeParameters


class RotaryEmbedding(NamedTuple):
    """Cosines and sines of the angles at each position, times the attention factor; float32."""

    cos: Float[Array, "N half"]
    sin: Float[Array, "N half"]


def inverse_frequencies(rope: RopeParameters, dim: int) -> np.ndarray:
    """Computes the radians per position of each pair of ``dim`` dimensions, float32 [dim / 2].

    If frequencies depend on the sequence length, these are the ones of short sequences: see
    :func:`frequencies_by_length`. ``llama3`` follows the Llama 3.1 reference code: wavelengths over
    original / low_freq_factor are multiplied by ``factor``, those under original / high_freq_factor are kept,
    and those between are interpolated. ``yarn`` interpolates between two pairs (section 3.2 of its paper).
    """
    frequencies = 1.0 / (rope.theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim))
    if rope.kind == "linear":
        frequencies /= rope.factor
    elif rope.kind == "llama3":
        rotations = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        frequencies *= kept + (1 - kept) / rope.factor
    elif rope.kind == "yarn":
        low, high = _yarn_ramp(rope, dim)
        kept = 1 - np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
        frequencies *= kept + (1 - kept) / rope.factor
    if rope.divisors is not None:
        frequencies /= np.asarray(rope.divisors)
    return frequencies.astype(np.float32)


def _yarn_ramp(rope: RopeParameters, dim: int) -> tuple[float, float]:
    """Returns the pairs between which YaRN goes from keeping frequencies to dividing them by the factor."""

    def pair(rotations: float) -> float:
        """Returns the pair that completes this many rotations over the original context."""
        length = rope.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high if high != low else high + 0.001  # as the published code avoids dividing by zero


def frequencies_by_length(
    rope: RopeParameters, dim: int, max_length: Int[Array, " N"]
) -> Float[Array, "N half"]:
    """Computes the radians per position of embeddings whose frequencies depend on the sequence length.

    ``dynamic``: the base grows by ``(factor * L / original - factor + 1) ** (dim / (dim - 2))`` for lengths
    L beyond the original. ``longrope``: the long divisors replace the short ones beyond it.

    Args:
        rope: the embedding.
        dim: dimensions of a head that rotate.
        max_length: longest length that the sequence of each token may reach, tokens.
    """
    short = jnp.asarray(inverse_frequencies(rope, dim))
    original = rope.original_max_position_embeddings
    if rope.kind == "longrope":
        long = inverse_frequencies(replace(rope, divisors=rope.long_divisors), dim)
        return jnp.where(max_length[:, None] > original, long, short)
    growth = rope.factor * jnp.maximum(max_length, original).astype(jnp.float32) / original - (
        rope.factor - 1
    )
    exponents = np.arange(0, dim, 2, dtype=np.float32) / max(dim - 2, 1)
    return short * growth[:, None] ** -exponents


def rotary_embedding(
    rope: RopeParameters, dim: int, positions: Int[Array, " N"], max_length: Int[Array, " N"] | None = None
) -> RotaryEmbedding:
    """Computes the rotary embedding of each position, once per step for all layers of a type.

    Args:
        rope: the embedding.
        dim: dimensions of a head that rotate.
        positions: position of each token.
        max_length: longest length that the sequence of each token may reach, tokens; needed if frequencies
            depend on it.
    """
    steps = positions.astype(jnp.float32)[..., None]
    if rope.follows_length:
        assert max_length is not None, f"rope {rope.kind!r} needs the maximum length of each sequence"
        angles = steps * frequencies_by_length(rope, dim, max_length)
    else:
        angles = steps * inverse_frequencies(rope, dim)
    return RotaryEmbedding(jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor)


def apply_rotary(x: Float[Array, "N *heads h"], rotary: RotaryEmbedding) -> Float[Array, "N *heads h"]:
    """Rotates pairs (i, i + half) of the last axis by the angles of their position, in float32.

    Dimensions beyond the two halves stay unchanged.
    """
    cos, sin = (jnp.expand_dims(part, range(1, x.ndim - 1)) for part in rotary)
    half = cos.shape[-1]
    low, high, rest = jnp.split(x, [half, 2 * half], axis=-1)
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated
