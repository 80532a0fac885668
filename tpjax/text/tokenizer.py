"""Text to token ids and back: one face over `tokenizers`, `sentencepiece` and GGUF vocabularies.

Decoding is ours and the same for every kind. A token is a byte string (`Tokenizer.token_bytes`); a text is
the concatenation of its tokens' bytes, read as UTF-8, with invalid bytes shown as U+FFFD as Unicode advises.
That makes streaming exact: `IncrementalDetokenizer` is a UTF-8 decoder fed one token at a time. It agrees
with transformers on all valid text; on invalid bytes from a byte-fallback vocabulary, transformers gives up a
whole run of byte tokens, valid characters included, where we keep those. `clean_up_tokenization_spaces` is
ignored, as transformers 5 does for BPE: it removes spaces the model wrote.

Nothing here touches JAX; the tokenizer libraries are imported when a tokenizer is loaded.
"""

from __future__ import annotations

import codecs
import json
import re
from array import array
from base64 import b64encode
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tpjax.checkpoints.orbax import VOCABULARY
from tpjax.errors import CheckpointError, RequestError
from tpjax.text import gguf_vocab
from tpjax.text.chat_template import ChatTemplates
from tpjax.text.token_bounds import TokenBound, keeps_all_text, normalizer

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
ADDITIONAL = "additional_chat_templates"  # folder of a checkpoint: NAME.jinja
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Encodes and decodes text as the checkpoint's authors did.

    Attributes:
        vocab_size: number of ids the tokenizer knows, added tokens included (a model may have more rows).
        bos_id, unk_id, pad_id: ids of these tokens, or None.
        eos_ids: every id that ends generation: the tokenizer's EOS and those the generation settings name.
        special_ids: control tokens, which `decode` leaves out by default.
        chat_templates: what `apply_chat_template` renders with.
    """

    def __init__(
        self,
        backend: _Backend,
        *,
        prefix_ids: Sequence[int] = (),
        suffix_ids: Sequence[int] = (),
        roles: Mapping[str, tuple[str, int]],
        eos_ids: Iterable[int] = (),
        special_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str],
    ):
        """Use `load_tokenizer` or `tokenizer_from_gguf`.

        Args:
            backend: what turns plain text into ids and ids into bytes.
            prefix_ids: what `encode` puts before a text (usually BOS).
            suffix_ids: what it puts after one (usually nothing).
            roles: `"bos_token"`, `"eos_token"`, ... -> (text, id).
            eos_ids: ids that end generation, in addition to the one in `roles`.
            special_ids: control tokens, in addition to all of these.
            chat_templates: name -> Jinja source; `"default"` is the usual one.
        """
        self._backend = backend
        self._prefix_ids, self._suffix_ids = list(prefix_ids), list(suffix_ids)
        self.chat_templates = ChatTemplates(chat_templates, {role: text for role, (text, _) in roles.items()})
        self._bytes: dict[int, bytes] = {}
        ids = {role: id_ for role, (_, id_) in roles.items()}
        self.vocab_size: int = backend.vocab_size
        self.bos_id: int | None = ids.get("bos_token")
        self.unk_id: int | None = ids.get("unk_token")
        self.pad_id: int | None = ids.get("pad_token")
        self.eos_ids = frozenset(eos_ids) | ({ids["eos_token"]} if "eos_token" in ids else frozenset())
        self.special_ids = frozenset(special_ids) | frozenset(ids.values()) | self.eos_ids

    @property
    def edges(self) -> tuple[int, int]:
        """How many tokens `encode` puts before and after a text."""
        return len(self._prefix_ids), len(self._suffix_ids)

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the default chat template, or None."""
        return self.chat_templates.sources.get("default")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens spelled out in it become their ids, as in transformers.

        Args:
            text: any valid Unicode; empty is fine.
            add_special_tokens: add the BOS and EOS the checkpoint asks for. Pass False for the output of
                `apply_chat_template`, which writes its own.

        Raises:
            RequestError: the text holds a lone surrogate, which no encoding can carry.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text is not valid Unicode: position {error.start} is a lone surrogate"
            ) from error
        ids = self._backend.encode(text)
        return [*self._prefix_ids, *ids, *self._suffix_ids] if add_special_tokens else ids

    def fewest_tokens(self, text: str) -> int:
        """Tokens a text takes at least, found without encoding it; 0 where nothing is certain."""
        bound = self._bound
        return 0 if bound is None else bound.fewest(text)

    @cached_property
    def _bound(self) -> TokenBound | None:
        return self._backend.token_bound()

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids. An id beyond the vocabulary (a padded row of the model) is no text at all.

        The leading space that some tokenizers put before every text is taken off again.
        """
        data = b"".join([self._visible_bytes(i, skip_special_tokens) for i in ids])
        text = data.decode("utf-8", "replace")
        return text[1:] if self._backend.strips_leading_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for in the middle of a text; special tokens give their own spelling."""
        token_id = int(token_id)
        found = self._bytes.get(token_id)
        if found is None:
            found = self._backend.token_bytes(token_id) if 0 <= token_id < 1 << 32 else b""
            self._bytes[token_id] = found
        return found

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Renders a conversation as the prompt the model was trained on.

        The template runs in Jinja's immutable sandbox with transformers' settings and helpers. A template
        named `tool_use` is preferred when `tools` are given.

        Args:
            messages: `{"role": ..., "content": ...}`, oldest first.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: end with the last message's text, so that the model goes on with it; pass
                ``add_generation_prompt=False`` too.
            tools: JSON schemas the template may describe to the model.
            chat_template: Jinja source to use in place of the checkpoint's.
            **kwargs: further template variables (`enable_thinking=False`).

        Returns:
            The prompt, BOS included where the template writes it: encode it with `add_special_tokens=False`.

        Raises:
            RequestError: there is no template, or the template refuses the messages.
            CheckpointError: the template is not valid Jinja.
        """
        return self.chat_templates.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template=chat_template,
            **kwargs,
        )

    def _visible_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes:
        return b"" if skip_special_tokens and token_id in self.special_ids else self.token_bytes(token_id)


class IncrementalDetokenizer:
    """Turns generated tokens into text as they come, at a cost that does not grow with the text.

    Never splits a character and never shows U+FFFD for one that is merely incomplete. For any ids,
    ``"".join(map(push, ids)) + flush()`` equals ``decode(ids)`` if the prompt shows no text, and otherwise
    what ``decode([*prompt_ids, *ids])`` has beyond ``decode(prompt_ids)``: only the first token of a whole
    text loses its leading space. A character the prompt left incomplete comes out once it is completed.

    Attributes:
        start: where the last token pushed begins, characters of the text: the character that holds its first
            byte, or the end of the text where it shows nothing.
        length: of the text given out so far, characters.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        shown: Collection[int] = (),
    ):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._shown = shown  # special tokens that are not skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # At most three bytes of an unfinished character precede the generated ones.
        tail = b""
        for token_id in reversed(prompt_ids):
            tail = tokenizer._visible_bytes(token_id, skip_special_tokens) + tail
            if len(tail) >= 4:
                break
        self._decoder.decode(tail)
        self._strip_pending = tokenizer._backend.strips_leading_space and not tail
        self.start = self.length = 0

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that is now certain (often one word, sometimes nothing)."""
        skip = self._skip_special_tokens and token_id not in self._shown
        data = self._tokenizer._visible_bytes(token_id, skip)
        # its first byte by itself: it may end a character, or show that the one before it never will
        head = self._emit(self._decoder.decode(data[:1]))
        inside = bool(head) and not self._decoder.getstate()[0]
        self.start = self.length - inside
        return head + self._emit(self._decoder.decode(data[1:]))

    def flush(self) -> str:
        """Ends the text; returns what was held back, with U+FFFD for an incomplete character."""
        return self._emit(self._decoder.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if text and self._strip_pending:
            self._strip_pending = False
            text = text.removeprefix(" ")
        self.length += len(text)
        return text


def encoded(path: str, text: str, add_special_tokens: bool, limit: int | None) -> dict[str, Any]:
    """Encodes a text with the tokenizer of a checkpoint: what a worker runs for a long one.

    Returns:
        ``count``, and where that is not over ``limit`` the ``ids``, as base64 of C's unsigned integers.
    """
    tokenizer = _loaded(path)
    assert tokenizer is not None
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if limit is not None and len(ids) > limit:
        return {"count": len(ids)}
    return {"count": len(ids), "ids": b64encode(array("I", ids)).decode()}


@lru_cache(1)
def _loaded(path: str) -> Tokenizer | None:
    return load_tokenizer(Path(path))


def load_tokenizer(path: Path) -> Tokenizer | None:
    """Loads the tokenizer of a checkpoint directory or a `.gguf` file.

    A directory holds `tokenizer.json` (preferred) or `tokenizer.model`, and beside it, all optional:
    `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`, `generation_config.json`,
    `config.json`, `chat_template.jinja` and `additional_chat_templates/`; or `tokenizer.gguf`.

    Returns:
        The tokenizer, or None if the directory has none.

    Raises:
        CheckpointError: the path does not exist, or a file in it is broken; the message names the file.
    """
    path = Path(path)
    if path.is_dir():
        for name, load in (
            ("tokenizer.json", _load_tokenizer_json),
            ("tokenizer.model", _load_tokenizer_model),
        ):
            if (path / name).is_file():
                return load(path / name, _Sidecars.read(path))
        if not (path / VOCABULARY).is_file():
            return None
        path = path / VOCABULARY
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path}: a tokenizer is read from a directory or a .gguf file")
    from tpjax.checkpoints.gguf import GGUFFile

    metadata = GGUFFile(path).metadata
    try:
        return tokenizer_from_gguf(metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer a GGUF file describes.

    Follows llama.cpp: special and user-defined tokens are found in the text first; a `llama` vocabulary with
    `add_space_prefix` puts a space before each stretch of text between them; `eos_ids` holds EOS, EOT, EOM
    and the well-known texts in `gguf_vocab.END_OF_GENERATION`. The NFC normalisation of a model's own
    tokenizer (Qwen's), which llama.cpp leaves out, is applied.

    Args:
        metadata: the file's key-value pairs, decoded to Python values and lists.

    Raises:
        CheckpointError: a key is missing, malformed, or names something unsupported.
    """
    vocab = gguf_vocab.read_vocab(metadata)
    if vocab.model == "gpt2":
        backend: _Backend = _TokenizersBackend(gguf_vocab.byte_level_bpe(vocab))
    else:
        added = {
            i: _AddedToken(text, rstrip=i in vocab.strip_right) for text, i in vocab.special_tokens.items()
        }
        backend = _SentencePieceBackend(gguf_vocab.sentencepiece_model(vocab), added, prefix_every_part=True)
    by_role = zip(_ROLES, (vocab.bos_id, vocab.eos_id, vocab.unk_id, vocab.pad_id), strict=True)
    special = (gguf_vocab.CONTROL, gguf_vocab.UNKNOWN)
    return Tokenizer(
        backend,
        prefix_ids=vocab.prefix_ids,
        suffix_ids=vocab.suffix_ids,
        roles={role: (vocab.tokens[i], i) for role, i in by_role if i is not None},
        eos_ids=vocab.eos_ids,
        special_ids=(i for i, kind in enumerate(vocab.types) if kind in special),
        chat_templates=vocab.chat_templates,
    )


