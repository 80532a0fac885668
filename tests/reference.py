"""What a model computes, written once more for clarity: NumPy, float64, one sequence, everything at once.

No paging, no cache, no fused or padded weights, no devices. The names are those of a Hugging Face checkpoint
without ``model.``, a linear layer is [out, in], and the letters are those of ``tpjax/model.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from tpjax.config import LayerType, ModelConfig, RopeConfig

Weights = Mapping[str, np.ndarray]


def logits(config: ModelConfig, weights: Weights, tokens: np.ndarray) -> np.ndarray:
    """Scores [S, V] of the token after each of ``tokens`` [S]."""
    embeddings = weights["embed_tokens.weight"].astype(np.float64)
    x = embeddings[tokens] * config.embedding_scale
    for number, kind in enumerate(config.layer_types):
        x = decoder_layer(config, below(weights, f"layers.{number}"), x, kind)
    x = rms_norm(config, below(weights, "norm"), x)
    return x @ (embeddings if config.tie_word_embeddings else weights["lm_head.weight"]).T


def below(weights: Weights, prefix: str) -> Weights:
    """The weights of one module, under the names they have there."""
    return {name[len(prefix) + 1 :]: w for name, w in weights.items() if name.startswith(f"{prefix}.")}


def decoder_layer(config: ModelConfig, weights: Weights, x: np.ndarray, kind: LayerType) -> np.ndarray:
    """The residual [S, D] after a layer."""

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return rms_norm(config, below(weights, name), x)

    def attend(x: np.ndarray) -> np.ndarray:
        return (latent_attention if config.latent else attention)(
            config, below(weights, "self_attn"), x, kind
        )

    def feed_forward(x: np.ndarray) -> np.ndarray:
        return mlp(config, below(weights, "mlp"), x)

    if config.sandwich_norms:
        x = x + norm("post_attention_layernorm", attend(norm("input_layernorm", x)))
        return x + norm("post_feedforward_layernorm", feed_forward(norm("pre_feedforward_layernorm", x)))
    x = x + attend(norm("input_layernorm", x))
    return x + feed_forward(norm("post_attention_layernorm", x))


def linear(weights: Weights, x: np.ndarray) -> np.ndarray:
    """``x @ W.T + b``, where there is a bias."""
    return x @ weights["weight"].T + weights.get("bias", 0.0)


def rms_norm(config: ModelConfig, weights: Weights, x: np.ndarray) -> np.ndarray:
    """Divides by the root mean square of the last axis."""
    rms = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps)
    return x / rms * (config.norm_offset + weights["weight"])


def mlp(config: ModelConfig, weights: Weights, x: np.ndarray) -> np.ndarray:
    """The gated feed-forward network."""
    gate, up = (linear(below(weights, name), x) for name in ("gate_proj", "up_proj"))
    return linear(below(weights, "down_proj"), ACTIVATIONS[config.activation](gate) * up)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"silu": silu, "gelu_tanh": gelu_tanh}


def attention(config: ModelConfig, weights: Weights, x: np.ndarray, kind: LayerType) -> np.ndarray:
    """Causal self-attention with keys and values shared by groups of query heads."""
    length = len(x)
    q, k, v = (
        linear(below(weights, f"{name}_proj"), x).reshape(length, -1, config.head_dim) for name in "qkv"
    )
    if config.qk_norm:
        q = rms_norm(config, below(weights, "q_norm"), q)
        k = rms_norm(config, below(weights, "k_norm"), k)
    frequencies = rope_frequencies(config.rope_of(kind), config.head_dim)
    q, k = rotate(q, frequencies), rotate(k, frequencies)
    per_group = config.num_heads // config.num_kv_heads
    mixed = mix(config, q, np.repeat(k, per_group, axis=1), np.repeat(v, per_group, axis=1), kind)
    return linear(below(weights, "o_proj"), mixed)


def latent_attention(config: ModelConfig, weights: Weights, x: np.ndarray, kind: LayerType) -> np.ndarray:
    """Causal self-attention whose keys and values are projections of one latent per token."""
    assert config.latent is not None
    length, rank, turning = len(x), config.latent.kv_lora_rank, config.rotated_dim
    fixed = config.head_dim - turning
    norms = replace(config, norm_eps=1e-6)

    def project(name: str, x: np.ndarray) -> np.ndarray:
        return linear(below(weights, name), x)

    def turn(x: np.ndarray) -> np.ndarray:
        return rotate(x, rope_frequencies(config.rope_of(kind), turning))

    if config.latent.q_lora_rank is None:
        q = project("q_proj", x)
    else:
        q = project("q_b_proj", rms_norm(norms, below(weights, "q_a_layernorm"), project("q_a_proj", x)))
    q = q.reshape(length, config.num_heads, -1)
    latent, shared = np.split(project("kv_a_proj_with_mqa", x), [rank], axis=-1)
    kv = project("kv_b_proj", rms_norm(norms, below(weights, "kv_a_layernorm"), latent))
    k, v = np.split(kv.reshape(length, config.num_heads, -1), [fixed], axis=-1)
    shared = np.repeat(turn(shared[:, None]), config.num_heads, axis=1)
    q = np.concatenate([q[..., :fixed], turn(q[..., fixed:])], axis=-1)
    return project("o_proj", mix(config, q, np.concatenate([k, shared], axis=-1), v, kind))


def mix(config: ModelConfig, q: np.ndarray, k: np.ndarray, v: np.ndarray, kind: LayerType) -> np.ndarray:
    """The values [S, H, h] that each query sees, weighed; one head after the other, side by side."""
    visible = mask(len(q), config.window_of(kind))
    heads = []
    for head in range(config.num_heads):
        scores = q[:, head] @ k[:, head].T * config.query_scale
        heads.append(softmax(np.where(visible, scores, -np.inf)) @ v[:, head])
    return np.concatenate(heads, axis=-1)


def mask(length: int, window: int | None) -> np.ndarray:
    """Whether the query of a row sees the key of a column, [S, S]."""
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    return (distance >= 0) & (distance < (window or length))


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of dimensions."""
    return np.array([rope_frequency(rope, pair, head_dim) for pair in range(head_dim // 2)])


def rope_frequency(rope: RopeConfig, pair: int, head_dim: int) -> float:
    frequency = rope.theta ** (-2 * pair / head_dim)
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / frequency
        longest_kept = rope.original_max_position_embeddings / rope.high_freq_factor
        shortest_scaled = rope.original_max_position_embeddings / rope.low_freq_factor
        if wavelength < longest_kept:
            return frequency
        if wavelength > shortest_scaled:
            return frequency / rope.factor
        turns = rope.original_max_position_embeddings / wavelength
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return kept * frequency + (1 - kept) * frequency / rope.factor
    return frequency


def rotate(x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Turns each pair (i, i + h/2) of the heads [S, heads, h] by its angle at each position."""
    angles = np.arange(len(x))[:, None, None] * frequencies
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate(
        [low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)], axis=-1
    )
