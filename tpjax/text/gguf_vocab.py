"""Converts the vocabulary of a GGUF file to what the tokenizer libraries load.

Two kinds exist in the models we run, told apart by ``tokenizer.ggml.model``:

- ``gpt2``: byte-level BPE. The file holds tokens and merges, but of the pre-tokenizer only a *name*
  (``tokenizer.ggml.pre``); ``PRE_TOKENIZERS`` maps that name to the expressions that split text.
- ``llama``: SentencePiece BPE, tokens with scores. We write them back into a SentencePiece model, so that
  Google's own implementation does the merging.

The metadata keys, their defaults and the meaning of the pre-tokenizer names follow llama.cpp
(``src/llama-vocab.cpp``); the expressions are those of the models' own ``tokenizer.json``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpjax.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

# `tokenizer.ggml.token_type`; the numbers are SentencePiece's own.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Tokens that end a turn whatever the metadata says: chat models often name only one of several as EOS.
# llama.cpp's list is longer by generic spellings such as `</s>` (EOS names them where they matter, and to
# Gemma 3 `</s>` is an HTML tag) and by fill-in-the-middle separators such as `<|file_sep|>` and `<reponame>`
# (they end a file, not a turn).
END_OF_GENERATION = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>"),
        *("<|end_of_text|>", "<end_of_turn>", "<turn|>", "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>"),
        "<\uff5cend▁of▁sentence\uff5c>",
    )
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split before merging: each expression isolates its matches in the parts left by the last.

    Attributes:
        splits: the expressions.
        nfc: compose Unicode first, as the model's tokenizer.json does; GGUF does not record it.
        ignore_merges: a piece that is itself a token is one token.
        add_bos: add BOS if the file does not say.
    """

    splits: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
# A word is upper-case-like letters then lower-case-like ones, or the other way about.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = (
    rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"  # as DeepSeek published it
_FALCON_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    # What llama.cpp does with files older than the `pre` key: right for no model in particular.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "falcon": PreTokenizer((_FALCON_PUNCTUATION, _GPT2, "[0-9][0-9][0-9]")),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "qwen35": PreTokenizer((_QWEN35,), nfc=True),
    **dict.fromkeys(("gpt-2", "phi-2", "jais", "exaone4", "trillion"), PreTokenizer((_GPT2,))),
    **dict.fromkeys(("mpt", "olmo"), PreTokenizer((_GPT2,), nfc=True)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        PreTokenizer((r"\p{N}", _GPT2)),
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2"),
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), PreTokenizer((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), PreTokenizer((_QWEN2,), nfc=True)),
    **dict.fromkeys(("gpt-4o", "llama4"), PreTokenizer((_GPT4O,))),
}


