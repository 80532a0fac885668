#!/usr/bin/env python
"""Loading weights on this machine: bytes/s, next to reading the same files into memory.

    python scripts/bench_load.py              # 4 GB in bfloat16, at tp 1 and 8; about 13 GB of memory
    python scripts/bench_load.py --size 1     # on a small machine

The checkpoint has the shapes of Llama-3.2-3B, with as many layers as make up the size; it is written once, to
the cache folder. Both sides use a thread per core and find the files in the page cache. `read` is `readinto`
into memory that has been touched before; `read, fresh` into memory just allocated, as loading has to. They
take turns with loading, and ratios are taken within a round before the median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from contenders import Contender, Target, serve
from safetensors.numpy import save_file

from tpjax.checkpoints.hub import cache_dir
from tpjax.planning.timing import median_ratio, seconds, take_turns

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}
HIDDEN, WIDTH, VOCAB = 3072, 8192, 128_256
LAYER = {
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
    "self_attn.q_proj": (3072, HIDDEN),
    "self_attn.k_proj": (1024, HIDDEN),
    "self_attn.v_proj": (1024, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 3072),
    "mlp.gate_proj": (WIDTH, HIDDEN),
    "mlp.up_proj": (WIDTH, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDTH),
}
LAYERS_A_FILE = 8
GOAL = 0.7


def checkpoint(size_gb: float) -> Path:
    """Returns a synthetic checkpoint of about this size, and writes it if it is not there yet."""
    layer_bytes = sum(2 * int(np.prod(shape)) for shape in LAYER.values())
    layers = max(1, round((size_gb * 1e9 - 2 * VOCAB * HIDDEN) / layer_bytes))
    folder = cache_dir() / "bench" / f"llama-3.2-3b-{layers}-layers"
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(size=1 << 22).astype(ml_dtypes.bfloat16)

    def weight(shape: tuple[int, ...]) -> np.ndarray:
        return np.resize(noise, shape)

    parts = [{"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}]
    for first in range(0, layers, LAYERS_A_FILE):
        parts.append(
            {
                f"model.layers.{layer}.{name}.weight": shape
                for layer in range(first, min(first + LAYERS_A_FILE, layers))
                for name, shape in LAYER.items()
            }
        )
    index = {}
    for number, part in enumerate(parts):
        file = f"model-{number:05}.safetensors"
        save_file({name: weight(shape) for name, shape in part.items()}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    return folder


def reader(files: list[Path], threads: int, buffers: list[np.ndarray] | None) -> float:
    """Bytes/s of `readinto` of complete files, each split into an equal part for every thread."""
    sizes = [file.stat().st_size for file in files]

    def read_part(job: tuple[Path, np.ndarray, int, int]) -> None:
        path, target, first, last = job
        with open(path, "rb", buffering=0) as file:
            file.seek(first)
            while first < last:
                first += file.readinto(target[first:last].data)

    def read() -> None:
        targets = buffers or [np.empty(size, np.uint8) for size in sizes]
        jobs = [
            (file, target, size * part // threads, size * (part + 1) // threads)
            for file, target, size in zip(files, targets, sizes, strict=True)
            for part in range(threads)
        ]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read_part, jobs))

    return sum(sizes) / seconds(read)


def worker(folder: Path, tp: int, dtype: str) -> dict[str, Callable[[], float]]:
    """Bytes of the files a second, of loading and of reading."""
    import tpjax

    tpjax.fake_devices(tp)
    import jax

    from tpjax.checkpoints.load import load_decoder
    from tpjax.checkpoints.opening import open_checkpoint
    from tpjax.checkpoints.parameters import abstract_decoder
    from tpjax.mesh import make_mesh

    mesh = make_mesh(tp)
    opened = open_checkpoint(folder)
    files = sorted(folder.glob("*.safetensors"))
    threads = len(os.sched_getaffinity(0))
    jax.block_until_ready(jax.numpy.zeros(8))

    def load() -> float:
        model = abstract_decoder(opened.config, mesh, jax.numpy.dtype(dtype))

        def loaded() -> None:
            jax.block_until_ready(jax.tree.leaves(load_decoder(opened, model, mesh, progress=False)))

        return sum(file.stat().st_size for file in files) / seconds(loaded)

    def read() -> float:
        touched = [np.ones(file.stat().st_size, np.uint8) for file in files]
        return reader(files, threads, touched)

    return {"load": load, "read": read, "read, fresh": lambda: reader(files, threads, None)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=4.0, metavar="GB", help="of the checkpoint (4)")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 8], metavar="N", help="devices (1 8)")
    parser.add_argument("--dtype", default="bfloat16", help="of the loaded weights (bfloat16)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (5)")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        folder, tp, dtype = arguments.worker
        serve(worker(Path(folder), int(tp), dtype))
        return

    folder = checkpoint(arguments.size)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    threads = len(os.sched_getaffinity(0))
    print(f"{folder.name}, {size / 1e9:.2f} GB bfloat16 as {arguments.dtype}, {threads} threads")
    for tp in arguments.tp:
        contender = Contender(f"tp={tp}", __file__, [str(folder), str(tp), arguments.dtype])
        work = ("read", "load", "read, fresh")  # the first turn fills the page cache
        figures = take_turns({what: partial(contender.run, what) for what in work}, arguments.rounds)
        contender.close()
        for what, values in figures.items():
            low, middle, high = (f(values) / 1e9 for f in (min, statistics.median, max))
            print(f"tp={tp}  {what:14}{middle:8.2f} GB/s  ({low:.2f} to {high:.2f})")
        for what in ("read", "read, fresh"):
            ratio = median_ratio(figures["load"], figures[what])
            print(Target(f"tp={tp}  load / {what}", ratio, ">=", GOAL))


if __name__ == "__main__":
    main()
