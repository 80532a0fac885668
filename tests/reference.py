"""What a model computes, written once more for clarity: NumPy, float64, one sequence, everything at once.

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
    """Scores [S, V] of the token after each of ``tokens`` [S], a sequence that gets no longer."""
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
    """The weights of one module, under the names they have there."""
    return {name[len(prefix) + 1 :]: w for name, w in weights.items() if name.startswith(f"{prefix}.")}


def decoder_layer(config: ModelConfig, weights: Weights, x: np.ndarray, number: int) -> np.ndarray:
    """The residual [S, D] after a layer."""

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
    """``x @ W.T + b``, where there is a bias."""
    return x @ weights["weight"].T + weights.get("bias", 0.0)


def norm(config: ModelConfig, weights: Weights, x: np.ndarray) -> np.ndarray:
    """Norms the last axis, with a weight and maybe a bias."""
    return normalised(config, x) * (config.norm.offset + weights["weight"]) + weights.get("bias", 0.0)


def normalised(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    """Divides by the root mean square of the last axis, in a layer norm after taking off the mean."""
    if config.norm.kind == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm.eps)


def mlp(config: ModelConfig, weights: Weights, x: np.ndarray) -> np.ndarray:
    """The feed-forward network, gated or not."""
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
    """The experts of each token [D], weighed, and the one that computes every token."""
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
    """A token's experts and what their outputs are multiplied by."""
    scores = (softmax if moe.scoring == "softmax" else sigmoid)(linear(weights, token))
    chances = scores + weights.get("e_score_correction_bias", 0.0)
    per_group = moe.num_experts // moe.num_groups
    groups = [range(start, start + per_group) for start in range(0, moe.num_experts, per_group)]
    if moe.num_groups > 1:
        groups.sort(key=lambda group: sum(sorted(chances[group])[-2:]))
    allowed = [expert for group in groups[-moe.groups_per_token :] for expert in group]
    chosen = sorted(allowed, key=lambda expert: chances[expert])[-moe.experts_per_token :]
    total = scores[chosen].sum() if moe.norm_topk_prob else 1.0
    return {expert: moe.routed_scale * scores[expert] / total for expert in chosen}


def expert_mlp(config: ModelConfig, weights: Weights, x: np.ndarray) -> np.ndarray:
    """One expert: a gated MLP, or gpt-oss's clamped one."""
    moe = config.moe
    assert moe is not None
    if moe.swiglu_limit is None:
        return gated_mlp(config, weights, x)
    gate, up = (linear(below(weights, name), x) for name in ("gate_proj", "up_proj"))
    gate, up = np.minimum(gate, moe.swiglu_limit), np.clip(up, -moe.swiglu_limit, moe.swiglu_limit)
    return linear(below(weights, "down_proj"), (up + 1) * gate * sigmoid(moe.swiglu_alpha * gate))


def attention(config: ModelConfig, weights: Weights, x: np.ndarray, number: int) -> np.ndarray:
    """Causal self-attention with keys and values shared by groups of query heads."""
    q, k, v = (
        linear(below(weights, f"{name}_proj"), x).reshape(len(x), -1, config.attention.head_dim)
        for name in "qkv"
    )
    q = normed_heads(config, below(weights, "q_norm"), q)
    k = normed_heads(config, below(weights, "k_norm"), k)
    if config.rotates(number):
        rope, turning = config.rope.parameters_of(config.attention.layer_types[number]), config.rotated_dim
        q, k = (np.concatenate([rotate(y[..., :turning], rope), y[..., turning:]], axis=-1) for y in (q, k))
    per_group = config.attention.num_heads // config.attention.num_kv_heads
    mixed = mix(config, q, np.repeat(k, per_group, axis=1), np.repeat(v, per_group, axis=1), number)
    return linear(below(weights, "o_proj"), mixed)


def normed_heads(config: ModelConfig, weights: Weights, x: np.ndarray) -> np.ndarray:
    """Queries or keys [S, heads, h] after their norm."""
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
    """Causal self-attention whose keys and values are projections of one latent per token."""
    assert config.attention.latent is not None
    length, rank, rope = (
        len(x),
        config.attention.latent.kv_lora_rank,
        config.rope.parameters_of(config.attention.layer_types[number]),
    )
    fixed = config.attention.head_dim - config.rotated_dim
    latent_norms = replace(config, norm=replace(config.norm, eps=1e-6))

    def project(name: str, x: np.ndarray) -> np.ndarray:
        return linear(below(weights, name), x)

    if config.attention.latent.q_lora_rank is None:
        q = project("q_proj", x)
    else:
        q_latent = norm(latent_norms, below(weights, "q_a_layernorm"), project("q_a_proj", x))
        q = project("q_b_proj", q_latent)
    q = q.reshape(length, config.attention.num_heads, -1)
    latent, shared = np.split(project("kv_a_proj_with_mqa", x), [rank], axis=-1)
    kv = project("kv_b_proj", norm(latent_norms, below(weights, "kv_a_layernorm"), latent))
    k, v = np.split(kv.reshape(length, config.attention.num_heads, -1), [fixed], axis=-1)
    shared = np.repeat(rotate(shared[:, None], rope), config.attention.num_heads, axis=1)
    q = np.concatenate([q[..., :fixed], rotate(q[..., fixed:], rope)], axis=-1)
    return project("o_proj", mix(config, q, np.concatenate([k, shared], axis=-1), v, number))


def mix(config: ModelConfig, q: np.ndarray, k: np.ndarray, v: np.ndarray, number: int) -> np.ndarray:
    """The values [S, H, h] that each query sees, weighed; one head after the other, side by side."""
    visible = mask(len(q), config.attention.window_of(config.attention.layer_types[number]))
    heads = []
    for head in range(config.attention.num_heads):
        scores = soft_capped(
            q[:, head] @ k[:, head].T * config.attention.query_scale, config.attention.softcap
        )
        heads.append(softmax(np.where(visible, scores, -np.inf)) @ v[:, head])
    return np.concatenate(heads, axis=-1)


def mask(length: int, window: int | None) -> np.ndarray:
    """Whether the query of a row sees the key of a column, [S, S]."""
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    return (distance >= 0) & (distance < (window or length))


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def rotate(x: np.ndarray, rope: RopeParameters) -> np.ndarray:
    """Turns each pair (i, i + h/2) of the heads [S, heads, h] by its angle at each position."""
    length, _, dim = x.shape
    frequencies = np.array([rope_frequency(rope, pair, dim, length) for pair in range(dim // 2)])
    angles = np.arange(length)[:, None, None] * frequencies
    cos, sin = rope.attention_factor * np.cos(angles), rope.attention_factor * np.sin(angles)
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def rope_frequency(rope: RopeParameters, pair: int, dim: int, length: int) -> float:
    """Radians per position of a pair of dimensions, in a sequence of that length."""
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
            turns = original * frequency / (2 * math.pi)
            kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        case "yarn":
            first, last = (pair_that_turns(rope, dim, turns) for turns in (rope.beta_fast, rope.beta_slow))
            if rope.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, dim - 1)
            kept = 1 - (pair - first) / max(last - first, 0.001)
    kept = min(max(kept, 0.0), 1.0)
    return kept * frequency + (1 - kept) * frequency / rope.factor


def pair_that_turns(rope: RopeParameters, dim: int, turns: float) -> float:
    """Which pair turns so often over the original context, as a fraction between two pairs."""
    frequency = 2 * math.pi * turns / rope.original_max_position_embeddings
    return -dim * math.log(frequency) / (2 * math.log(rope.theta))
