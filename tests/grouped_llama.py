"""A Llama whose matrices have whole groups of 128 inputs: the goldens' are smaller."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

_HIDDEN, _INNER, _KEYS, _VOCABULARY = 128, 256, 64, 64


def write(folder: Path) -> Path:
    """Writes one of random weights, and returns its directory."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0"
    shapes = {
        f"{layer}.self_attn.q_proj": (_HIDDEN, _HIDDEN),
        f"{layer}.self_attn.k_proj": (_KEYS, _HIDDEN),
        f"{layer}.self_attn.v_proj": (_KEYS, _HIDDEN),
        f"{layer}.self_attn.o_proj": (_HIDDEN, _HIDDEN),
        f"{layer}.mlp.gate_proj": (_INNER, _HIDDEN),
        f"{layer}.mlp.up_proj": (_INNER, _HIDDEN),
        f"{layer}.mlp.down_proj": (_HIDDEN, _INNER),
        "model.embed_tokens": (_VOCABULARY, _HIDDEN),
    }
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.normal(size=shape) * 0.1 for name, shape in shapes.items()}
    for norm in (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"):
        tensors[f"{norm}.weight"] = np.ones(_HIDDEN)
    save_file({name: x.astype(np.float32) for name, x in tensors.items()}, folder / "model.safetensors")
    return folder
