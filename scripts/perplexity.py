#!/usr/bin/env python
"""Perplexity of a text under a model, and what keeping weights in 8 or 4 bits, or its cache in 8, does to it.

    python scripts/perplexity.py smollm2-135m                            # as it is
    python scripts/perplexity.py smollm2-135m --quantize int8 fp8        # and ratios to that
    python scripts/perplexity.py smollm2-135m --kv-dtype int8 fp8        # of keys and values
    python scripts/perplexity.py smollm2-135m --quantize int8 --tp 4 my.txt
    python scripts/perplexity.py smollm2-135m --quantize int8 --help-texts

The text is read in windows of --window tokens, each by itself; the first token of a window is not counted.
Perplexity is the exponential of the mean of -log p of the others; a ratio comes with its standard error.
Unless a file is given the text is the beginning of Lewis Carroll, Alice's Adventures in Wonderland (1865),
which is in the public domain, written down from memory. With --help-texts it is 32,000 characters of Python's
help, six times as many tokens; versions of Python differ in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

TEXT = Path(__file__).parent / "data" / "alice.txt"
HELP_TEXTS = slice(100_000, 132_000)  # characters


def losses(model: str, tokens: list[int], window: int, tp: int, **kept: str) -> np.ndarray:
    """Returns -log p of each token that counts, in nats."""
    from tpjax import LLM

    each = []
    with LLM(model, tp=tp, max_model_len=window, max_slots=1, **kept) as llm:
        for start in range(0, len(tokens), window):
            part = tokens[start : start + window]
            logits = llm.logits(part).astype(np.float64)[:-1]
            highest = logits.max(axis=-1)
            normaliser = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=-1))
            each.append(normaliser - logits[np.arange(len(logits)), part[1:]])
    return np.concatenate(each)


def help_texts() -> str:
    """Returns a part of what Python's ``help`` prints."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[HELP_TEXTS]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a name that LLM takes")
    parser.add_argument("text", nargs="?", type=Path, default=TEXT, help="a UTF-8 file (Alice)")
    parser.add_argument("--help-texts", action="store_true", help="of Python, instead of a file")
    parser.add_argument("--quantize", nargs="+", default=[], help="int8, fp8, int4")
    parser.add_argument("--kv-dtype", nargs="+", default=[], help="int8, fp8")
    parser.add_argument("--window", type=int, default=512, help="tokens read at once (512)")
    parser.add_argument("--tp", type=int, default=1, help="devices (1)")
    arguments = parser.parse_args()

    import tpjax
    from tpjax.checkpoints.hub import resolve
    from tpjax.text.loading import load_tokenizer

    tpjax.fake_devices(arguments.tp)
    tokenizer = load_tokenizer(resolve(arguments.model))
    if tokenizer is None:
        parser.error(f"{arguments.model} has no tokenizer")
    name = "Python's help texts" if arguments.help_texts else arguments.text.name
    text = help_texts() if arguments.help_texts else arguments.text.read_text(encoding="utf-8")
    tokens = tokenizer.encode(text)
    if len(tokens) < 2:
        parser.error(f"{name} has {len(tokens)} tokens: at least 2 are needed")
    plain = losses(arguments.model, tokens, arguments.window, arguments.tp)
    perplexity = np.exp(plain.mean())
    print(f"{arguments.model}, {len(plain)} tokens of {name}: perplexity {perplexity:.4f}")
    variants = [("quantize", kind) for kind in arguments.quantize]
    variants += [("kv_dtype", kind) for kind in arguments.kv_dtype]
    for what, kind in variants:
        more = losses(arguments.model, tokens, arguments.window, arguments.tp, **{what: kind}) - plain
        error = more.std() / np.sqrt(len(more))
        ratio = np.expm1(more.mean())
        print(f"  {what}={kind}: {perplexity * (1 + ratio):.4f}, {ratio:+.2%} ± {error:.2%}", flush=True)


if __name__ == "__main__":
    main()
