import importlib.util
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpjax.errors import CheckpointError, RequestError
from tpjax.text import gguf_vocab
from tpjax.text.chat_template import ChatTemplates
from tpjax.text.detokenizer import IncrementalDetokenizer
from tpjax.text.loading import load_tokenizer, tokenizer_from_gguf
from tpjax.text.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
GOLDENS = json.loads((ROOT / "tests" / "goldens" / "tokenizers.json").read_text())


def _script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TEXTS: list[str] = _script("make_tokenizer_goldens").TEXTS


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf) -> Tokenizer:
    return load_tokenizer(smollm2_gguf)


@pytest.fixture(scope="session")
def gemma3(gemma3_gguf) -> Tokenizer:
    return load_tokenizer(gemma3_gguf)


# ---------------------------------------------------------------------- small tokenizers, trained here

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


def _byte_level_json(directory: Path, **config) -> Path:
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


def _sentencepiece_model(directory: Path, **options) -> Path:
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


@pytest.fixture(scope="session")
def byte_level_dir(tmp_path_factory) -> Path:
    return _byte_level_json(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def sentencepiece_dir(tmp_path_factory) -> Path:
    return _sentencepiece_model(tmp_path_factory.mktemp("spm"))


@pytest.fixture(scope="session")
def byte_level(byte_level_dir) -> Tokenizer:
    return load_tokenizer(byte_level_dir)


@pytest.fixture(scope="session")
def spm(sentencepiece_dir) -> Tokenizer:
    return load_tokenizer(sentencepiece_dir)


def _spm_as_gguf(directory: Path) -> dict:
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


def _byte_level_as_gguf(directory: Path, **extra) -> dict:
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


# ---------------------------------------------------------------------- real GGUF files


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_gguf_ids_and_text_equal_the_goldens(name, request):
    tokenizer = request.getfixturevalue(name)
    for text, ids, decoded in GOLDENS[name]:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == decoded, text


@pytest.mark.parametrize("name", ["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_gguf_ids_equal_transformers_on_mixed_texts(name, request):
    pytest.importorskip("transformers", reason="pip install -e '.[parity]'")
    path = request.getfixturevalue(f"{name}_gguf")
    tokenizer = request.getfixturevalue(name)
    reference = _script("make_tokenizer_goldens").reference(path.parent, name)
    draw = random.Random(0)
    parts = [part for text in TEXTS for part in text.split(" ")] + [" ", "  ", " " * 20]
    for _ in range(300):
        text = "".join(draw.choices(parts, k=draw.randint(1, 8)))
        if " " * 32 in text:
            continue  # there transformers' merges and SentencePiece's longest match part ways
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text), text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True), text


def test_smollm2_facts(smollm2):
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.pad_id) == (49152, 1, 2)
    assert smollm2.eos_ids == {0, 2}  # <|endoftext|> is known by its text
    assert len(smollm2.special_ids) == 17
    assert smollm2.encode("Hello") == [19556]  # add_bos_token is false
    prompt = smollm2.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_gemma3_facts(gemma3):
    assert (gemma3.vocab_size, gemma3.bos_id, gemma3.unk_id, gemma3.pad_id) == (262144, 2, 3, 0)
    assert gemma3.eos_ids == {1, 106}  # <end_of_turn>, but not 212: `</s>` is an HTML tag here
    assert gemma3.chat_template is None
    # Runs of spaces, newlines and tabs are user-defined tokens; 33 spaces are the longest run and one more.
    assert gemma3.encode("a\n\n\t\t  b", add_special_tokens=False) == [236746, 108, 255969, 138, 236763]
    assert gemma3.encode(" " * 33 + "b", add_special_tokens=False)[0] == 168 - 1
    assert gemma3.decode(gemma3.encode("  two")) == "  two"


def test_gemma3_round_trips(gemma3):
    for text in TEXTS:
        if not any(special in text for special in ("<start_of_turn>", "<end_of_turn", "<eos>")):
            assert gemma3.decode(gemma3.encode(text)) == text


# ---------------------------------------------------------------------- tokenizer.json