# ----------------------------------------------------------------------------------------- backends


class _Backend(Protocol):
    """What differs between the libraries: no BOS or EOS here, and bytes rather than text."""

    vocab_size: int
    strips_leading_space: bool

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_bound(self) -> TokenBound | None: ...


class _TokenizersBackend:
    """A `tokenizers.Tokenizer` whose decoder is byte-level or in SentencePiece's manner."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        # A saved training set-up may cut or pad; a prompt must be neither.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        self._byte_level = self._byte_fallback = self.strips_leading_space = False
        self._replacements: list[tuple[str, str]] = []
        self._read_decoder(json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None)
        self._byte_of = _byte_level_alphabet() if self._byte_level else {}
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        # the one of its ways that lets Python's other threads run: a long text takes seconds
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        added: str | None = self._added.get(token_id)
        token: str | None = self._tokenizer.id_to_token(token_id) if added is None else added
        if token is None:
            return b""
        if self._byte_level:
            # Added tokens are spelled in plain text, the others in the byte alphabet.
            plain = added is not None or not self._byte_of.keys() >= set(token)
            return token.encode() if plain else bytes([self._byte_of[char] for char in token])
        if self._byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode()

    def token_bound(self) -> TokenBound | None:
        library = self._tokenizer
        what = normalizer(_state(library.normalizer))
        if what is None or not keeps_all_text(_state(library.pre_tokenizer)):
            return None
        byte_level, ids = self._byte_level, range(self.vocab_size)
        fallback = getattr(library.model, "byte_fallback", False) and all(
            library.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)
        )
        if type(library.model).__name__ != "BPE" or not (byte_level or fallback):
            return None  # what is unknown is dropped, or any stretch of it becomes one token
        added = library.get_added_tokens_decoder().values()
        return TokenBound(
            (self.token_bytes(i) if byte_level else (library.id_to_token(i) or "").encode() for i in ids),
            spaces_spelled=not byte_level,
            nfc="nfc" in what,
            strips_spaces=any(token.lstrip or token.rstrip for token in added),
            dropped=[byte for char, byte in self._byte_of.items() if library.token_to_id(char) is None],
        )

    def _read_decoder(self, step: dict[str, Any] | None) -> None:
        match step:
            case {"type": "Sequence", "decoders": steps}:
                for inner in steps:
                    self._read_decoder(inner)
            case {"type": "ByteLevel"}:
                self._byte_level = True
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                self._replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                self.strips_leading_space = True
            case {"type": "Metaspace", "replacement": old, **rest}:
                self._replacements.append((old, " "))
                self.strips_leading_space = rest.get("prepend_scheme", "always") != "never"
            case _:
                raise CheckpointError(f"decoder {json.dumps(step)} is not supported")


@dataclass(frozen=True)
class _AddedToken:
    text: str
    lstrip: bool = False  # swallows white space to its left
    rstrip: bool = False


class _SentencePieceBackend:
    """A SentencePiece model plus tokens matched before it: what transformers 4's slow Llama tokenizer did."""

    def __init__(self, model: bytes, added: Mapping[int, _AddedToken], *, prefix_every_part: bool):
        """Loads the model.

        Args:
            model: a serialised `ModelProto`.
            added: id -> token that is found in the text before SentencePiece sees the rest.
            prefix_every_part: the model's leading space goes before each stretch of text between added tokens
                (transformers' `legacy`), not only at the start of the text.

        Raises:
            CheckpointError: SentencePiece cannot load the model.
        """
        self.processor = _sentencepiece(model)
        self.strips_leading_space = self.processor.encode("a", out_type=str)[0].startswith("▁")
        # Merging two protobuf messages is concatenating them: this one sets add_dummy_prefix=False.
        unprefixed = self.strips_leading_space and not prefix_every_part
        self._inner = _sentencepiece(model + b"\x1a\x02\x18\x00") if unprefixed else self.processor
        self._added = dict(added)
        self._splitter = _Splitter(self._added)
        self._pieces = self.processor.get_piece_size()
        self.vocab_size = max(self._pieces, *(i + 1 for i in added)) if added else self._pieces

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for position, part in self._splitter.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += (self._inner if position else self.processor).encode(part)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        if (added := self._added.get(token_id)) is not None:
            return added.text.encode()
        if token_id >= self._pieces:
            return b""
        piece = self.processor.id_to_piece(token_id)
        if self.processor.is_byte(token_id) and (byte := _BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        return piece.replace("▁", " ").encode()

    def token_bound(self) -> TokenBound | None:
        pieces = range(self._pieces)
        whole = sum(self.processor.is_byte(i) for i in pieces) == 256 and all(
            self.processor.normalize(text).strip("▁") == text.replace(" ", "▁") for text in _ODD_TEXTS
        )
        if not whole:
            return None
        tokens = [self.processor.id_to_piece(i) for i in pieces]
        strips = any(token.lstrip or token.rstrip for token in self._added.values())
        covered = [text.encode() for text in (*tokens, *(token.text for token in self._added.values()))]
        return TokenBound(covered, spaces_spelled=True, strips_spaces=strips)


# What the normalisers SentencePiece is trained with change: NFKC, case, control characters, runs of spaces.
_ODD_TEXTS = ("a  b", "\ufb01", "\uff21", "A", "\u2460", "a\tb", "a\nb", "a\u200bb", "a\u3000b", "e\u0301")


def _state(step: Any) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads(step.__getstate__()) if step else None
    return found


class _Splitter:
    """Finds added tokens in a text: leftmost first, and of those that start at one place the longest."""

    def __init__(self, added: Mapping[int, _AddedToken]):
        self._tokens = {token.text: (i, token) for i, token in added.items() if token.text}
        # Keyed by two characters, so that Gemma's tokens for runs of spaces cost nothing at a single space.
        lengths: dict[str, set[int]] = {}
        for text in self._tokens:
            lengths.setdefault(text[:2], set()).add(len(text))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}
        starts = "".join(sorted({start[0] for start in lengths}))
        self._start = re.compile(f"[{re.escape(starts)}]" if starts else "(?!)")

    def split(self, text: str) -> Iterator[tuple[int, str | int]]:
        """Yields (position in the text, id of an added token or a stretch of text between them)."""
        done = search_from = 0
        while found := self._start.search(text, search_from):
            at = found.start()
            match = self._longest_at(text, at)
            if match is None:
                search_from = at + 1
                continue
            token_id, token = match
            before = text[done:at].rstrip() if token.lstrip else text[done:at]
            if before:
                yield done, before
            yield at, token_id
            done = at + len(token.text)
            while token.rstrip and done < len(text) and text[done].isspace():
                done += 1
            search_from = done
        if done < len(text):
            yield done, text[done:]

    def _longest_at(self, text: str, at: int) -> tuple[int, _AddedToken] | None:
        for start in (text[at : at + 2], text[at]):
            for length in self._lengths.get(start, ()):
                if (match := self._tokens.get(text[at : at + length])) is not None:
                    return match
        return None


