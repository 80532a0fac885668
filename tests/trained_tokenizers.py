"""Small tokenizers trained here, as directories and as metadata of GGUF files; the texts to try them on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
GOLDENS = json.loads((ROOT / "tests" / "goldens" / "tokenizers.json").read_text())


def script(name: str) -> ModuleType:
    """A module of scripts/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TEXTS: list[str] = script("make_tokenizer_goldens").TEXTS
CORPUS = [text for text in TEXTS if "<" not in text and "\x00" not in text] * 3
# For SentencePiece: what is not ASCII or Chinese here has to fall back to bytes.
NARROW_CORPUS = [text for text in CORPUS if text.isascii()] + [
    "the quick brown fox jumps over the lazy dog while the other animals are watching it from the hill",
    "tokens that begin with a space are words, and those that do not are parts of words or marks",
    "你好。世界。",
]
CHATML = (
    "{% for m in messages %}\n    {{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}\n{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_json(directory: Path, **config: Any) -> Path:
    """A byte-level BPE of 400 tokens whose post-processor adds BOS."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    specials = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    library.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    library.add_tokens([AddedToken("<think>", normalized=False)])
    library.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", library.token_to_id("<|bos|>"))]
    )
    library.enable_truncation(4)  # left over from training; must not truncate prompts
    library.save(str(directory / "tokenizer.json"))
    # No class to guess at: transformers then uses the file as it is.
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>"}
    tokenizer_config |= {"eos_token": {"__type": "AddedToken", "content": "<|eos|>"}, "chat_template": CHATML}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | config))
    return directory


def sentencepiece_model(directory: Path, **options: Any) -> Path:
    """A Llama-like SentencePiece BPE: byte fallback, no normalisation, leading space."""
    import sentencepiece

    options = {"model_type": "bpe", "vocab_size": 400, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(NARROW_CORPUS),
        model_prefix=str(directory / "tokenizer"),
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        minloglevel=3,
        **options,
    )
    (directory / "tokenizer.vocab").unlink()
    return directory


def spm_as_gguf(directory: Path) -> dict[str, Any]:
    """The same SentencePiece model as a GGUF file would hold it."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    ids = range(sp.get_piece_size())
    kind = {i: 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in ids}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": list(kind.values()),
        "tokenizer.ggml.bos_token_id": sp.bos_id(),
        "tokenizer.ggml.eos_token_id": sp.eos_id(),
        "tokenizer.ggml.unknown_token_id": sp.unk_id(),
    }


def byte_level_as_gguf(directory: Path, **extra: Any) -> dict[str, Any]:
    """The same byte-level BPE as a GGUF file would hold it."""
    from tokenizers import Tokenizer as Library

    library = Library.from_file(str(directory / "tokenizer.json"))
    added = library.get_added_tokens_decoder()
    size = library.get_vocab_size()
    merges = json.loads(library.to_str())["model"]["merges"]
    kinds = {i: 3 if token.special else 4 for i, token in added.items()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [library.id_to_token(i) for i in range(size)],
        "tokenizer.ggml.token_type": [kinds.get(i, 1) for i in range(size)],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": library.token_to_id("<|bos|>"),
        "tokenizer.ggml.eos_token_id": library.token_to_id("<|eos|>"),
        "tokenizer.ggml.add_bos_token": True,
        **extra,
    }
