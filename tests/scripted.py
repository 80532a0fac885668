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
    first_id = 1 + max(library["model"]["vocab"].values())
    known = {piece: i for piece, i in library["model"]["vocab"].items() if piece in pieces}
    new = [piece for piece in pieces if piece not in known]
    ids = known | {piece: first_id + i for i, piece in enumerate(new)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    library["added_tokens"] += [
        {"id": ids[piece], "content": piece, "special": piece in special, **flags} for piece in new
    ]
    (directory / "tokenizer.json").write_text(json.dumps(library))
    following: dict[int, int] = {}
    for first, rest in scripts.items():
        chain = [ids[first], *(ids[piece] for piece in rest), EOS]
        for before, after in itertools.pairwise(chain):
            assert following.setdefault(before, after) == after, (first, before)
    assert len(ids) < HIDDEN and first_id + len(ids) < VOCAB

    config = json.loads((GOLDENS / "llama" / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "vocab_size": VOCAB, "eos_token_id": EOS, "bos_token_id": 0}
    config |= {"num_hidden_layers": 1, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    golden = load_file(GOLDENS / "llama" / "model.safetensors")
    weights = {}
    for name, value in golden.items():
        if ".layers." in name and ".layers.0." not in name:
            continue
        outputs = name.endswith(("o_proj.weight", "down_proj.weight"))  # these write the hidden state
        shape = (HIDDEN, *value.shape[1:]) if outputs or value.ndim == 1 else (value.shape[0], HIDDEN)
        weights[name] = (np.ones if "norm" in name else np.zeros)(shape, np.float32)
    embedding, head = np.zeros((2, VOCAB, HIDDEN), np.float32)
    for row, (before, after) in enumerate(following.items()):
        embedding[before, row] = 1
        head[after, row] = 10
    weights |= {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    save_file(weights, directory / "model.safetensors")
    return directory
