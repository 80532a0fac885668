"""Encodes with the ``tokenizers`` library: ``tokenizer.json`` and byte-level GGUF vocabularies."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tpjax.errors import CheckpointError
from tpjax.text.byte_tokens import byte_fallback, byte_level_alphabet
from tpjax.text.token_bounds import TokenBound, keeps_all_text, normalizer

if TYPE_CHECKING:
    import tokenizers


class TokenizersBackend:
    """Encodes with a ``tokenizers.Tokenizer`` whose decoder is byte-level or SentencePiece-like."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        # A file saved in training may truncate or pad, which a prompt must not be.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        self._byte_level = self._byte_fallback = self.strips_leading_space = False
        self._replacements: list[tuple[str, str]] = []
        self._read_decoder(json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None)
        self._byte_of = byte_level_alphabet() if self._byte_level else {}
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text."""
        # Of the library's methods this one releases the GIL: a long text takes seconds.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of a token; none for an id beyond the vocabulary."""
        added: str | None = self.added.get(token_id)
        token: str | None = self._tokenizer.id_to_token(token_id) if added is None else added
        if token is None:
            return b""
        if self._byte_level:
            # Added tokens are spelled in plain text, the others in the byte alphabet.
            plain = added is not None or not self._byte_of.keys() >= set(token)
            return token.encode() if plain else bytes([self._byte_of[char] for char in token])
        if self._byte_fallback and (byte := byte_fallback(token)) is not None:
            return byte
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode()

    def token_bound(self) -> TokenBound | None:
        """Returns a lower bound of the number of tokens; ``None`` if a step of the pipeline may drop text."""
        library = self._tokenizer
        what = normalizer(_state(library.normalizer))
        if what is None or not keeps_all_text(_state(library.pre_tokenizer)):
            return None
        byte_level, ids = self._byte_level, range(self.vocab_size)
        fallback = getattr(library.model, "byte_fallback", False) and all(
            library.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)
        )
        if type(library.model).__name__ != "BPE" or not (byte_level or fallback):
            return None  # unknown text is dropped, or any stretch of it becomes one token
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


def _state(step: Any) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads(step.__getstate__()) if step else None
    return found