def test_tokenizer_json_equals_transformers(byte_level_dir, byte_level):
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[parity]'")
    reference = transformers.AutoTokenizer.from_pretrained(byte_level_dir)
    for text in [*TEXTS, "<think>a</think><|eos|> b <|im_end|>"]:
        ids = byte_level.encode(text)
        assert ids == reference.encode(text), text
        assert byte_level.encode(text, add_special_tokens=False) == reference.encode(
            text, add_special_tokens=False
        )
        for skip in (True, False):
            assert byte_level.decode(ids, skip_special_tokens=skip) == reference.decode(
                ids, skip_special_tokens=skip
            )
    draw = random.Random(1)
    for _ in range(200):  # random bytes, mostly invalid UTF-8
        ids = [draw.randrange(byte_level.vocab_size + 3) for _ in range(12)]
        assert byte_level.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_tokenizer_json_facts(byte_level):
    bos = byte_level.bos_id
    assert byte_level.vocab_size == 405
    assert byte_level.encode("") == [bos]
    assert byte_level.encode("a <|eos|>")[0] == bos
    assert byte_level.encode("a <|eos|>")[-1] in byte_level.eos_ids
    assert len(byte_level.encode("no truncation here, please")) > 4
    think = byte_level.encode("<think>", add_special_tokens=False)
    assert len(think) == 1 and think[0] not in byte_level.special_ids
    assert byte_level.decode(byte_level.encode("<|im_start|>x<think>")) == "x<think>"


def test_the_post_processor_overrules_add_bos_and_eos(tmp_path):
    _byte_level_json(tmp_path, add_bos_token=False, add_eos_token=True)
    ids = load_tokenizer(tmp_path).encode("x")
    assert len(ids) == 2  # BOS from the post-processor and "x"; transformers 5 drops both flags
    if importlib.util.find_spec("transformers"):
        from transformers import AutoTokenizer

        assert ids == AutoTokenizer.from_pretrained(tmp_path).encode("x")


@pytest.mark.parametrize(
    ("tokenizer_class", "flags", "shown"),
    [
        ("LlamaTokenizerFast", {"add_bos_token": True, "add_eos_token": False}, "<|bos|>x"),
        ("LlamaTokenizer", {"add_bos_token": True, "add_eos_token": True}, "<|bos|>x<|eos|>"),
        ("LlamaTokenizerFast", {}, "x"),
        ("PreTrainedTokenizerFast", {"add_bos_token": True}, "x"),
    ],
)
def test_llama_flags_count_without_a_post_processor(tmp_path, tokenizer_class, flags, shown):
    _byte_level_json(tmp_path, tokenizer_class=tokenizer_class, **flags)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("x"), skip_special_tokens=False) == shown


@pytest.mark.parametrize(
    ("generation", "config", "named"),
    (
        ({}, {}, set()),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, {7, 8}),
        ({"eos_token_id": 7}, {"eos_token_id": [9, 10]}, {7}),
        ({"temperature": 1.0}, {"eos_token_id": [9, 10]}, {9, 10}),
        ({"eos_token_id": None}, {"eos_token_id": 9, "text_config": {"eos_token_id": [10]}}, {9}),
        ({"eos_token_id": []}, {"text_config": {"eos_token_id": [10]}}, {10}),
        (None, {"eos_token_id": 0}, {0}),
        ({"eos_token_id": 0}, None, {0}),
    ),
)
def test_which_eos_counts(tmp_path, generation, config, named):
    """generation_config.json's where it names one, else config.json's; always the tokenizer's own."""
    _byte_level_json(tmp_path, chat_template=None)
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    (own,) = tokenizer.encode("<|eos|>", add_special_tokens=False)
    assert tokenizer.eos_ids == {own} | named


TURNS = {
    "chatml": (CHATML, "<|im_end|>"),
    "on its own line": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n<|im_end|>\n' }}{% endfor %}",
        "<|im_end|>",
    ),
    "the EOS": ("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}", "<|eos|>"),
    "not special": ("{% for m in messages %}{{ m['content'] + '<think>' }}{% endfor %}", "<think>"),
    "no token": ("{% for m in messages %}{{ m['content'] + '[end]' }}{% endfor %}", None),
    "nothing after": ("{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}", None),
    "users only": (
        "{% if messages[1]['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}",
        None,
    ),
    "broken": ("{% for m in %}", None),
    "list contents": ("{{ messages[1]['content'][0]['text'] + '<|im_end|>' }}", None),
    "for ever": ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", None),
    "parts": (
        "{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if m.role == 'assistant' }}{% endfor %}",
        "<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", TURNS)
