#!/usr/bin/env python
"""Writes tests/goldens: tiny random models and what transformers computes with them.

Needs the `parity` extra. Each tiny model is saved as a Hugging Face directory with `golden.npz` beside it:
a prompt, the logits after each of its tokens, and the greedy continuation. For the real models the
logits are kept at some token ids only, to stay small. `bfloat16.json` says how far transformers' own bfloat16
is from these logits.

    python scripts/make_goldens.py            # the tiny models
    python scripts/make_goldens.py qwen3      # one of them
    python scripts/make_goldens.py --real     # and the built-in aliases, from their GGUF files
    python scripts/make_goldens.py --bfloat16 # bfloat16.json alone, from the goldens as they are
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens"
REAL = ("smollm2-135m", "gemma3-270m")
STEPS = 64
REAL_PROMPT = "The capital of France is Paris. The largest city of Japan is Tokyo, and in 1984 it had 🙂"
# enough of the vocabulary to notice a wrong row, cheap enough to keep in the repository
KEPT_STRIDE = 101


def tiny_models() -> dict[str, transformers.PretrainedConfig]:
    """Shapes that nothing divides: 6 query and 2 KV heads, odd vocabularies and widths."""
    common = {
        "vocab_size": 131,
        "hidden_size": 48,
        "intermediate_size": 90,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.25,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    small = {**common, "hidden_size": 36, "intermediate_size": 46, "num_hidden_layers": 2}
    without_groups = {name: value for name, value in small.items() if name != "num_key_value_heads"}
    two_thirds_rotary = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.67}
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 8.0,
    }
    llama3_rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return {
        "llama": transformers.LlamaConfig(
            **common, num_hidden_layers=2, rope_parameters=llama3_rope, tie_word_embeddings=False
        ),
        "llama-bias-tied": transformers.LlamaConfig(
            **common, num_hidden_layers=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
        ),
        "mistral": transformers.MistralConfig(**common, num_hidden_layers=2, sliding_window=7),
        "gemma3": transformers.Gemma3TextConfig(
            **{**common, "num_attention_heads": 4, "num_key_value_heads": 1},
            num_hidden_layers=3,
            head_dim=32,
            query_pre_attn_scalar=24,
            sliding_window=9,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "qwen2": transformers.Qwen2Config(
            **small, use_sliding_window=True, sliding_window=9, max_window_layers=1
        ),
        "qwen3": transformers.Qwen3Config(**small, head_dim=10, tie_word_embeddings=True),
        "gemma": transformers.GemmaConfig(
            **{**small, "num_attention_heads": 4, "num_key_value_heads": 1}, head_dim=16
        ),
        "gemma2": transformers.Gemma2Config(
            **small,
            head_dim=10,
            query_pre_attn_scalar=24,
            sliding_window=9,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=5.0,
        ),
        "gemma3-with-vision": transformers.Gemma3Config(
            text_config={
                **small,
                "head_dim": 10,
                "query_pre_attn_scalar": 24,
                "sliding_window": 9,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "num_hidden_layers": 3,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            vision_config={
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 4,
                "patch_size": 2,
            },
            initializer_range=0.25,
            mm_tokens_per_image=4,
            image_token_index=130,
            boi_token_index=129,
            eoi_token_index=128,
        ),
        "phi3": transformers.Phi3Config(
            **small,
            pad_token_id=0,
            original_max_position_embeddings=32,  # shorter than the prompt: the long factors
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.67,
                "short_factor": [1.0, 1.1],
                "long_factor": [1.5, 6.0],
            },
        ),
        "smollm3": transformers.SmolLM3Config(
            **{**small, "num_hidden_layers": 3}, pad_token_id=0, no_rope_layers=[1, 0, 1]
        ),
        "olmo2": transformers.Olmo2Config(**small, rope_parameters=yarn),
        "granite": transformers.GraniteConfig(
            **small,
            embedding_multiplier=3.0,
            attention_multiplier=0.5,
            residual_multiplier=0.7,
            logits_scaling=2.0,
        ),
        "cohere": transformers.CohereConfig(**small, use_qk_norm=True, logit_scale=0.5),
        "cohere2": transformers.Cohere2Config(
            **{**small, "num_hidden_layers": 3},
            sliding_window=9,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "starcoder2": transformers.Starcoder2Config(**small, sliding_window=9),
        "gpt2": transformers.GPT2Config(
            vocab_size=131,
            n_positions=160,
            n_embd=36,
            n_layer=2,
            n_head=6,
            n_inner=46,
            initializer_range=0.25,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "gpt_neox": transformers.GPTNeoXConfig(**without_groups, rope_parameters=two_thirds_rotary),
        "gpt_neox-serial": transformers.GPTNeoXConfig(
            **without_groups, rope_parameters=two_thirds_rotary, use_parallel_residual=False
        ),
        "deepseek_v3": transformers.DeepseekV3Config(
            **{
                **without_groups,
                "num_hidden_layers": 3,
                "num_attention_heads": 5,
                "initializer_range": 0.2,
            },
            num_key_value_heads=5,
            moe_intermediate_size=11,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=20,
            kv_lora_rank=14,
            qk_nope_head_dim=10,
            qk_rope_head_dim=6,
            v_head_dim=9,
            rope_parameters={**yarn, "mscale": 0.7, "mscale_all_dim": 1.3},
        ),
    }


def tiny_mixtures() -> dict[str, transformers.PretrainedConfig]:
    """Mixtures of experts: 6 experts are sharded by expert at tp=1, 2, 3 and 6, by width at others."""
    common = {
        "vocab_size": 131,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.25,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_experts_per_tok": 2,
    }
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 150_000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    }
    return {
        "mixtral": transformers.MixtralConfig(**common, intermediate_size=12, num_local_experts=5),
        "qwen2_moe": transformers.Qwen2MoeConfig(
            **common,
            intermediate_size=30,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=18,
            num_experts=6,
            mlp_only_layers=[0],
        ),
        "qwen3_moe": transformers.Qwen3MoeConfig(
            **common,
            head_dim=10,
            intermediate_size=30,
            moe_intermediate_size=7,
            num_local_experts=6,
            norm_topk_prob=True,
        ),
        "gpt_oss": transformers.GptOssConfig(
            **common,
            head_dim=10,
            intermediate_size=7,
            num_local_experts=6,
            sliding_window=7,
            swiglu_limit=1.5,
            rope_parameters=yarn,
        ),
    }


def write_tiny(name: str, config: transformers.PretrainedConfig) -> None:
    """Saves one tiny model and its golden."""
    torch.manual_seed(0)
    config.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if re.search(r"norm|\bln_|(bias|sinks)$", parameter_name):
                parameter.add_(torch.randn_like(parameter) * 0.3)  # a norm of ones would hide a missing norm
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.2)  # zeros would hide a missing one
        if config.tie_word_embeddings:
            model.get_input_embeddings().weight.mul_(
                0.1
            )  # else each token predicts itself, whatever the layers
    directory = GOLDENS / name
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    prompt = np.random.default_rng(7).integers(3, config.get_text_config().vocab_size, 40)
    logits, greedy = run(model, prompt)
    np.savez_compressed(directory / "golden.npz", prompt=prompt, logits=logits, greedy=greedy)
    print(f"{name}: logits {logits.shape}, {len(set(greedy))} different tokens of {STEPS}: {greedy[:8]}…")


def write_real(name: str) -> None:
    """Saves the golden of a built-in alias; the weights come from its package."""
    from tpjax.checkpoints.hub import resolve
    from tpjax.text.loading import load_tokenizer

    path = resolve(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    prompt = np.array(load_tokenizer(path).encode(REAL_PROMPT))
    logits, greedy = run(model, prompt)
    kept = np.unique(np.concatenate([np.arange(0, logits.shape[1], KEPT_STRIDE), logits.argmax(axis=1)]))
    np.savez_compressed(
        GOLDENS / f"{name}.npz",
        prompt=prompt,
        kept=kept,
        logits=logits[:, kept],
        scale=np.abs(logits).max(),
        greedy=greedy,
    )
    print(f"{name}: logits {logits.shape}, {len(set(greedy))} different tokens of {STEPS}: {greedy[:8]}…")


@torch.no_grad()
def run(model: torch.nn.Module, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits after each prompt token, and the greedy continuation with no end-of-text rule."""
    ids = torch.tensor(prompt)[None]
    after_each = logits(model, prompt)
    for _ in range(STEPS):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return after_each, ids[0, len(prompt) :].numpy()


