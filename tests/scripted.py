"""A checkpoint that writes scripts: each token of one is followed by the next, whatever came before."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from conftest import GOLDENS
from safetensors.numpy import load_file, save_file
from serving import CONTEXT, tiny_checkpoint

HIDDEN, VOCAB = 96, 512
EOS = 1


def scripted_checkpoint(
    directory: Path, scripts: Mapping[str, Sequence[str]], special: Sequence[str]
) -> Path:
    """A Llama of one layer that adds nothing to its input, so that a token alone decides about the next.

    Args:
        directory: where to.
        scripts: first token (the prompt's last) -> what follows, each piece a token of its own, and then EOS.
            A piece that several scripts have is followed by the same in all of them.
        special: pieces that are control tokens.
    """
    tiny_checkpoint(directory)
    library = json.loads((directory / "tokenizer.json").read_text())
    pieces = list(dict.fromkeys(piece for first, rest in scripts.items() for piece in (first, *rest)))
    ids = {piece: 320 + i for i, piece in enumerate(pieces)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    library["added_tokens"] += [
        {"id": i, "content": piece, "special": piece in special, **flags} for piece, i in ids.items()
    ]
    (directory / "tokenizer.json").write_text(json.dumps(library))
    following: dict[int, int] = {}
    for first, rest in scripts.items():
        chain = [ids[first], *(ids[piece] for piece in rest), EOS]
        for before, after in itertools.pairwise(chain):
            assert following.setdefault(before, after) == after, (first, pieces[before - 320])
    assert len(ids) < HIDDEN and len(ids) + 320 < VOCAB

    config = json.loads((GOLDENS / "llama" / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "vocab_size": VOCAB, "eos_token_id": EOS, "bos_token_id": 0}
    config |= {"num_hidden_layers": 1, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    golden = load_file(GOLDENS / "llama" / "model.safetensors")
    old = json.loads((GOLDENS / "llama" / "config.json").read_text())["hidden_size"]
    weights = {}
    for name, value in golden.items():
        if ".layers." in name and ".layers.0." not in name:
            continue
        shape = tuple(HIDDEN if side == old else side for side in value.shape)
        weights[name] = (np.ones if "norm" in name else np.zeros)(shape, np.float32)
    embedding, head = np.zeros((2, VOCAB, HIDDEN), np.float32)
    for row, (before, after) in enumerate(following.items()):
        embedding[before, row] = 1
        head[after, row] = 10
    weights |= {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    save_file(weights, directory / "model.safetensors")
    return directory