def test_the_end_of_a_turn_ends_the_text(tmp_path, name):
    """A fine-tuned model says what its template taught it, whatever the settings name."""
    template, end = TURNS[name]
    _byte_level_json(tmp_path, chat_template=template)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    tokenizer = load_tokenizer(tmp_path)
    named = {tokenizer.token_bytes(i) for i in tokenizer.eos_ids - {9}}
    assert named == {b"<|eos|>", *([end.encode()] if end else [])}
    assert tokenizer.eos_ids <= tokenizer.special_ids


def test_special_tokens_by_their_text(smollm2):
    assert smollm2.special_id("<|im_end|>") == 2
    for text in ("<|im_end", "<|im_end|>\n", "the", "", "\udce9"):
        assert smollm2.special_id(text) is None


def test_special_tokens_map_fills_in(tmp_path):
    _byte_level_json(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(
        '{"eos_token": {"content": "<|im_end|>", "lstrip": false}}'
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None
    assert tokenizer.decode(tokenizer.eos_ids, skip_special_tokens=False) == "<|im_end|>"


def _library_with_decoder(directory: Path, decoder) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers

    vocab = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}, "▁a": 257, "a": 258, "▁": 259}
    library = Library(models.BPE(vocab, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoder
    library.save(str(directory / "tokenizer.json"))


def test_llama_style_json_decodes_as_the_library_does(tmp_path):
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders

    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    _library_with_decoder(tmp_path, decoders.Sequence(steps))
    library, tokenizer = Library.from_file(str(tmp_path / "tokenizer.json")), load_tokenizer(tmp_path)
    for text in ["a", " a", "a  a", "你a 👍🏽", ""]:
        ids = tokenizer.encode(text)
        assert ids == library.encode(text).ids
        assert tokenizer.decode(ids) == library.decode(ids) == text


def test_invalid_bytes_keep_the_valid_characters_beside_them(tmp_path):
    from tokenizers import decoders

    _library_with_decoder(tmp_path, decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]))
    ids = [byte + 1 for byte in "é".encode() + b"\xff" + "é".encode()]
    assert load_tokenizer(tmp_path).decode(ids) == "é\ufffdé"  # the library: five U+FFFD


def test_unsupported_decoder_is_named(tmp_path):
    from tokenizers import decoders

    _library_with_decoder(tmp_path, decoders.WordPiece())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: decoder .*WordPiece.* is not supported"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------------- tokenizer.model


def test_tokenizer_model_equals_sentencepiece(sentencepiece_dir, spm):
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_dir / "tokenizer.model"))
    for text in TEXTS:
        if "<s>" in text or "</s>" in text:
            continue  # SentencePiece alone does not parse special tokens
        ids = spm.encode(text)
        assert ids == [reference.bos_id(), *reference.encode(text)], text
        assert spm.decode(ids) == reference.decode(ids) == text


