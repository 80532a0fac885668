#!/usr/bin/env python
"""Trains a small Llama from nothing, in float32, for scripts/perplexity.py to quantise.

    python scripts/train_float_model.py small                       # some five minutes on two cores
    python scripts/perplexity.py small small/held_out.txt --window 128 --quantize int8 fp8 int4

The built-in aliases are files of 4 bits already, whose weights round well to some grids and badly to others;
the weights of this model have never been rounded. It learns the reference texts that Python's `help()` shows
(pydoc_data.topics, some 450 kB), but for the last tenth, which is written beside it as held_out.txt.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, WIDTH = 2048, 256, 4, 4, 2, 768
LENGTH, BATCH = 128, 8  # tokens and sequences of a step
THETA, EPS = 10_000.0, 1e-5
HEAD = HIDDEN // HEADS

Weights = dict[str, jax.Array]


def texts() -> tuple[str, str]:
    """Returns the text to train on, and the text that is held out."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def train_tokenizer(text: str, directory: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


def initial(seed: int) -> Weights:
    """Returns random weights under Hugging Face's names, [out, in]."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    norms = ["model.norm.weight"]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, outputs in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (outputs * HEAD, HIDDEN)
        shapes[f"{at}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD)
        shapes |= {f"{at}.mlp.{name}_proj.weight": (WIDTH, HIDDEN) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, WIDTH)
        norms += [f"{at}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
    weights = {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: jnp.asarray(x) for name, x in weights.items()} | {name: jnp.ones(HIDDEN) for name in norms}


def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


def rotated(x: jax.Array) -> jax.Array:
    """Applies RoPE to [batch, tokens, heads, HEAD], each element paired with that half a head away."""
    angles = jnp.arange(x.shape[1])[:, None] / THETA ** (jnp.arange(0, HEAD, 2) / HEAD)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def logits(weights: Weights, tokens: jax.Array) -> jax.Array:
    """Computes the logits [batch, tokens, vocabulary]."""
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        w = {
            name: weights[f"{at}.self_attn.{name}_proj.weight"] for name in ("q", "k", "v", "o")
        }  # as the checkpoint names them
        y = norm(x, weights[f"{at}.input_layernorm.weight"])
        heads = {name: (y @ w[name].T).reshape(*y.shape[:2], -1, HEAD) for name in ("q", "k", "v")}
        attended = jax.nn.dot_product_attention(
            rotated(heads["q"]), rotated(heads["k"]), heads["v"], is_causal=True
        )
        x = x + attended.reshape(y.shape[0], y.shape[1], -1) @ w["o"].T
        y = norm(x, weights[f"{at}.post_attention_layernorm.weight"])
        gate, up, down = (weights[f"{at}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (jax.nn.silu(y @ gate.T) * (y @ up.T)) @ down.T
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def loss(weights: Weights, tokens: jax.Array) -> jax.Array:
    """Computes the mean of -log p of each token but the first, in nats."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits(weights, tokens[:, :-1]), tokens[:, 1:])
    return each.mean()


def train(tokens: np.ndarray, steps: int, seed: int) -> Weights:
    schedule = optax.warmup_cosine_decay_schedule(0, 2e-3, min(100, steps // 10), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))
    weights = initial(seed)
    state = optimizer.init(weights)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: Weights, state: Any, batch: jax.Array) -> tuple[Weights, Any, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(weights, batch)
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state, value

    rng, started = np.random.default_rng(seed), time.perf_counter()
    for number in range(steps):
        starts = rng.integers(0, len(tokens) - LENGTH - 1, BATCH)
        batch = np.stack([tokens[start : start + LENGTH + 1] for start in starts])
        weights, state, value = step(weights, state, batch)
        if number % 100 == 0 or number == steps - 1:
            print(f"step {number}: loss {value:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="a directory that does not exist yet")
    parser.add_argument("--steps", type=int, default=1000, help="of 8 sequences of 128 tokens (1000)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True)
    learnt, held_out = texts()
    tokenizer = train_tokenizer(learnt, arguments.directory)
    weights = train(np.array(tokenizer.encode(learnt).ids, np.int32), arguments.steps, arguments.seed)
    save_file({name: np.asarray(x) for name, x in weights.items()}, arguments.directory / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "tie_word_embeddings": False,
    }
    (arguments.directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (arguments.directory / "held_out.txt").write_text(held_out, encoding="utf-8")


if __name__ == "__main__":
    main()
