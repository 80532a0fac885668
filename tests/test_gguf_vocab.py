"""Vocabularies inside GGUF files, real and made here: ids of transformers, SentencePiece and llama.cpp."""

import random
from pathlib import Path

import pytest
from trained_tokenizers import GOLDENS, TEXTS, byte_level_as_gguf, script, spm_as_gguf

from tpjax.errors import CheckpointError
from tpjax.text import gguf_vocab
from tpjax.text.loading import tokenizer_from_gguf

# ---------------------------------------------------------------------- real GGUF files


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_gguf_ids_and_text_equal_the_goldens(name, request):
    tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    for text, ids, decoded in GOLDENS[name]:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == decoded, text


@pytest.mark.parametrize("name", ["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_gguf_ids_equal_transformers_on_mixed_texts(name, request):
    pytest.importorskip("transformers", reason="pip install -e '.[parity]'")
    path = request.getfixturevalue(f"{name}_gguf")
    tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    reference = script("make_tokenizer_goldens").reference(path.parent, name)
    draw = random.Random(0)
    parts = [part for text in TEXTS for part in text.split(" ")] + [" ", "  ", " " * 20]
    for _ in range(300):
        text = "".join(draw.choices(parts, k=draw.randint(1, 8)))
        if " " * 32 in text:
            continue  # there transformers' merges and SentencePiece's longest match part ways
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text), text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True), text


def test_smollm2_facts(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.pad_id) == (49152, 1, 2)
    assert tokenizer.eos_ids == {0, 2}  # <|endoftext|> is known by its text
    assert len(tokenizer.special_ids) == 17
    assert tokenizer.encode("Hello") == [19556]  # add_bos_token is false
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_gemma3_facts(gemma3_tokenizer):
    tokenizer = gemma3_tokenizer
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.unk_id, tokenizer.pad_id) == (262144, 2, 3, 0)
    assert tokenizer.eos_ids == {1, 106}  # <end_of_turn>, but not 212: `</s>` is an HTML tag here
    assert tokenizer.chat_template is None
    # Runs of spaces, newlines and tabs are user-defined tokens; 33 spaces are the longest run and one more.
    assert tokenizer.encode("a\n\n\t\t  b", add_special_tokens=False) == [236746, 108, 255969, 138, 236763]
    assert tokenizer.encode(" " * 33 + "b", add_special_tokens=False)[0] == 168 - 1
    assert tokenizer.decode(tokenizer.encode("  two")) == "  two"


def test_gemma3_round_trips(gemma3_tokenizer):
    tokenizer = gemma3_tokenizer
    for text in TEXTS:
        if not any(special in text for special in ("<start_of_turn>", "<end_of_turn", "<eos>")):
            assert tokenizer.decode(tokenizer.encode(text)) == text


# ---------------------------------------------------------------------- GGUF, made here


def test_gguf_of_a_sentencepiece_model_gives_its_ids(sentencepiece_dir, spm):
    tokenizer = tokenizer_from_gguf(spm_as_gguf(sentencepiece_dir))
    assert (tokenizer.bos_id, tokenizer.unk_id, tokenizer.eos_ids) == (1, 0, {2})
    assert tokenizer.special_ids == spm.special_ids
    for text in TEXTS:
        if "<s>" not in text and "</s>" not in text:
            assert tokenizer.encode(text) == spm.encode(text), text


def test_gguf_space_prefix_follows_llama_cpp(sentencepiece_dir):
    metadata = spm_as_gguf(sentencepiece_dir)
    prefixed = tokenizer_from_gguf(metadata)
    bare = tokenizer_from_gguf({**metadata, "tokenizer.ggml.add_space_prefix": False})
    everywhere = prefixed.encode("a</s>b")
    assert b"".join(map(prefixed.token_bytes, everywhere)) == b"<s> a</s> b"
    assert b"".join(map(bare.token_bytes, bare.encode("a</s>b"))) == b"<s>a</s>b"
    no_bos = tokenizer_from_gguf({**metadata, "tokenizer.ggml.add_bos_token": False})
    assert no_bos.encode("a") == prefixed.encode("a")[1:]


def test_gguf_byte_level_equals_its_tokenizer_json(byte_level_dir, byte_level):
    tokenizer = tokenizer_from_gguf(byte_level_as_gguf(byte_level_dir))
    for text in [*TEXTS, "<think>a<|eos|> b"]:
        assert tokenizer.encode(text) == byte_level.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == byte_level.decode(byte_level.encode(text))
    # <|im_end|> ends a turn whatever the file says; it and EOS are special, <think> is not.
    assert {tokenizer.token_bytes(i) for i in tokenizer.eos_ids} == {b"<|eos|>", b"<|im_end|>"}
    assert len(tokenizer.special_ids) == 4


def test_gguf_end_of_generation(byte_level_dir):
    metadata = byte_level_as_gguf(byte_level_dir)
    tokens = metadata["tokenizer.ggml.tokens"]
    size = len(tokens)

    def ends(*texts: str, **ids) -> set[bytes]:
        more = {
            "tokenizer.ggml.tokens": tokens + list(texts),
            "tokenizer.ggml.token_type": metadata["tokenizer.ggml.token_type"] + [3] * len(texts),
        }
        tokenizer = tokenizer_from_gguf(metadata | more | {f"tokenizer.ggml.{k}": v for k, v in ids.items()})
        return {tokenizer.token_bytes(i) for i in tokenizer.eos_ids} - {b"<|eos|>", b"<|im_end|>"}

    assert ends("<|eot_id|>", "<end_of_turn>", "</s>", "<|file_sep|>") == {b"<|eot_id|>", b"<end_of_turn>"}
    assert ends("<stop>", "<call>", eot_token_id=size, eom_token_id=size + 1) == {b"<stop>", b"<call>"}
    assert ends("<|end|>") == {b"<|end|>"}
    assert ends("<|end|>", "<|return|>", "<|call|>") == {b"<|return|>", b"<|call|>"}  # gpt-oss