@pytest.mark.parametrize("legacy", [True, False])
def test_tokenizer_model_equals_transformers(tmp_path, legacy):
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[parity]'")
    _sentencepiece_model(tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config["added_tokens_decoder"] = {
        str(i): {"content": text, "special": i != 401, "lstrip": False, "rstrip": False, "normalized": False}
        for i, text in [(0, "<unk>"), (1, "<s>"), (2, "</s>"), (400, "<|im_end|>"), (401, "<think>")]
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    reference = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == len(reference) == 402
    for text in [*TEXTS, "a</s>b <|im_end|>c<think>d", "<s>x"]:
        # Text with a space first (also after a special token) keeps it in SentencePiece and in ours;
        # transformers 5 takes it for the leading space itself.
        if text.startswith(" ") or "> " in text or "<\x00" in text:
            continue
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text), text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(("legacy", "after_special"), [(True, "▁b"), (False, "b")])
def test_leading_space_after_a_special_token(tmp_path, legacy, after_special):
    _sentencepiece_model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("a</s>b")
    after = ids[ids.index(2) + 1 :]
    assert b"".join(map(tokenizer.token_bytes, after)).decode() == after_special.replace("▁", " ")
    assert tokenizer.decode(ids[1:3], skip_special_tokens=False).startswith("a")  # the first space is dropped


def test_tokenizer_model_without_leading_space(tmp_path):
    _sentencepiece_model(tmp_path, add_dummy_prefix=False)
    tokenizer = load_tokenizer(tmp_path)
    for text in ("a", " a", "  a b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unigram_model_and_native_user_defined_symbols(tmp_path):
    import sentencepiece

    symbols = ["\u2581\u2581", "<tool>"]
    _sentencepiece_model(tmp_path, model_type="unigram", vocab_size=340, user_defined_symbols=symbols)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    for text in ["a  b<tool>c", *TEXTS[:12]]:
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_added_token_strips_white_space(tmp_path):
    _sentencepiece_model(tmp_path)
    token = {"content": "<|end|>", "lstrip": True, "rstrip": True, "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"400": token}}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a  <|end|> \n b") == tokenizer.encode("a<|end|>b")
    assert tokenizer.vocab_size == 401 and 400 in tokenizer.special_ids


# ---------------------------------------------------------------------- GGUF, made here


def test_gguf_of_a_sentencepiece_model_gives_its_ids(sentencepiece_dir, spm):
    tokenizer = tokenizer_from_gguf(_spm_as_gguf(sentencepiece_dir))
    assert (tokenizer.bos_id, tokenizer.unk_id, tokenizer.eos_ids) == (1, 0, {2})
    assert tokenizer.special_ids == spm.special_ids
    for text in TEXTS:
        if "<s>" not in text and "</s>" not in text:
            assert tokenizer.encode(text) == spm.encode(text), text


def test_gguf_space_prefix_follows_llama_cpp(sentencepiece_dir):
    metadata = _spm_as_gguf(sentencepiece_dir)
    prefixed = tokenizer_from_gguf(metadata)
    bare = tokenizer_from_gguf({**metadata, "tokenizer.ggml.add_space_prefix": False})
    everywhere = prefixed.encode("a</s>b")
    assert b"".join(map(prefixed.token_bytes, everywhere)) == b"<s> a</s> b"
    assert b"".join(map(bare.token_bytes, bare.encode("a</s>b"))) == b"<s>a</s>b"
    no_bos = tokenizer_from_gguf({**metadata, "tokenizer.ggml.add_bos_token": False})
    assert no_bos.encode("a") == prefixed.encode("a")[1:]


def test_gguf_byte_level_equals_its_tokenizer_json(byte_level_dir, byte_level):
    tokenizer = tokenizer_from_gguf(_byte_level_as_gguf(byte_level_dir))
    for text in [*TEXTS, "<think>a<|eos|> b"]:
        assert tokenizer.encode(text) == byte_level.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == byte_level.decode(byte_level.encode(text))
    # <|im_end|> ends a turn whatever the file says; it and EOS are special, <think> is not.
    assert {tokenizer.token_bytes(i) for i in tokenizer.eos_ids} == {b"<|eos|>", b"<|im_end|>"}
    assert len(tokenizer.special_ids) == 4


def test_gguf_end_of_generation(byte_level_dir):
    metadata = _byte_level_as_gguf(byte_level_dir)
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
    metadata = _byte_level_as_gguf(directory, **{"tokenizer.ggml.pre": name})
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
        tokenizer_from_gguf(_byte_level_as_gguf(byte_level_dir) | change)
    assert "\n" not in str(caught.value)


def test_gguf_padding_id_past_the_vocabulary_is_ignored(byte_level_dir):
    assert tokenizer_from_gguf(
        _byte_level_as_gguf(byte_level_dir, **{"tokenizer.ggml.padding_token_id": 999})
    )


def test_broken_sentencepiece_gguf_is_named(sentencepiece_dir):
    metadata = _spm_as_gguf(sentencepiece_dir)
    with pytest.raises(CheckpointError, match="scores is missing"):
        tokenizer_from_gguf({**metadata, "tokenizer.ggml.scores": None})
    bytes_gone = [
        f"<0y{i}>" if kind == 6 else text
        for i, (text, kind) in enumerate(
            zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
        )
    ]
    with pytest.raises(CheckpointError, match="not a usable SentencePiece model"):
        tokenizer_from_gguf({**metadata, "tokenizer.ggml.tokens": bytes_gone})


# ---------------------------------------------------------------------- broken files


def test_directory_without_tokenizer_is_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: "),
        ("tokenizer.json", '{"model": {}}', r"tokenizer\.json: "),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected a JSON object, got list"),
        ("tokenizer_config.json", "{,}", r"tokenizer_config\.json: not valid JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}', "malformed added_tokens_decoder"),
        (
            "generation_config.json",
            '{"eos_token_id": "</s>"}',
            r"generation_config\.json: eos_token_id='</s>'",
        ),
        ("chat_template.jinja", b"\xff\xfe", r"chat_template\.jinja: not UTF-8"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    _byte_level_json(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_broken_tokenizer_model_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # a tiktoken file goes by this name too
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a usable SentencePiece model"):
        load_tokenizer(tmp_path)


def test_missing_path_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such file"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "model.bin").touch()
    with pytest.raises(CheckpointError, match=r"model\.bin: a tokenizer is read from"):
        load_tokenizer(tmp_path / "model.bin")


def test_lone_surrogate_is_a_request_error(byte_level):
    with pytest.raises(RequestError, match="position 1"):
        byte_level.encode("a\ud800")


def test_other_threads_run_while_a_long_text_is_encoded(byte_level):
    """Else one client's text would stop every stream of a server."""
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.002):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    assert len(byte_level.encode("ab cd, " * 200_000)) > 200_000
    took = time.perf_counter() - start
    done.set()
    thread.join()
    assert took > 0.1  # long enough to tell
    assert sum(start + 0.1 * took < at < start + 0.5 * took for at in ticks) > 1  # none while it is held


def test_ids_beyond_the_vocabulary_show_nothing(byte_level, spm):
    for tokenizer in (byte_level, spm):
        assert tokenizer.decode([tokenizer.vocab_size, 1 << 40, -1]) == ""


# ---------------------------------------------------------------------- detokenizer


def _stream(tokenizer: Tokenizer, ids, **options) -> str:
    stream = IncrementalDetokenizer(tokenizer, **options)
    parts = [stream.push(i) for i in ids]
    return "".join(parts) + stream.flush()


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(-1, 410), max_size=40), skip=st.booleans())
@pytest.mark.parametrize("kind", ["byte_level", "spm"])
def test_stream_equals_decode_for_random_ids(kind, ids, skip, byte_level, spm):
    tokenizer = {"byte_level": byte_level, "spm": spm}[kind]
    assert _stream(tokenizer, ids, skip_special_tokens=skip) == tokenizer.decode(
        ids, skip_special_tokens=skip
    )


@settings(max_examples=300, deadline=None)
@given(prompt=st.text(max_size=12), ids=st.lists(st.integers(0, 410), max_size=20))
@pytest.mark.parametrize("kind", ["byte_level", "spm"])
def test_stream_after_a_prompt_is_what_decode_adds(kind, prompt, ids, byte_level, spm):
    tokenizer = {"byte_level": byte_level, "spm": spm}[kind]
    prompt_token_ids = tokenizer.encode(prompt)
    whole, before = tokenizer.decode([*prompt_token_ids, *ids]), tokenizer.decode(prompt_token_ids)
    assert before + _stream(tokenizer, ids, prompt_token_ids=prompt_token_ids) == whole


@pytest.mark.parametrize("name", ["byte_level", "spm", "smollm2", "gemma3"])
def test_stream_never_shows_half_a_character(name, request):
    tokenizer = request.getfixturevalue(name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        stream = IncrementalDetokenizer(tokenizer)
        parts = [stream.push(i) for i in ids]
        assert not any("\ufffd" in part for part in parts)
        assert stream.flush() == ""
        assert "".join(parts) == tokenizer.decode(ids)


def test_leading_space_is_kept_after_a_prompt_and_dropped_without(spm):
    ids = spm.encode("a b", add_special_tokens=False)
    assert _stream(spm, ids) == "a b"
    assert _stream(spm, ids, prompt_token_ids=spm.encode("x")) == " a b"
    assert _stream(spm, ids, prompt_token_ids=[spm.bos_id]) == "a b"  # BOS shows nothing: this is the start


def test_character_begun_in_the_prompt_is_completed(byte_level):
    ids = byte_level.encode("🫠", add_special_tokens=False)
    assert len(ids) > 1
    assert _stream(byte_level, ids[-1:], prompt_token_ids=ids[:-1]) == "🫠"
    assert _stream(byte_level, ids[:-1]) == "\ufffd"


# ---------------------------------------------------------------------- chat templates

MESSAGES = [{"role": "system", "content": "Be <brief> & kind."}, {"role": "user", "content": "Hi 你好"}]


def _with_template(byte_level_dir: Path, template: str, **more: str) -> Tokenizer:
    named = {f"tokenizer.chat_template.{name}": source for name, source in more.items()}
    return tokenizer_from_gguf(
        _byte_level_as_gguf(byte_level_dir, **{"tokenizer.chat_template": template}, **named)
    )


def test_chat_template_renders(byte_level):
    system = "<|im_start|>system\nBe <brief> & kind.<|im_end|>\n"
    user = "<|im_start|>user\nHi 你好<|im_end|>\n"
    bare = byte_level.apply_chat_template(MESSAGES, add_generation_prompt=False)
    assert bare.replace("    ", "") == system + user
    assert byte_level.apply_chat_template(MESSAGES) == bare + "<|im_start|>assistant\n"


TOOLS = [{"type": "function", "function": {"name": "f<>", "parameters": {}}}]
# Template -> what transformers 5.23 renders from MESSAGES, TOOLS, extra="!" and no generation prompt.
TEMPLATES = {
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}\n"
    "  {%- if loop.first %}{{ raise_exception('no system') }}{% endif %}\n{{ m | tojson }}\n{% endfor %}": (
        '<|bos|>{"role": "user", "content": "Hi 你好"}\n'
    ),
    "{{ messages[:1] | tojson(indent=1) }}{{ tools | tojson }}{{ undefined_name }}{{ eos_token }}": (
        '[\n {\n  "role": "system",\n  "content": "Be <brief> & kind."\n }\n]'
        '[{"type": "function", "function": {"name": "f<>", "parameters": {}}}]<|eos|>'
    ),
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% generation %}\n"
    "{{ m.content | trim }}{% endgeneration %}{% if ns.n == 1 %}{% break %}{% endif %}{% endfor %}"
    "{{ extra }}": "Be <brief> & kind.!",
    "  {% if not add_generation_prompt %}\nyear {{ strftime_now('%Y') | length }}\n  {% endif %}\nend": (
        "year 4\nend"
    ),
}


@pytest.mark.parametrize(("template", "expected"), TEMPLATES.items())
def test_chat_templates_run_as_in_transformers(byte_level_dir, template, expected):
    options = {"tools": TOOLS, "add_generation_prompt": False, "extra": "!"}
    tokenizer = _with_template(byte_level_dir, template)
    assert tokenizer.apply_chat_template(MESSAGES, **options) == expected
    if importlib.util.find_spec("transformers"):
        from transformers import AutoTokenizer

        reference = AutoTokenizer.from_pretrained(byte_level_dir)
        options["chat_template"] = template
        assert reference.apply_chat_template(MESSAGES, tokenize=False, **options) == expected


@pytest.mark.parametrize("content", ("so, the", "so, the  ", "\n so", "a{{ b }}"))
@pytest.mark.parametrize(
    "template",
    (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}",
        "{% for m in messages %}{{ '[' + m['content'] + ']' }}{% endfor %}{{ '|' + messages[0].content }}",
        "{% for m in messages %}{{ m.content.split('x')[0] }}{% endfor %}",
    ),
)
def test_a_final_message_is_continued_as_in_transformers(template, content):
    utilities = pytest.importorskip(
        "transformers.utils.chat_template_utils", reason="pip install -e '.[parity]'"
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]
    (expected,), _ = utilities.render_jinja_template(
        conversations=[messages], chat_template=template, continue_final_message=True
    )
    templates = ChatTemplates({"default": "unused"}, {})
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert templates.render(messages, chat_template=template, **options) == expected