def write_bfloat16() -> None:
    """Saves how far transformers' bfloat16 is from each golden that there is."""
    from tpjax.checkpoints.hub import resolve

    sys.path.insert(0, str(GOLDENS.parent))
    from rounding import distance, prompts

    def logits_of(name: str, dtype: torch.dtype) -> list[np.ndarray]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            GOLDENS / name, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        return [logits(model, prompt) for prompt in prompts(model.config.get_text_config().vocab_size)]

    found = {}
    for name in sorted(path.parent.name for path in GOLDENS.glob("*/golden.npz")):
        found[name] = distance(logits_of(name, torch.bfloat16), logits_of(name, torch.float32))
    for name in REAL:
        path, golden = resolve(name), np.load(GOLDENS / f"{name}.npz")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16, attn_implementation="eager"
        )
        found[name] = distance(
            [logits(model.eval(), golden["prompt"])[:, golden["kept"]]], [golden["logits"]]
        )
    rows = (f"{json.dumps(name)}: {json.dumps(figures)}" for name, figures in found.items())
    (GOLDENS / "bfloat16.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")


@torch.no_grad()
def logits(model: torch.nn.Module, prompt: np.ndarray | list[int]) -> np.ndarray:
    """Logits [T, V] after each prompt token, as float32."""
    return model(torch.tensor(prompt)[None]).logits[0].float().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="tiny models to make; all if none is named")
    parser.add_argument("--real", action="store_true", help="also the built-in aliases")
    parser.add_argument("--bfloat16", action="store_true", help="only how far bfloat16 is from what there is")
    arguments = parser.parse_args()
    if arguments.bfloat16:
        write_bfloat16()
        return
    for name, config in (tiny_models() | tiny_mixtures()).items():
        if not arguments.names or name in arguments.names:
            write_tiny(name, config)
    if arguments.real:
        for name in REAL:
            write_real(name)
    write_bfloat16()


if __name__ == "__main__":
    main()