def _sentencepiece(model: bytes) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"not a usable SentencePiece model ({str(error).strip()})") from error


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 as itself, the rest from U+0100."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


# ----------------------------------------------------------------------------------------- directories


@dataclass(frozen=True)
class _Sidecars:
    """What the JSON files beside a tokenizer say, missing files being empty."""

    config: dict[str, Any]  # tokenizer_config.json over special_tokens_map.json
    added: dict[int, tuple[_AddedToken, bool]]  # id -> token, is it special
    eos_ids: frozenset[int]
    chat_templates: dict[str, str]

    @classmethod
    def read(cls, directory: Path) -> _Sidecars:
        config = _read_json(directory / "tokenizer_config.json")
        for role, value in _read_json(directory / "special_tokens_map.json").items():
            if config.get(role) is None:
                config[role] = value
        return cls(
            config, _added_tokens(directory, config), _eos_ids(directory), _chat_templates(directory, config)
        )

    def role_texts(self) -> dict[str, str]:
        """The texts of BOS, EOS, ...: strings, or the `AddedToken` dictionaries of older files."""
        values = {role: self.config.get(role) for role in _ROLES}
        texts = {
            role: value.get("content") if isinstance(value, dict) else value for role, value in values.items()
        }
        return {role: text for role, text in texts.items() if isinstance(text, str)}

    def edges(self, bos_id: int | None, eos_id: int | None, default_bos: bool) -> tuple[list[int], list[int]]:
        """BOS before and EOS after a text, by `add_bos_token` and `add_eos_token`."""
        prefix = [bos_id] if bos_id is not None and self.config.get("add_bos_token", default_bos) else []
        suffix = [eos_id] if eos_id is not None and self.config.get("add_eos_token", False) else []
        return prefix, suffix