# Worked out by hand; whole vocabularies of these kinds were checked against the reference ids that llama.cpp
# keeps in models/ggml-vocab-*.gguf.out.
PRE_TOKENIZED = "It's  ABCdef 12345,\n\n x=1"
PIECES = {
    "gpt-2": ["It", "'s", " ", " ABCdef", " 12345", ",", "\n\n", " x", "=", "1"],
    "smollm": ["It", "'s", " ", " ABCdef", " ", *"12345", ",", "\n\n", " x", "=", "1"],
    "llama-bpe": ["It", "'s", " ", " ABCdef", " ", "123", "45", ",\n\n", " x", "=", "1"],
    "qwen2": ["It", "'s", " ", " ABCdef", " ", *"12345", ",\n\n", " x", "=", "1"],
    "tekken": ["It", "'s", " ", " ABCdef", " ", *"12345", ",\n\n", " x", "=", "1"],
    "gpt-4o": ["It's", " ", " ABCdef", " ", "123", "45", ",\n\n", " x", "=", "1"],
    "deepseek-coder": ["It", "'", "s", " ", " ABCdef", " ", *"12345", ",", "\n", "\n", " x", "=", "1"],
    "deepseek-v3": ["It", "'s", " ", " ABCdef", " ", "123", "45", ",\n\n", " x", "=", "1"],
    "falcon": ["It", "'", "s", " ", " ABCdef", " ", "123", "45", ",", "\n\n", " x", "=", "1"],
}


@pytest.mark.parametrize("name", PIECES)
def test_pre_tokenizers_cut_where_llama_cpp_does(name, byte_level_dir):
    assert _cut(name, PRE_TOKENIZED, byte_level_dir) == PIECES[name]


@pytest.mark.parametrize("name", sorted(gguf_vocab.PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_all_text(name, byte_level_dir):
    import unicodedata

    text = "".join(TEXTS)
    kept = unicodedata.normalize("NFC", text) if gguf_vocab.PRE_TOKENIZERS[name].nfc else text
    assert "".join(_cut(name, text, byte_level_dir)) == kept


def _cut(name: str, text: str, directory: Path) -> list[str]:
    metadata = byte_level_as_gguf(directory, **{"tokenizer.ggml.pre": name})
    library = gguf_vocab.byte_level_bpe(gguf_vocab.read_vocab(metadata))
    normal = library.normalizer.normalize_str(text) if library.normalizer else text
    pieces = library.pre_tokenizer.pre_tokenize_str(normal)
    return [normal[start:end] for _, (start, end) in pieces]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": None}, r"tokenizer\.ggml\.model is missing"),
        ({"tokenizer.ggml.model": "bert"}, r"'bert' is not supported \(supported: gpt2, llama\)"),
        ({"tokenizer.ggml.pre": "martian"}, r"'martian' is not supported \(supported: .*qwen2"),
        ({"tokenizer.ggml.tokens": []}, "non-empty list of strings"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "2 entries, but only 1"),
        ({"tokenizer.ggml.tokens": "abc"}, "must be list, got str"),
        ({"tokenizer.ggml.token_type": [1, 1]}, r"token_type has 2 entries, tokenizer\.ggml\.tokens has 405"),
        ({"tokenizer.ggml.merges": None}, "merges is missing"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab' is not a pair of tokens"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "merges: .*zz"),
        ({"tokenizer.ggml.merges": [3]}, "merges"),
        ({"tokenizer.ggml.eos_token_id": 405}, "eos_token_id=405 lies outside the vocabulary of 405 tokens"),
        ({"tokenizer.ggml.bos_token_id": "x"}, "bos_token_id must be int, got str"),
    ],
)
def test_broken_gguf_metadata_is_named(byte_level_dir, change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        tokenizer_from_gguf(byte_level_as_gguf(byte_level_dir) | change)
    assert "\n" not in str(caught.value)


def test_gguf_padding_id_past_the_vocabulary_is_ignored(byte_level_dir):
    assert tokenizer_from_gguf(byte_level_as_gguf(byte_level_dir, **{"tokenizer.ggml.padding_token_id": 999}))


def test_broken_sentencepiece_gguf_is_named(sentencepiece_dir):
    metadata = spm_as_gguf(sentencepiece_dir)
    with pytest.raises(CheckpointError, match="scores is missing"):
        tokenizer_from_gguf({**metadata, "tokenizer.ggml.scores": None})
    for score in (1e300, float("inf"), float("nan")):
        scores = [*metadata["tokenizer.ggml.scores"][:-1], score]
        with pytest.raises(CheckpointError, match=r"scores has .*, which is no float32"):
            tokenizer_from_gguf({**metadata, "tokenizer.ggml.scores": scores})
    bytes_gone = [
        f"<0y{i}>" if kind == 6 else text
        for i, (text, kind) in enumerate(
            zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
        )
    ]
    with pytest.raises(CheckpointError, match="not a usable SentencePiece model"):
        tokenizer_from_gguf({**metadata, "tokenizer.ggml.tokens": bytes_gone})
