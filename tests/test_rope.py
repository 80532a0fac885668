"""Rotary embeddings against the published formulas, written again here."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tpjax.config import RopeParameters
from tpjax.families.config_reader import Fields
from tpjax.families.rope_variants import rope_from
from tpjax.layers.rope import RotaryEmbedding, apply_rotary, inverse_frequencies, rotary_embedding


def plain(theta: float, head_dim: int) -> list[float]:
    """Su et al. 2021, section 3.2.2: theta_i = base ** (-2 (i - 1) / d), i = 1 ... d / 2."""
    return [theta ** (-2 * (i - 1) / head_dim) for i in range(1, head_dim // 2 + 1)]


def meta_apply_scaling(freqs: list[float], rope: RopeParameters) -> list[float]:
    """``apply_scaling`` of Meta's llama-models reference code, its constants taken from the configuration."""
    old_context_len = rope.original_max_position_embeddings
    low_freq_wavelen = old_context_len / rope.low_freq_factor
    high_freq_wavelen = old_context_len / rope.high_freq_factor
    new_freqs = []
    for freq in freqs:
        wavelen = 2 * math.pi / freq
        if wavelen < high_freq_wavelen:
            new_freqs.append(freq)
        elif wavelen > low_freq_wavelen:
            new_freqs.append(freq / rope.factor)
        else:
            smooth = (old_context_len / wavelen - rope.low_freq_factor) / (
                rope.high_freq_factor - rope.low_freq_factor
            )
            new_freqs.append((1 - smooth) * freq / rope.factor + smooth * freq)
    return new_freqs


@pytest.mark.parametrize("theta", (10_000.0, 500_000.0, 1e6))
@pytest.mark.parametrize("head_dim", (2, 64, 128, 256))
def test_default(theta: float, head_dim: int) -> None:
    found = inverse_frequencies(RopeParameters(theta=theta), head_dim)
    assert found.dtype == np.float32 and found.shape == (head_dim // 2,)
    np.testing.assert_allclose(found, plain(theta, head_dim), rtol=1e-6)


def test_known_values() -> None:
    """Every eighth of head_dim 64 at base 10,000 is a power of ten to the half."""
    found = inverse_frequencies(RopeParameters(), 64)
    np.testing.assert_allclose(found[::8], [1, 10**-1, 10**-2, 10**-3], rtol=1e-6)


def test_linear() -> None:
    found = inverse_frequencies(RopeParameters(theta=1e6, kind="linear", factor=8.0), 256)
    np.testing.assert_allclose(found, np.array(plain(1e6, 256)) / 8, rtol=1e-6)


@pytest.mark.parametrize(
    ("head_dim", "rope"),
    (
        (128, RopeParameters(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)),  # Llama 3.1
        (64, RopeParameters(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192)),  # Llama 3.2 1B
        (32, RopeParameters(10_000.0, "llama3", 4.0, 2.0, 8.0, 64)),
    ),
)
def test_llama3(head_dim: int, rope: RopeParameters) -> None:
    before = plain(rope.theta, head_dim)
    expected = meta_apply_scaling(before, rope)
    np.testing.assert_allclose(inverse_frequencies(rope, head_dim), expected, rtol=1e-6)
    ratios = np.array(before) / np.array(expected)
    kept, scaled = np.isclose(ratios, 1), np.isclose(ratios, rope.factor)
    assert kept.any() and scaled.any() and (~kept & ~scaled).any()  # all three bands are exercised
    assert np.all(np.diff(ratios) >= -1e-9)  # the ramp rises with the wavelength


def test_llama3_mid_band_by_hand() -> None:
    """One frequency of Llama 3.1 inside the ramp: pair 30 of 64, wavelength 2,948 tokens."""
    frequency = 500_000.0 ** (-60 / 128)
    wavelength = 2 * math.pi / frequency
    assert 8192 / 4 < wavelength < 8192
    smooth = (8192 / wavelength - 1) / 3
    expected = frequency * (smooth + (1 - smooth) / 8)
    found = inverse_frequencies(RopeParameters(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192), 128)[30]
    assert found == pytest.approx(expected, rel=1e-6)
    assert found == pytest.approx(0.00137189, rel=1e-4)


# What transformers 5.23 computes (``ROPE_INIT_FUNCTIONS``): parameters as in config.json, longest context,
# length of the sequence, dimensions that rotate; then frequencies and attention factor.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
    "long_factor": [1.0, 1.5, 3.0, 6.0, 9.0, 16.0],
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
RECORDED: dict[str, tuple[dict[str, Any], int, int, int, list[float], float]] = {
    "linear": (
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 512, 1, 16,
        [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05], 1.0,
    ),
    "dynamic, short": (
        DYNAMIC, 64, 50, 16,
        [1.0, 0.3162278, 0.1, 0.03162278, 0.01, 0.003162278, 0.001, 0.0003162278], 1.0,
    ),
    "dynamic, long": (
        DYNAMIC, 64, 160, 16,
        [1.0, 0.2594128, 0.06729501, 0.01745719, 0.004528618, 0.001174782, 0.0003047534, 7.905695e-05], 1.0,
    ),
    "llama3": (
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 64}, 512, 1, 16,
        [1.0, 0.07940301, 0.004700754, 0.0009115831, 0.0001767767, 3.428102e-05, 6.64787e-06, 1.289173e-06],
        1.0,
    ),
    "yarn of Qwen": (
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128},
        512, 1, 16,
        [1.0, 0.1111425, 0.007905695, 0.001405853, 0.00025, 4.445699e-05, 7.905694e-06, 1.405853e-06],
        1.13862944,
    ),
    "yarn of DeepSeek": (
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 128,
         "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7}, 512, 1, 16,
        [1.0, 0.2134537, 0.035, 0.0007905695, 0.00025, 7.905695e-05, 2.5e-05, 7.905694e-06], 1.08795461,
    ),
    "yarn of gpt-oss": (
        {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
         "original_max_position_embeddings": 4096, "truncate": False}, 512, 1, 16,
        [1.0, 0.225418, 0.05081327, 0.006794959, 0.0004564839, 1.818834e-05, 4.099978e-06, 9.24209e-07],
        1.34657359,
    ),
    "yarn with its factor": (
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128,
         "attention_factor": 1.5}, 512, 1, 16,
        [1.0, 0.2371708, 0.05, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05], 1.5,
    ),
    "longrope, short": (
        LONGROPE, 512, 64, 12, [1.0, 0.1958577, 0.0386799, 0.007692308, 0.00143629, 0.0002320795], 1.22474487
    ),
    "longrope, long": (
        LONGROPE, 512, 65, 12, [1.0, 0.143629, 0.01547196, 0.001666667, 0.0002393816, 2.900993e-05],
        1.22474487,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDED)
