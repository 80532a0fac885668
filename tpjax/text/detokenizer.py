"""Turns generated tokens into text one at a time, without splitting a character."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from tpjax.text.tokenizer import Tokenizer

# Tokens at the end of a prompt that are looked at: one usually shows all that is needed. A prompt may consist
# of control tokens, and a request may start 128 texts after it.
_LOOK_BACK = 64


class IncrementalDetokenizer:
    """Decodes tokens as they are generated, at a cost per token that does not grow with the text.

    Never splits a character and never shows U+FFFD for one that is merely incomplete. For any ids,
    ``"".join(map(push, ids)) + flush()`` equals ``decode(ids)`` if the prompt shows no text, and otherwise
    the part of ``decode([*prompt_token_ids, *ids])`` after ``decode(prompt_token_ids)``: only the first token
    of a whole text loses its leading space. A character that the prompt left incomplete is returned once it
    is completed. A prompt of over 64 tokens whose last 64 show no text counts as one that shows some.

    Args:
        tokenizer: maps ids to bytes.
        skip_special_tokens: leave out control tokens.
        prompt_token_ids: tokens before the first one pushed.
        shown: control tokens that are not left out.

    Attributes:
        start: offset of the last token pushed, characters of the text: that of the character that holds its
            first byte, or the end of the text if the token shows nothing.
        length: text returned so far, characters.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
        shown: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._shown = shown
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # At most three bytes of an unfinished character precede the generated ones.
        tail = b""
        for token_id in reversed(prompt_token_ids[-_LOOK_BACK:]):
            tail = tokenizer.visible_bytes(token_id, skip_special_tokens) + tail
            if len(tail) >= 4:
                break
        self._decoder.decode(tail)
        begins = not tail and len(prompt_token_ids) <= _LOOK_BACK
        self._strip_pending = tokenizer.strips_leading_space and begins
        self.start = self.length = 0

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that is now certain (often one word, sometimes nothing)."""
        skip = self._skip_special_tokens and token_id not in self._shown
        data = self._tokenizer.visible_bytes(token_id, skip)
        # The first byte by itself: it may end a character, or show that the one before it stays incomplete.
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