def test_a_final_message_that_cannot_be_continued():
    templates = ChatTemplates({"default": "{{ messages[0].content }}", "empty": "x"}, {})
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(RequestError, match="does not show the final message"):
        templates.render(messages, **options)
    with pytest.raises(RequestError, match="cannot both be true"):
        templates.render(messages, continue_final_message=True)
    with pytest.raises(RequestError, match="needs a final message with text"):
        templates.render([{"role": "assistant", "content": None}], **options)
    with pytest.raises(RequestError, match="chat_template, line 2"):
        templates.render(messages, chat_template="\n{% for %}")


def test_template_file_wins_and_named_templates_are_chosen(tmp_path, byte_level_dir):
    listed = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    _byte_level_json(tmp_path, chat_template=listed)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == "plain"
    assert tokenizer.apply_chat_template(MESSAGES) == "plain"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{}]) == "with tools"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path).apply_chat_template(MESSAGES) == "from the file"
    named = _with_template(byte_level_dir, "plain", tool_use="with tools")
    assert named.apply_chat_template(MESSAGES, tools=[{}]) == "with tools"


LAYOUTS: dict[str, tuple[object, dict[str, str]]] = {
    "a list": ([{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}], {}),
    "an object": ({"default": "A", "tool_use": "B", "rag": "C"}, {}),
    "one file": ("old", {"chat_template.jinja": "A"}),
    "files": ("old", {"chat_template.jinja": "A", "additional_chat_templates/tool_use.jinja": "B"}),
    "a file beside a list": (
        [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "old"}],
        {"chat_template.jinja": "A"},
    ),
    "files of other names": (
        None,
        {"chat_template.jinja": "A{{ 1 + 1 }}", "additional_chat_templates/my-rag.v2.jinja": "C é"},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_named_templates_are_found_as_transformers_finds_them(tmp_path, layout):
    inside, files = LAYOUTS[layout]
    _byte_level_json(tmp_path, **({} if inside is None else {"chat_template": inside}))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    found = load_tokenizer(tmp_path)
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'tpjax[parity]'")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = reference.chat_template
    assert found.chat_templates.sources == (expected if isinstance(expected, dict) else {"default": expected})
    for tools in (None, [{"type": "function", "function": {"name": "f", "parameters": {}}}]):
        assert found.apply_chat_template(MESSAGES, tools=tools) == reference.apply_chat_template(
            MESSAGES, tools=tools, tokenize=False
        )


def test_a_processors_template_counts_where_there_is_no_other(tmp_path):
    _byte_level_json(tmp_path, chat_template=None)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "of the processor"}))
    assert load_tokenizer(tmp_path).apply_chat_template(MESSAGES) == "of the processor"
    (tmp_path / "chat_template.jinja").write_text("of the tokenizer")
    assert load_tokenizer(tmp_path).apply_chat_template(MESSAGES) == "of the tokenizer"


