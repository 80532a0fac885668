"""Encodes with SentencePiece: ``tokenizer.model`` files and SentencePiece vocabularies of GGUF files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tpjax.errors import CheckpointError
from tpjax.text.byte_tokens import byte_fallback
from tpjax.text.token_bounds import TokenBound


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in a text before SentencePiece splits the rest.

    Attributes:
        text: its spelling.
        lstrip: removes white space to its left.
        rstrip: removes white space to its right.
    """

    text: str
    lstrip: bool = False
    rstrip: bool = False


class SentencePieceBackend:
    """Matches added tokens and encodes the rest with SentencePiece, as transformers 4's slow tokenizers."""

    def __init__(self, model: bytes, added: Mapping[int, AddedToken], *, prefix_every_part: bool) -> None:
        """Loads the model.

        Args:
            model: a serialised ``ModelProto``.
            added: id -> token that is matched in the text before SentencePiece splits the rest.
            prefix_every_part: put the model's leading space before each stretch of text between added tokens
                (transformers' ``legacy``), not only at the start of the text.

        Raises:
            CheckpointError: SentencePiece cannot load the model.
        """
        self.processor = load_processor(model)
        self.strips_leading_space = self.processor.encode("a", out_type=str)[0].startswith("▁")
        # Merging two protobuf messages is concatenating them: this one sets add_dummy_prefix=False.
        unprefixed = self.strips_leading_space and not prefix_every_part
        self._inner = load_processor(model + b"\x1a\x02\x18\x00") if unprefixed else self.processor
        self.added = dict(added)
        self._splitter = _Splitter(self.added)
        self._pieces = self.processor.get_piece_size()
        self.vocab_size = max(self._pieces, *(i + 1 for i in added)) if added else self._pieces

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text."""
        ids: list[int] = []
        for position, part in self._splitter.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += (self._inner if position else self.processor).encode(part)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of a token; none for an id beyond the vocabulary."""
        if (added := self.added.get(token_id)) is not None:
            return added.text.encode()
        if token_id >= self._pieces:
            return b""
        piece: str = self.processor.id_to_piece(token_id)
        if self.processor.is_byte(token_id) and (byte := byte_fallback(piece)) is not None:
            return byte
        return piece.replace("▁", " ").encode()

    def token_bound(self) -> TokenBound | None:
        """Returns a lower bound of the number of tokens; ``None`` if the normaliser may drop text."""
        pieces = range(self._pieces)
        whole = sum(self.processor.is_byte(i) for i in pieces) == 256 and all(
            self.processor.normalize(text).strip("▁") == text.replace(" ", "▁") for text in _ODD_TEXTS
        )
        if not whole:
            return None
        tokens = [self.processor.id_to_piece(i) for i in pieces]
        strips = any(token.lstrip or token.rstrip for token in self.added.values())
        covered = [text.encode() for text in (*tokens, *(token.text for token in self.added.values()))]
        return TokenBound(covered, spaces_spelled=True, strips_spaces=strips)


# Texts that SentencePiece's trained normalisers change: NFKC, case, control characters, runs of spaces.
_ODD_TEXTS = ("a  b", "\ufb01", "\uff21", "A", "\u2460", "a\tb", "a\nb", "a\u200bb", "a\u3000b", "e\u0301")


class _Splitter:
    """Matches added tokens in a text: leftmost first, the longest of those that start at one position."""

    def __init__(self, added: Mapping[int, AddedToken]) -> None:
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

    def _longest_at(self, text: str, at: int) -> tuple[int, AddedToken] | None:
        for start in (text[at : at + 2], text[at]):
            for length in self._lengths.get(start, ()):
                if (match := self._tokens.get(text[at : at + length])) is not None:
                    return match
        return None


def load_processor(model: bytes) -> Any:
    """Returns SentencePiece's processor of a serialised model.

    Raises:
        CheckpointError: SentencePiece cannot load the model.
    """
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"not a usable SentencePiece model ({str(error).strip()})") from error