@dataclass(frozen=True)
class GGUFVocab:
    """A checked vocabulary: ids are inside it; ``tokens``, ``types`` and ``scores`` have an entry per token.

    Attributes:
        model: ``"gpt2"`` or ``"llama"``.
        tokens: the spelling of each token.
        types: what each token is, such as ``CONTROL``.
        scores: SentencePiece's scores; ``None``: the file has none, as ``gpt2`` needs none.
        merges: pairs of tokens that BPE merges, the first first; ``None``: of ``llama``.
        pre: how text is split before merging.
        bos_id: id of BOS; ``None``: there is none, and so of the next three.
        eos_id: id of EOS.
        unk_id: id of the token for what is unknown.
        pad_id: id of padding.
        prefix_ids: ids before a text (BOS, or none).
        suffix_ids: ids after a text (EOS, or none).
        eos_ids: every id that ends generation (EOS, EOT, EOM and the texts in ``END_OF_GENERATION``).
        add_space_prefix: a text gets a leading space.
        strip_right: ids of special tokens that remove the white space after them (Phi-3).
        chat_templates: name -> Jinja source; the nameless one is ``"default"``.
    """

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    pre: PreTokenizer
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    eos_ids: frozenset[int]
    prefix_ids: list[int]
    suffix_ids: list[int]
    add_space_prefix: bool
    strip_right: frozenset[int]
    chat_templates: dict[str, str]

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id of the tokens that are matched in a text first: control, unknown and user-defined."""
        whole = (CONTROL, UNKNOWN, USER_DEFINED)
        return {self.tokens[i]: i for i, kind in enumerate(self.types) if kind in whole or i in self.eos_ids}


def read_vocab(metadata: Mapping[str, Any]) -> GGUFVocab:
    """Checks the ``tokenizer.*`` keys of a GGUF file and fills in llama.cpp's defaults.

    Defaults: BOS 1, EOS 2, unknown 0 for ``llama`` (none for ``gpt2``, where llama.cpp's 11 is Falcon's); BOS
    is added for ``llama`` and where the pre-tokenizer asks for it, EOS never; ``llama`` text gets a leading
    space.

    Raises:
        CheckpointError: a key is missing, has the wrong type or length, or names something unsupported.
    """
    model = _get(metadata, "tokenizer.ggml.model", str)
    if model not in ("gpt2", "llama"):
        raise CheckpointError(f"tokenizer.ggml.model={model!r} is not supported (supported: gpt2, llama)")
    spm = model == "llama"
    pre = PreTokenizer(()) if spm else _pre_tokenizer(metadata)
    tokens = _tokens(metadata)
    size = len(tokens)
    types = _column(metadata, "tokenizer.ggml.token_type", int, size) or [NORMAL] * size
    bos_id = _token_id(metadata, "bos_token_id", size, 1 if spm else None)
    eos_id = _token_id(metadata, "eos_token_id", size, 2 if spm else None)
    add_bos = _get(metadata, "tokenizer.ggml.add_bos_token", bool, spm or pre.add_bos)
    add_eos = _get(metadata, "tokenizer.ggml.add_eos_token", bool, False)
    return GGUFVocab(
        model=model,
        tokens=tokens,
        types=types,
        scores=_scores(metadata, size, required=spm),
        merges=None if spm else _get(metadata, "tokenizer.ggml.merges", list),
        pre=pre,
        bos_id=bos_id,
        eos_id=eos_id,
        unk_id=_token_id(metadata, "unknown_token_id", size, 0 if spm else None, lenient=True),
        pad_id=_token_id(metadata, "padding_token_id", size, None, lenient=True),
        eos_ids=_end_of_generation(metadata, tokens, types, eos_id),
        prefix_ids=[bos_id] if bos_id is not None and add_bos else [],
        suffix_ids=[eos_id] if eos_id is not None and add_eos else [],
        add_space_prefix=spm and _get(metadata, "tokenizer.ggml.add_space_prefix", bool, True),
        strip_right=_strip_right(metadata, tokens, types),
        chat_templates=_chat_templates(metadata),
    )


def byte_level_bpe(vocab: GGUFVocab) -> tokenizers.Tokenizer:
    """Builds the ``tokenizers`` object of a ``gpt2`` vocabulary.

    Raises:
        CheckpointError: a merge is malformed or joins tokens the vocabulary lacks.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    ids = {token: i for i, token in enumerate(vocab.tokens)}
    try:
        merges = [_merge_pair(line) for line in vocab.merges or ()]
        # `tokenizers` reports a merge of unknown tokens with a bare Exception.
        tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=vocab.pre.ignore_merges))
    except Exception as error:
        raise CheckpointError(f"tokenizer.ggml.merges: {error}") from error
    if vocab.pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in vocab.pre.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for special in (True, False):
        added = [
            AddedToken(text, special=special, normalized=False, rstrip=i in vocab.strip_right)
            for text, i in vocab.special_tokens.items()
            if (vocab.types[i] != USER_DEFINED) == special
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return tokenizer


def sentencepiece_model(vocab: GGUFVocab) -> bytes:
    """Serialises a ``llama`` vocabulary as a SentencePiece ``ModelProto`` of BPE type.

    Written by hand: it needs a handful of fields, and protobuf would be a dependency for those alone.
    User-defined tokens are declared as control: the caller splits text on them (``special_tokens``), as
    llama.cpp does, since GGUF spells Gemma's ``▁▁`` with spaces, which SentencePiece would never match.
    """
    unknown = vocab.unk_id or 0
    out = bytearray()
    for i, (token, score, kind) in enumerate(zip(vocab.tokens, vocab.scores or (), vocab.types, strict=True)):
        if i == unknown:
            kind = UNKNOWN  # exactly one is required; Gemma's file types it as control
        elif kind in (UNKNOWN, USER_DEFINED):
            kind = CONTROL
        elif kind not in (NORMAL, CONTROL, BYTE):
            kind = UNUSED
        text = token.encode()
        piece = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", score) + bytes((0x18, kind))
        out += b"\x0a" + _varint(len(piece)) + piece
    byte_fallback = vocab.types.count(BYTE) == 256
    trainer = b"\x18\x02" + b"\x98\x02" + bytes([byte_fallback])  # model_type=BPE, byte_fallback (field 35)
    # name="identity", add_dummy_prefix, remove_extra_whitespaces=false, escape_whitespaces=true
    normalizer = b"\x0a\x08identity\x18" + bytes([vocab.add_space_prefix]) + b"\x20\x00\x28\x01"
    return bytes(
        out + b"\x12" + _varint(len(trainer)) + trainer + b"\x1a" + _varint(len(normalizer)) + normalizer
    )


def _varint(value: int) -> bytes:
    """Encodes a number in Protobuf's base 128, least significant group first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _merge_pair(line: str) -> tuple[str, str]:
    # The search starts at 1: a left part may itself begin with a space.
    cut = line.find(" ", 1)
    if cut < 0:
        raise CheckpointError(f"{line!r} is not a pair of tokens")
    return line[:cut], line[cut + 1 :]


_REQUIRED = object()
_MOST_FLOAT32 = 2.0**128 - 2.0**104


def _get(metadata: Mapping[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    value = metadata.get(key)
    if value is None:
        if default is _REQUIRED:
            raise CheckpointError(f"{key} is missing")
        return default
    if not isinstance(value, kind):
        raise CheckpointError(f"{key} must be {kind.__name__}, got {type(value).__name__}")
    return value


def _column(
    metadata: Mapping[str, Any], key: str, kind: type, size: int, required: bool = False
) -> list[Any] | None:
    values: list[Any] | None = _get(metadata, key, list, _REQUIRED if required else None)
    if values is None:
        return None
    if len(values) != size:
        raise CheckpointError(f"{key} has {len(values)} entries, tokenizer.ggml.tokens has {size}")
    if not all(isinstance(value, kind) for value in values):
        raise CheckpointError(f"{key} must hold {kind.__name__} values only")
    return values


def _scores(metadata: Mapping[str, Any], size: int, required: bool) -> list[float] | None:
    scores = _column(metadata, "tokenizer.ggml.scores", float, size, required=required)
    wrong = next((x for x in scores or () if not -_MOST_FLOAT32 <= x <= _MOST_FLOAT32), None)
    if wrong is not None:
        raise CheckpointError(
            f"tokenizer.ggml.scores has {wrong}, which is no float32, as SentencePiece has them"
        )
    return scores


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = _get(metadata, "tokenizer.ggml.tokens", list)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError("tokenizer.ggml.tokens must be a non-empty list of strings")
    # llama.cpp names empty tokens the same way; two libraries refuse an empty piece.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if (distinct := len(set(tokens))) != len(tokens):
        raise CheckpointError(
            f"tokenizer.ggml.tokens has {len(tokens)} entries, but only {distinct} different ones"
        )
    return tokens


def _token_id(
    metadata: Mapping[str, Any], name: str, size: int, default: int | None, lenient: bool = False
) -> int | None:
    value: int | None = _get(metadata, f"tokenizer.ggml.{name}", int, default)
    if value is None or 0 <= value < size:
        return value
    if lenient or value == default:  # files whose padding id lies just past the vocabulary are common
        return None
    raise CheckpointError(f"tokenizer.ggml.{name}={value} lies outside the vocabulary of {size} tokens")


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    name = _get(metadata, "tokenizer.ggml.pre", str, "default")
    if name not in PRE_TOKENIZERS:
        supported = ", ".join(sorted(PRE_TOKENIZERS))
        raise CheckpointError(f"tokenizer.ggml.pre={name!r} is not supported (supported: {supported})")
    return PRE_TOKENIZERS[name]


def _end_of_generation(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], eos_id: int | None
) -> frozenset[int]:
    named = {_token_id(metadata, f"{name}_token_id", len(tokens), None) for name in ("eot", "eom")}
    by_text = {tokens[i]: i for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)}
    ends = {text: by_text[text] for text in END_OF_GENERATION & by_text.keys()}
    if "<|return|>" in ends and "<|call|>" in ends:
        ends.pop("<|end|>", None)  # in gpt-oss's Harmony format <|end|> closes a message, not the turn
    return frozenset(i for i in (eos_id, *named, *ends.values()) if i is not None)


def _strip_right(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> frozenset[int]:
    # GGUF has no field for this; llama.cpp goes by the model's name too.
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    exempt = ("<unk>", "<s>", "<|endoftext|>")
    special = (i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN, USER_DEFINED))
    return frozenset(i for i in special if tokens[i] not in exempt)


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template."
    templates = {key[len(prefix) :]: str(value) for key, value in metadata.items() if key.startswith(prefix)}
    default = _get(metadata, "tokenizer.chat_template", str, None)
    return templates if default is None else {"default": default, **templates}