def test_templates_without_a_default_are_named(tmp_path):
    _byte_level_json(tmp_path, chat_template={"tool_use": "B", "rag": "C"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{}]) == "B"
    with pytest.raises(RequestError, match="no chat template named 'default': it has rag, tool_use"):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize("value", (5, ["A"], [{"name": "default"}], {"default": 5}, [[]], True))
def test_what_is_no_template_is_refused(tmp_path, value):
    _byte_level_json(tmp_path, chat_template=value)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template is not a template"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("messages", [[], "hi", None, [{}], ["hi"], [{"role": 1, "content": "x"}]])
def test_malformed_messages_are_request_errors(byte_level, messages):
    with pytest.raises(RequestError, match="messages"):
        byte_level.apply_chat_template(messages)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ messages[9].content.x }}", "{{ messages + 1 }}"],
)
def test_template_refusal_is_a_request_error(byte_level_dir, template):
    with pytest.raises(RequestError, match="the chat template refused the messages: "):
        _with_template(byte_level_dir, template).apply_chat_template(MESSAGES)


def test_template_cannot_reach_python(byte_level_dir):
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RequestError, match="unsafe"):
        _with_template(byte_level_dir, escape).apply_chat_template(MESSAGES)
    with pytest.raises(RequestError, match="unsafe"):
        _with_template(byte_level_dir, "{{ messages.append(1) }}").apply_chat_template(MESSAGES)


def test_absent_and_broken_templates(byte_level_dir, spm):
    with pytest.raises(RequestError, match="no chat template"):
        spm.apply_chat_template(MESSAGES)
    with pytest.raises(CheckpointError, match="chat template 'default', line 1"):
        _with_template(byte_level_dir, "{% for %}").apply_chat_template(MESSAGES)


# ---------------------------------------------------------------------- imports


def test_import_is_light():
    code = (
        "import sys, tpjax.text.loading; "
        "print([m for m in ('jax', 'transformers', 'torch', 'tokenizers', 'jinja2') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"