def test_as_transformers(case: str) -> None:
    parameters, context, length, dim, frequencies, attention_factor = RECORDED[case]
    rope = rope_from(Fields(parameters), parameters["rope_theta"], context)
    rotary = rotary_embedding(rope, dim, jnp.array([0, 1]), jnp.array([length] * 2))
    np.testing.assert_allclose(rotary.cos[0], np.full(dim // 2, attention_factor), rtol=1e-6)
    np.testing.assert_allclose(rotary.sin[1], attention_factor * np.sin(frequencies), rtol=2e-6)


def test_each_sequence_goes_by_its_own_length() -> None:
    rope = rope_from(Fields(LONGROPE), 1e4, 512)
    both = rotary_embedding(rope, 12, jnp.array([5, 5]), jnp.array([10, 100]))
    for row, length in enumerate((10, 100)):
        alone = rotary_embedding(rope, 12, jnp.array([5]), jnp.array([length]))
        np.testing.assert_array_equal(both.sin[row], alone.sin[0])
    assert float(jnp.abs(both.sin[0] - both.sin[1]).max()) > 0.1


def test_part_of_a_head_rotates() -> None:
    x = np.random.default_rng(3).normal(size=(8, 3, 10)).astype(np.float32)
    rotary = rotary_embedding(RopeParameters(), 6, POSITIONS)
    out = np.asarray(apply_rotary(jnp.asarray(x), rotary))
    np.testing.assert_array_equal(out[..., 6:], x[..., 6:])
    np.testing.assert_array_equal(out[..., :6], apply_rotary(jnp.asarray(x[..., :6]), rotary))


def test_divisors() -> None:
    divisors = tuple(1.0 + i for i in range(16))
    found = inverse_frequencies(RopeParameters(theta=500_000.0, divisors=divisors), 32)
    np.testing.assert_allclose(found, np.array(plain(500_000.0, 32)) / divisors, rtol=1e-6)


def test_gguf_divisors_give_llama3() -> None:
    """llama.cpp's ``rope_freqs.weight`` holds plain / scaled: both forms of one model are the same."""
    scaled = RopeParameters(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    before = plain(500_000.0, 64)
    divisors = tuple(np.float32(np.array(before) / np.array(meta_apply_scaling(before, scaled))).tolist())
    from_gguf = inverse_frequencies(RopeParameters(theta=500_000.0, divisors=divisors), 64)
    np.testing.assert_allclose(from_gguf, inverse_frequencies(scaled, 64), rtol=1e-6)


POSITIONS = jnp.array([0, 1, 7, 500, 3, 3, 1000, 2])


def test_rotation_is_cos_and_sin_of_the_angles() -> None:
    rotary = rotary_embedding(RopeParameters(), 8, POSITIONS)
    angles = np.asarray(POSITIONS)[..., None] * np.array(plain(10_000.0, 8))
    assert rotary.cos.shape == rotary.sin.shape == (8, 4)
    assert rotary.cos.dtype == rotary.sin.dtype == jnp.float32
    np.testing.assert_allclose(rotary.cos, np.cos(angles), atol=1e-4)  # float32 angles up to 1,000 radians
    np.testing.assert_allclose(rotary.sin, np.sin(angles), atol=1e-4)


def test_pairs_rotate_as_complex_numbers() -> None:
    """Pairs are (i, i + h / 2), as in Hugging Face checkpoints, each rotated by its own angle."""
    x = np.random.default_rng(0).normal(size=(8, 3, 8)).astype(np.float32)
    out = np.asarray(apply_rotary(jnp.asarray(x), rotary_embedding(RopeParameters(), 8, POSITIONS)))
    rotation = np.exp(1j * np.asarray(POSITIONS)[..., None, None] * np.array(plain(10_000.0, 8)))
    rotated = (x[..., :4] + 1j * x[..., 4:]) * rotation
    np.testing.assert_allclose(out, np.concatenate([rotated.real, rotated.imag], axis=-1), atol=2e-4)


def test_rotate_keeps_norms_and_position_zero() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 3, 2, 8)).astype(np.float32))  # two head axes
    out = apply_rotary(x, rotary_embedding(RopeParameters(), 8, POSITIONS))
    assert out.shape == x.shape
    np.testing.assert_allclose(jnp.linalg.norm(out, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(out[0], x[0])
    assert float(jnp.abs(out[1] - x[1]).max()) > 0.1


@pytest.mark.parametrize(
    "rope",
    (
        RopeParameters(),
        RopeParameters(kind="linear", factor=4.0),
        RopeParameters(500_000.0, "llama3", 8.0, 1.0, 4.0, 32),
    ),
    ids=("default", "linear", "llama3"),
)
def test_products_depend_on_relative_positions_alone(rope: RopeParameters) -> None:
    rng = np.random.default_rng(2)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 16)).astype(np.float32)) for _ in range(2))

    def product(query_at: int, key_at: int) -> float:
        rotated = [
            apply_rotary(x, rotary_embedding(rope, 16, jnp.array([at])))
            for x, at in ((query, query_at), (key, key_at))
        ]
        return float(jnp.sum(rotated[0] * rotated[1]))

    for distance in (0, 1, 13):
        values = [product(start + distance, start) for start in (0, 5, 40, 300)]
        np.testing.assert_allclose(values, values[0], atol=2e-4)
    assert abs(product(1, 0) - product(14, 0)) > 1e-2
    assert product(7, 7) == pytest.approx(float(jnp.sum(query * key)), abs=1e-4)


def test_apply_rotary_keeps_the_dtype() -> None:
    x = jnp.ones((1, 1, 4), jnp.bfloat16)
    rotary = RotaryEmbedding(jnp.zeros((1, 2), jnp.float32), jnp.ones((1, 2), jnp.float32))
    out = apply_rotary(x, rotary)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32)[0, 0], [-1, -1, 1, 1])
