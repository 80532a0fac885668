#!/usr/bin/env python
"""Perplexity of a text under a model, and what keeping weights in 8 or 4 bits, or its cache in 8, does to it.

    python scripts/perplexity.py smollm2-135m                            # as it is
    python scripts/perplexity.py smollm2-135m --quantize int8 fp8        # and ratios to that
    python scripts/perplexity.py smollm2-135m --kv-dtype int8 fp8        # of keys and values
    python scripts/perplexity.py smollm2-135m --quantize int8 --tp 4 my.txt
    python scripts/perplexity.py smollm2-135m --quantize int8 --help-texts

The text is read in windows of --window tokens, each by itself, and behind BOS where the checkpoint's settings
add it (without, Gemma 3 270M's perplexity is twice as high); the first token of a window is not counted.
Perplexity is the exponential of the mean of -log p of the others; a ratio comes with its standard error.
Unless a file is given the text is the beginning of Lewis Carroll, Alice's Adventures in Wonderland (1865),
which is in the public domain, written down from memory. With --help-texts it is 32,000 characters of Python's
help, six times as many tokens, or as many characters as are asked for; versions of Python differ in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tpjax.text.tokenizer import Tokenizer

TEXT = Path(__file__).parent / "data" / "alice.txt"
HELP_TEXTS_FROM = 100_000  # characters
_ROWS = 16  # of logits at once: a gigabyte of temporaries makes a vocabulary of 262,144 tokens slow


def surprise(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Returns -log p of tokens, in nats, float64.

    Args:
        logits: float32 [T, V], those before each token.
        tokens: T tokens.
    """
    found = np.empty(len(tokens))
    for start in range(0, len(tokens), _ROWS):
        some = slice(start, start + _ROWS)
        rows = logits[some]
        below = rows - rows.max(axis=-1, keepdims=True)
        normaliser = np.log(np.exp(below).sum(axis=-1, dtype=np.float64))
        found[some] = normaliser - below[np.arange(len(rows)), tokens[some]]
    return found


def windows(tokenizer: Tokenizer, text: str, size: int) -> list[list[int]]:
    """Returns the tokens of a text in windows, behind BOS where the checkpoint's settings add it."""
    tokens, begin = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)[:1]
    begin = begin if begin == [tokenizer.bos_id] else []
    step = size - len(begin)
    return [begin + tokens[start : start + step] for start in range(0, len(tokens), step)]


def losses(model: str, parts: list[list[int]], window: int, tp: int, **kept: str) -> np.ndarray:
    """Returns -log p of each token that counts, in nats."""
    from tpjax import LLM

    each = []
    with LLM(model, tp=tp, max_model_len=window, max_slots=1, **kept) as llm:
        for part in parts:
            each.append(surprise(llm.logits(part)[:-1], part[1:]))
    return np.concatenate(each)


def help_texts(characters: int = 32_000) -> str:
    """Returns a part of what Python's ``help`` prints."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return text[HELP_TEXTS_FROM : HELP_TEXTS_FROM + characters]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a name that LLM takes")
    parser.add_argument("text", nargs="?", type=Path, default=TEXT, help="a UTF-8 file (Alice)")
    parser.add_argument(
        "--help-texts",
        nargs="?",
        type=int,
        const=32_000,
        metavar="CHARACTERS",
        help="of Python, instead of a file",
    )
    parser.add_argument("--quantize", nargs="+", default=[], help="int8, fp8, int4")
    parser.add_argument("--kv-dtype", nargs="+", default=[], help="int8, fp8")
    parser.add_argument("--window", type=int, default=512, help="tokens read at once, BOS included (512)")
    parser.add_argument("--tp", type=int, default=1, help="devices (1)")
    arguments = parser.parse_args()

    import tpjax
    from tpjax.checkpoints.hub import resolve
    from tpjax.text.loading import load_tokenizer

    tpjax.fake_devices(arguments.tp)
    tokenizer = load_tokenizer(resolve(arguments.model))
    if tokenizer is None:
        parser.error(f"{arguments.model} has no tokenizer")
    from_help = arguments.help_texts is not None
    name = "Python's help texts" if from_help else arguments.text.name
    text = help_texts(arguments.help_texts) if from_help else arguments.text.read_text(encoding="utf-8")
    parts = windows(tokenizer, text, arguments.window)
    if (count := sum(len(part) - 1 for part in parts)) < 1:
        parser.error(f"{name} has {count} tokens with one before them: at least 1 is needed")
    plain = losses(arguments.model, parts, arguments.window, arguments.tp)
    perplexity = np.exp(plain.mean())
    print(f"{arguments.model}, {len(plain)} tokens of {name}: perplexity {perplexity:.4f}", flush=True)
    variants = [("quantize", kind) for kind in arguments.quantize]
    variants += [("kv_dtype", kind) for kind in arguments.kv_dtype]
    for what, kind in variants:
        more = losses(arguments.model, parts, arguments.window, arguments.tp, **{what: kind}) - plain
        error = more.std() / np.sqrt(len(more))
        ratio = np.expm1(more.mean())
        print(f"  {what}={kind}: {perplexity * (1 + ratio):.4f}, {ratio:+.2%} ± {error:.2%}", flush=True)


if __name__ == "__main__":
    main()
