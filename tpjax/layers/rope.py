"""Rotary position embedding, in the half-split form of Hugging Face checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tpjax.config import RopeParameters


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, float32, times the attention factor."""

    cos: Float[Array, "B S half"]
    sin: Float[Array, "B S half"]


def inverse_frequencies(rope: RopeParameters, dim: int) -> np.ndarray:
    """Radians per position of each pair of ``dim`` dimensions, float32 [dim / 2].

    Of short sequences, where they go by the length: see :func:`frequencies_by_length`. ``llama3`` follows the
    Llama 3.1 reference code: wavelengths longer than original / low_freq_factor are stretched by ``factor``,
    shorter than original / high_freq_factor kept, linearly mixed between. ``yarn`` does so between two pairs
    (section 3.2 of its paper).
    """
    frequencies = 1.0 / (rope.theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim))
    if rope.kind == "linear":
        frequencies /= rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
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
    """The pairs between which YaRN goes from keeping frequencies to dividing them by the factor."""

    def pair(turns: float) -> float:
        """The pair that turns so often over the original context."""
        length = rope.original_max_position_embeddings
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high if high != low else high + 0.001  # as the published code avoids dividing by zero


def frequencies_by_length(
    rope: RopeParameters, dim: int, max_length: Int[Array, " B"]
) -> Float[Array, "B half"]:
    """Radians per position for sequences that will get that long, where frequencies go by the length.

    ``dynamic``: the base grows by ``(factor * L / original - factor + 1) ** (dim / (dim - 2))`` for lengths
    L beyond the original. ``longrope``: the long divisors take the place of the short ones beyond it.
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


def rotation(
    rope: RopeParameters, dim: int, positions: Int[Array, "B S"], max_length: Int[Array, " B"] | None = None
) -> Rotation:
    """The rotation of each position. One per kind of layer and step, shared by its layers.

    Args:
        rope: the embedding.
        dim: dimensions of a head that rotate.
        positions: of each token.
        max_length: tokens each sequence may get to; needed where the frequencies go by the length.
    """
    at = positions.astype(jnp.float32)[..., None]
    if rope.follows_length:
        assert max_length is not None, f"rope {rope.kind!r} needs the lengths that sequences may get to"
        angles = at * frequencies_by_length(rope, dim, max_length)[:, None, :]
    else:
        angles = at * inverse_frequencies(rope, dim)
    return Rotation(jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor)


def rotate(x: Float[Array, "B S *heads h"], by: Rotation) -> Float[Array, "B S *heads h"]:
    """Rotates pairs (i, i + half) of the last axis by their position's angles, in float32.

    Dimensions beyond the rotation's two halves pass unchanged.
    """
    cos, sin = (jnp.expand_dims(part, range(2, x.ndim - 1)) for part in by)
    half = cos.shape[-1]
    low, high, rest = jnp.split(x, [half, 2 * half], axis=-1)
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
