"""The model in plain NumPy: float64, one sequence, all positions at once.

No paging, no cache, no fused or padded weights, no devices. The names are those of a Hugging Face checkpoint
without ``model.``, a linear layer is [out, in], and the letters are those of ``tpjax/model.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tpjax.config import ModelConfig, MoEConfig, RopeParameters

Weights = Mapping[str, np.ndarray]


def logits(config: ModelConfig, weights: Weights, tokens: np.ndarray) -> np.ndarray:
    """Computes the logits [S, V] after each of ``tokens`` [S], a sequence that does not grow further."""
    embeddings = weights["embed_tokens.weight"].astype(np.float64)
    x = embeddings[tokens] * config.embedding_scale
    if config.position_embedding == "learned":
        x = x + weights["embed_positions.weight"][: len(tokens)]
    for number in range(config.num_layers):
        x = decoder_layer(config, below(weights, f"layers.{number}"), x, number)
    x = norm(config, below(weights, "norm"), x)
    scores = x @ (embeddings if config.tie_word_embeddings else weights["lm_head.weight"]).T
    return soft_capped(scores * config.logit_scale, config.logit_softcap)


def below(weights: Weights, prefix: str) -> Weights:
    """Returns the weights of one module, named relative to it."""
    return {name[len(prefix) + 1 :]: w for name, w in weights.items() if name.startswith(f"{prefix}.")}


def decoder_layer(config: ModelConfig, weights: Weights, x: np.ndarray, number: int) -> np.ndarray:
    """Returns the residual [S, D] after a layer."""

    def normed(name: str, x: np.ndarray) -> np.ndarray:
        return norm(config, below(weights, f"{name}_layernorm"), x)

    def attend(x: np.ndarray) -> np.ndarray:
        return (latent_attention if config.attention.latent else attention)(
            config, below(weights, "self_attn"), x, number
        )

    def feed_forward(x: np.ndarray) -> np.ndarray:
        return (mixture if config.sparse_layers[number] else mlp)(config, below(weights, "mlp"), x)

    scale = config.residual_scale
    match config.block:
        case "pre":
            x = x + scale * attend(normed("input", x))
            return x + scale * feed_forward(normed("post_attention", x))
        case "post":
            x = x + scale * normed("post_attention", attend(x))
            return x + scale * normed("post_feedforward", feed_forward(x))
        case "sandwich":
            x = x + scale * normed("post_attention", attend(normed("input", x)))
            return x + scale * normed("post_feedforward", feed_forward(normed("pre_feedforward", x)))
        case "parallel":
            return x + scale * (attend(normed("input", x)) + feed_forward(normed("input", x)))
        case "parallel_two_norms":
            return x + scale * (attend(normed("input", x)) + feed_forward(normed("post_attention", x)))


def linear(weights: Weights, x: np.ndarray) -> np.ndarray:
    """Computes ``x @ W.T + b``; the bias is optional."""
    return x @ weights["weight"].T + weights.get("bias", 0.0)


def norm(config: ModelConfig, weights: Weights, x: np.ndarray) -> np.ndarray:
    """Normalises the last axis, with a weight and an optional bias."""
    return normalised(config, x) * (config.norm.offset + weights["weight"]) + weights.get("bias", 0.0)


def normalised(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    """Divides by the root mean square of the last axis; a layer norm first subtracts the mean."""
    if config.norm.kind == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm.eps)


def mlp(config: ModelConfig, weights: Weights, x: np.ndarray) -> np.ndarray:
    """Computes the MLP, with or without a gate."""
    if config.mlp.gated:
        return gated_mlp(config, weights, x)
    return linear(below(weights, "down_proj"), activated(config, linear(below(weights, "up_proj"), x)))


def gated_mlp(config: ModelConfig, weights: Weights, x: np.ndarray) -> np.ndarray:
    gate, up = (linear(below(weights, name), x) for name in ("gate_proj", "up_proj"))
    return linear(below(weights, "down_proj"), activated(config, gate) * up)


def activated(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    match config.mlp.activation:
        case "silu":
            return x * sigmoid(x)
        case "relu":
            return np.maximum(x, 0)
        case "gelu":
            return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        case "gelu_tanh":
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def soft_capped(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


def mixture(config: ModelConfig, weights: Weights, x: np.ndarray) -> np.ndarray:
    """Computes the weighted sum of the experts of each token, and adds the shared expert."""
    moe = config.moe
    assert moe is not None
    out = np.zeros_like(x)
    for position, token in enumerate(x):
        for expert, weight in route(moe, below(weights, "gate"), token).items():
            out[position] += weight * expert_mlp(config, below(weights, f"experts.{expert}"), token)
    if moe.shared_width:
        shared = expert_mlp(config, below(weights, "shared_expert"), x)
        out += (
            shared * sigmoid(linear(below(weights, "shared_expert_gate"), x)) if moe.shared_gate else shared
        )
    return out


def route(moe: MoEConfig, weights: Weights, token: np.ndarray) -> dict[int, float]:
    """Returns the experts of a token and the weights of their outputs."""
    scores = (softmax if moe.scoring == "softmax" else sigmoid)(linear(weights, token))
    routing_scores = scores + weights.get("e_score_correction_bias", 0.0)
    per_group = moe.num_experts // moe.num_groups
    groups = [range(start, start + per_group) for start in range(0, moe.num_experts, per_group)]
    if moe.num_groups > 1:
        groups.sort(key=lambda group: sum(sorted(routing_scores[group])[-2:]))
    allowed = [expert for group in groups[-moe.groups_per_token :] for expert in group]
    chosen = sorted(allowed, key=lambda expert: routing_scores[expert])[-moe.experts_per_token :]
    total = scores[chosen].sum() if moe.norm_topk_prob else 1.0
    return {expert: moe.routed_scale * scores[expert] / total for expert in chosen}


def expert_mlp(config: ModelConfig, weights: Weights, x: np.ndarray) -> np.ndarray:
    """Computes one expert: a gated MLP, or the clamped one of gpt-oss."""
    moe = config.moe
    assert moe is not None
    if moe.swiglu_limit is None:
        return gated_mlp(config, weights, x)
    gate, up = (linear(below(weights, name), x) for name in ("gate_proj", "up_proj"))
    gate, up = np.minimum(gate, moe.swiglu_limit), np.clip(up, -moe.swiglu_limit, moe.swiglu_limit)
    return linear(below(weights, "down_proj"), (up + 1) * gate * sigmoid(moe.swiglu_alpha * gate))


def attention(config: ModelConfig, weights: Weights, x: np.ndarray, number: int) -> np.ndarray:
    """Computes causal self-attention; groups of query heads share keys and values."""
    q, k, v = (
        linear(below(weights, f"{name}_proj"), x).reshape(len(x), -1, config.attention.head_dim)
        for name in "qkv"
    )
    q = normed_heads(config, below(weights, "q_norm"), q)
    k = normed_heads(config, below(weights, "k_norm"), k)
    if config.rotates(number):
        rope, dim = config.rope.parameters_of(config.attention.layer_types[number]), config.rotated_dim
        q, k = (np.concatenate([rotate(y[..., :dim], rope), y[..., dim:]], axis=-1) for y in (q, k))
    per_group = config.attention.num_heads // config.attention.num_kv_heads
    k, v = (np.repeat(y, per_group, axis=1) for y in (k, v))
    return linear(below(weights, "o_proj"), attend(config, q, k, v, number))


def normed_heads(config: ModelConfig, weights: Weights, x: np.ndarray) -> np.ndarray:
    """Normalises queries or keys [S, heads, h]."""
    match config.attention.qk_norm:
        case "none":
            return x
        case "head":
            return norm(config, weights, x)
        case "each_head":
            return normalised(config, x) * weights["weight"].reshape(x.shape[1:])
        case "projection":
            together = normalised(config, x.reshape(len(x), -1)) * weights["weight"]
            return together.reshape(x.shape)


def latent_attention(config: ModelConfig, weights: Weights, x: np.ndarray, number: int) -> np.ndarray:
    """Computes causal self-attention; keys and values are projections of one latent per token."""
    assert config.attention.latent is not None
    length, rank, rope = (
        len(x),
        config.attention.latent.kv_lora_rank,
        config.rope.parameters_of(config.attention.layer_types[number]),
    )
    not_rotated = config.attention.head_dim - config.rotated_dim
    latent_norms = replace(config, norm=replace(config.norm, eps=1e-6))

    def project(name: str, x: np.ndarray) -> np.ndarray:
        return linear(below(weights, name), x)

    if config.attention.latent.q_lora_rank is None:
        q = project("q_proj", x)
    else:
        q_latent = norm(latent_norms, below(weights, "q_a_layernorm"), project("q_a_proj", x))
        q = project("q_b_proj", q_latent)
    q = q.reshape(length, config.attention.num_heads, -1)
    latent, rotary_key = np.split(project("kv_a_proj_with_mqa", x), [rank], axis=-1)
    kv = project("kv_b_proj", norm(latent_norms, below(weights, "kv_a_layernorm"), latent))
    k, v = np.split(kv.reshape(length, config.attention.num_heads, -1), [not_rotated], axis=-1)
    rotary_key = np.repeat(rotate(rotary_key[:, None], rope), config.attention.num_heads, axis=1)
    q = np.concatenate([q[..., :not_rotated], rotate(q[..., not_rotated:], rope)], axis=-1)
    return project("o_proj", attend(config, q, np.concatenate([k, rotary_key], axis=-1), v, number))


def attend(config: ModelConfig, q: np.ndarray, k: np.ndarray, v: np.ndarray, number: int) -> np.ndarray:
    """Computes the attention output [S, H * h], one head after the other."""
    visible = mask(len(q), config.attention.window_of(config.attention.layer_types[number]))
    heads = []
    for head in range(config.attention.num_heads):
        scores = soft_capped(
            q[:, head] @ k[:, head].T * config.attention.query_scale, config.attention.softcap
        )
        heads.append(softmax(np.where(visible, scores, -np.inf)) @ v[:, head])
    return np.concatenate(heads, axis=-1)


def mask(length: int, window: int | None) -> np.ndarray:
    """Returns whether the query of a row sees the key of a column, [S, S]."""
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    return (distance >= 0) & (distance < (window or length))


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def rotate(x: np.ndarray, rope: RopeParameters) -> np.ndarray:
    """Rotates each pair (i, i + h/2) of the heads [S, heads, h] by its angle at each position."""
    length, _, dim = x.shape
    frequencies = np.array([rope_frequency(rope, pair, dim, length) for pair in range(dim // 2)])
    angles = np.arange(length)[:, None, None] * frequencies
    cos, sin = rope.attention_factor * np.cos(angles), rope.attention_factor * np.sin(angles)
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def rope_frequency(rope: RopeParameters, pair: int, dim: int, length: int) -> float:
    """Returns the radians per position of a pair of dimensions in a sequence of ``length`` tokens."""
    frequency, original = rope.theta ** (-2 * pair / dim), rope.original_max_position_embeddings
    match rope.kind:
        case "default":
            return frequency / (rope.divisors[pair] if rope.divisors else 1)
        case "linear":
            return frequency / rope.factor
        case "dynamic":
            growth = rope.factor * max(length, original) / original - (rope.factor - 1)
            return (rope.theta * growth ** (dim / (dim - 2))) ** (-2 * pair / dim) if dim > 2 else frequency
        case "longrope":
            divisors = rope.long_divisors if length > original else rope.divisors
            assert divisors is not None
            return frequency / divisors[pair]
        case "llama3":
            rotations = original * frequency / (2 * math.pi)
            kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        case "yarn":
            first, last = (pair_of_rotations(rope, dim, n) for n in (rope.beta_fast, rope.beta_slow))
            if rope.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, dim - 1)
            kept = 1 - (pair - first) / max(last - first, 0.001)
    kept = min(max(kept, 0.0), 1.0)
    return kept * frequency + (1 - kept) * frequency / rope.factor


def pair_of_rotations(rope: RopeParameters, dim: int, rotations: float) -> float:
    """Returns the pair, interpolated, that completes ``rotations`` over the original context."""
    frequency = 2 * math.pi * rotations / rope.original_max_position_embeddings
    return -dim * math.log(frequency) / (2 * math.log(rope.theta))