def _load_tokenizer_json(path: Path, sidecars: _Sidecars) -> Tokenizer:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    try:
        library = Library.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: {error}") from error
    known = library.get_added_tokens_decoder()
    for i, (token, special) in sorted(sidecars.added.items()):
        # The library numbers a new token itself: add it only where it will get the id it is listed under.
        lands_at = library.token_to_id(token.text)
        if i not in known and i == (library.get_vocab_size() if lands_at is None else lands_at):
            flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": False, "special": special}
            library.add_tokens([AddedToken(token.text, **flags)])
    texts = sidecars.role_texts()
    found = ((role, text, library.token_to_id(text)) for role, text in texts.items())
    roles = {role: (text, token_id) for role, text, token_id in found if token_id is not None}
    # EOS and friends are matched in a text even where tokenizer.json does not call them special.
    listed = {token.content for token in library.get_added_tokens_decoder().values()}
    library.add_special_tokens(
        [AddedToken(t, normalized=False) for t, _ in roles.values() if t not in listed]
    )
    try:
        backend = _TokenizersBackend(library)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    prefix, suffix = _post_processor_edges(library)
    if not prefix + suffix and str(sidecars.config.get("tokenizer_class", "")).startswith("Llama"):
        # transformers 4's Llama class added BOS by flag, so files such as DeepSeek-V3's leave it out.
        ids = {role: i for role, (_, i) in roles.items()}
        prefix, suffix = sidecars.edges(ids.get("bos_token"), ids.get("eos_token"), default_bos=False)
    return Tokenizer(
        backend,
        prefix_ids=prefix,
        suffix_ids=suffix,
        roles=roles,
        eos_ids=sidecars.eos_ids,
        special_ids=(i for i, token in library.get_added_tokens_decoder().items() if token.special),
        chat_templates=sidecars.chat_templates,
    )


