"""Writes tests/goldens/tokenizers.json: what other implementations make of awkward texts.

    python scripts/make_tokenizer_goldens.py MODELS_DIR

MODELS_DIR holds SmolLM2-135M-Instruct.Q4_1.gguf and gemma-3-270m-q4_k_m.gguf. Needs transformers, which the
test suite does not: tests/trained_tokenizers.py reads this file, and the tests compare live where they can.
"""

import json
import sys
from pathlib import Path

GOLDENS = Path(__file__).parent.parent / "tests" / "goldens" / "tokenizers.json"
GGUF_FILES = {"smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma3": "gemma-3-270m-q4_k_m.gguf"}

TEXTS = [
    "",
    " ",
    "Hello world",
    " leading and trailing ",
    "don't I'LL we've",
    "runs  of   spaces    and\ttabs\t\tand \t mixtures",
    "line\nbreaks\n\nand\r\nmore\n\n\n\n",
    "def f(x):\n    if x:\n        return [i**2 for i in x]  # done\n",
    "1234567890 007 3.14159 1,000,000 ½ ² ٣",
    "你好。世界。日本語のテキスト 한국어 텍스트",
    "👍🏽 👩‍👩‍👧‍👦 🇫🇷 ❤️",
    "e\u0301 n\u0303 a\u0323\u0300 \u1e69 ﬁ",
    "ქართული עברית हिन्दी ไทย",
    "nbsp\u00a0wide\u3000zero\u200bwidth\ufeff",
    "\x00\x07 control",
    "\U0001d518\U0001d52b\U0001d526 ⨁ 🫠",
    "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n",
    "<start_of_turn>user\nhi there<end_of_turn>\n<start_of_turn>model\n",
    "<b>bold</b> <table><tr><td>x</td></tr></table> <|endoftext|> </s> <eos>",
    "<|im_start|<end_of_turn <",
]


def reference(directory: Path, name: str):
    """Transformers' tokenizer for a GGUF file, put right where it departs from the model's tokenizer.json.

    SmolLM2 isolates every digit before GPT-2's expression runs; transformers' GGUF reader does not know the
    pre-tokenizer's name. Loading takes 5 to 15 seconds.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=GGUF_FILES[name])
    if name == "smollm2":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def goldens(directory: Path) -> dict[str, list]:
    """For each model: [text, ids with special tokens, text decoded from them with special tokens shown]."""
    result: dict[str, list] = {}
    for name in GGUF_FILES:
        tokenizer = reference(directory, name)
        rows = [(text, tokenizer.encode(text)) for text in TEXTS]
        result[name] = [[text, ids, tokenizer.decode(ids)] for text, ids in rows]
    return result


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    text = json.dumps(goldens(Path(sys.argv[1])), separators=(",", ":"))
    GOLDENS.write_text(text + "\n")


if __name__ == "__main__":
    main()
