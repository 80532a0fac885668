"""Peak host memory while loading, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

SLACK = 300 * 2**20

PROGRAM = """
import resource, sys
import tpjax
tpjax.fake_devices(8)
import jax, jax.numpy as jnp
from pathlib import Path
from tpjax.checkpoints.load import load_decoder
from tpjax.checkpoints.opening import open_checkpoint
from tpjax.checkpoints.parameters import abstract_decoder
from tpjax.mesh import make_mesh
mesh = make_mesh(8)
jnp.zeros(8).block_until_ready()
checkpoint = open_checkpoint(Path(sys.argv[1]))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = abstract_decoder(checkpoint.config, mesh, jnp.dtype("float32"), *sys.argv[2:])
model = load_decoder(checkpoint, model, mesh, progress=False)
arrays = [x for x in jax.tree.leaves(model) if isinstance(x, jax.Array)]
shards = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
largest = max(4 * __import__("math").prod(info.shape) for info in checkpoint.source.stored.values())
print(peak() - before, shards, largest)
"""


def measure(path: Path, *quantize: str) -> tuple[int, int, int]:
    command = [sys.executable, "-c", PROGRAM, str(path), *quantize]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    growth, shards, largest = map(int, out.stdout.split())
    return growth, shards, largest


def test_gguf_stays_within_shards_and_one_tensor(gemma3_gguf: Path) -> None:
    growth, shards, largest = measure(gemma3_gguf)
    assert shards > 2**30  # a gigabyte of float32: a second copy would show
    assert growth < shards + largest + SLACK


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 MB of bfloat16-sized shapes in float32, two shards; no tensor over 100 MB."""
    directory = tmp_path_factory.mktemp("large")
    hidden, width, vocab, layers = 1024, 4096, 24_000, 12
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": (hidden // 2, hidden),
            f"{prefix}self_attn.v_proj.weight": (hidden // 2, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}mlp.gate_proj.weight": (width, hidden),
            f"{prefix}mlp.up_proj.weight": (width, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, width),
        }
    names = sorted(shapes)
    index: dict[str, str] = {}
    for shard, part in enumerate((names[::2], names[1::2])):
        file = f"model-{shard}.safetensors"
        save_file({name: np.ones(shapes[name], np.float32) for name in part}, directory / file)
        index |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


def test_safetensors_stays_within_shards_and_one_tensor(large_checkpoint: Path) -> None:
    growth, shards, largest = measure(large_checkpoint)
    assert shards > 6 * 10**8  # the whole file in memory beside the shards would go over
    assert growth < shards + largest + SLACK


@pytest.mark.slow
def test_quantised_while_loading_stays_within_the_smaller_shards(large_checkpoint: Path) -> None:
    growth, shards, largest = measure(large_checkpoint, "int8")
    assert shards < 3 * 10**8  # 100 MB of embedding, 180 of int8; the whole file in memory would go over
    assert growth < shards + largest + SLACK