def _post_processor_edges(library: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What a post-processor puts around a text: fixed ids, seen on an example."""
    for probe in ("a", "0", ".", " "):  # a small vocabulary may lack any of them
        bare, full = library.encode(probe, add_special_tokens=False).ids, library.encode(probe).ids
        for start in range(len(full) - len(bare) + 1 if bare else 0):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
    return [], []


def _load_tokenizer_model(path: Path, sidecars: _Sidecars) -> Tokenizer:
    """A SentencePiece file. As in transformers 5, BOS is on and `legacy` off unless the config differs."""
    added = {i: token for i, (token, _) in sidecars.added.items()}
    legacy = bool(sidecars.config.get("legacy", False))
    try:
        model = path.read_bytes()
        processor = _sentencepiece(model)
        roles = _sentencepiece_roles(processor, sidecars.role_texts(), added)
        specials = {i: _AddedToken(text) for text, i in roles.values()}
        backend = _SentencePieceBackend(model, specials | added, prefix_every_part=legacy)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    ids = {role: i for role, (_, i) in roles.items()}
    prefix, suffix = sidecars.edges(ids.get("bos_token"), ids.get("eos_token"), default_bos=True)
    control = (
        i for i in range(processor.get_piece_size()) if processor.is_control(i) or processor.is_unknown(i)
    )
    return Tokenizer(
        backend,
        prefix_ids=prefix,
        suffix_ids=suffix,
        roles=roles,
        eos_ids=sidecars.eos_ids,
        special_ids=[*control, *(i for i, (_, special) in sidecars.added.items() if special)],
        chat_templates=sidecars.chat_templates,
    )


def _sentencepiece_roles(
    processor: Any, texts: Mapping[str, str], added: Mapping[int, _AddedToken]
) -> dict[str, tuple[str, int]]:
    """BOS, EOS, ... by the names in the JSON files, or as the model itself declares them."""
    by_text = {token.text: i for i, token in added.items()}
    own = zip(
        _ROLES, (processor.bos_id(), processor.eos_id(), processor.unk_id(), processor.pad_id()), strict=True
    )
    roles = {role: (processor.id_to_piece(i), i) for role, i in own if i >= 0}
    for role, text in texts.items():
        i = by_text.get(text, processor.piece_to_id(text))
        if text in by_text or processor.id_to_piece(i) == text:  # else piece_to_id said <unk>
            roles[role] = (text, i)
    return roles


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _added_tokens(directory: Path, config: Mapping[str, Any]) -> dict[int, tuple[_AddedToken, bool]]:
    added = {
        i: (_AddedToken(text), False)
        for text, i in _read_json(directory / "added_tokens.json").items()
        if isinstance(i, int)
    }
    try:
        for key, token in (config.get("added_tokens_decoder") or {}).items():
            flags = [bool(token.get(name)) for name in ("lstrip", "rstrip", "special")]
            added[int(key)] = (_AddedToken(str(token["content"]), flags[0], flags[1]), flags[2])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory / 'tokenizer_config.json'}: malformed added_tokens_decoder"
        ) from error
    return added


def _eos_ids(directory: Path) -> frozenset[int]:
    """The union of what generation_config.json and config.json name; either may hold an id or a list."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        config = _read_json(directory / name)
        text_config = config.get("text_config")
        for part in (config, text_config if isinstance(text_config, dict) else {}):
            value = part.get("eos_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise CheckpointError(f"{directory / name}: eos_token_id={value!r} is no id or list of ids")
            found.update(ids)
    return frozenset(found)


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name, as transformers finds them.

    Files of their own (`chat_template.jinja` and `additional_chat_templates/NAME.jinja`) stand in for what
    tokenizer_config.json has, which is a template, an object from names to templates, or a list of both; a
    processor's `chat_template.json` counts where there is nothing else.
    """
    found = _template_files(directory)
    if "default" not in found:
        found = _named_templates(config.get("chat_template"), directory / "tokenizer_config.json") | found
    if not found:
        file = directory / "chat_template.json"
        found = _named_templates(_read_json(file).get("chat_template"), file)
    return found


def _template_files(directory: Path) -> dict[str, str]:
    files = {file.name.removesuffix(".jinja"): file for file in (directory / ADDITIONAL).glob("*.jinja")}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    templates = {}
    for name, file in sorted(files.items()):
        try:
            templates[name] = file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: not UTF-8 text") from error
    return templates


def _named_templates(value: Any, file: Path) -> dict[str, str]:
    """Templates from JSON: one, an object from names to templates, or a list of objects with both."""
    if value is None:
        return {}
    templates = {"default": value} if isinstance(value, str) else value
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        templates = {item.get("name"): item.get("template") for item in value}
    if not isinstance(templates, dict) or not all(
        isinstance(name, str) and isinstance(source, str) for name, source in templates.items()
    ):
        raise CheckpointError(f"{file}: chat_template is not a template, nor templates with their names")
    return dict(templates)
