"""A lower bound of the number of tokens of a text, without tokenising it.

A token that covers L bytes gives each of them a weight of 1/L. With ``longest[b]`` the length of the longest
token that contains byte ``b``, no token's bytes sum to over one in ``sum(1 / longest[b] for b in text)``: the
sum is a lower bound of the number of tokens. It takes milliseconds for megabytes of text, where encoding
takes seconds and a hundred times the memory.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

WORD_START = "▁"
# NFC joins characters: at most this many bytes become one (three are known: U+1FEF and decomposed Hangul).
_NFC_BYTES = 4
_SAFE_STEPS = ("ByteLevel", "Digits", "Metaspace", "Split", "Punctuation", "UnicodeScripts")


class TokenBound:
    """Computes the lower bound for one vocabulary.

    Args:
        tokens: the bytes that each token covers in a text.
        spaces_spelled: tokens spell a space as ``▁``.
        nfc: the text is normalised to NFC first.
        strips_spaces: some tokens remove the white space beside them.
        dropped: bytes without a token, which the tokenizer may drop.
    """

    def __init__(
        self,
        tokens: Iterable[bytes],
        *,
        spaces_spelled: bool = False,
        nfc: bool = False,
        strips_spaces: bool = False,
        dropped: Iterable[int] = (),
    ) -> None:
        longest = np.ones(256)  # a byte that no token has is a token by itself, or several
        for token in tokens:
            if spaces_spelled:
                token = token.replace(b" ", WORD_START.encode())
            here = list(set(token))
            longest[here] = np.maximum(longest[here], len(token))
        self._share = 1 / longest
        self._share[[*dropped, *(_SPACES if strips_spaces else ())]] = 0
        self._spaces_spelled, self._nfc = spaces_spelled, nfc

    def fewest(self, text: str) -> int:
        """Returns the lower bound for a text, tokens."""
        if self._spaces_spelled:
            text = text.replace(" ", WORD_START)
        data = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
        total = float(np.bincount(data, minlength=256) @ self._share)
        if self._nfc and not text.isascii():
            total /= _NFC_BYTES
        return math.floor(total * (1 - 1e-9))  # the sum is rounded


_SPACES = frozenset(
    "".join(chr(i) for i in range(sys.maxunicode + 1) if chr(i).isspace()).encode() + WORD_START.encode()
)


def normalizer(state: Mapping[str, Any] | None) -> dict[str, bool] | None:
    """Returns the arguments of :class:`TokenBound` that follow from a normaliser of ``tokenizers``.

    Args:
        state: the normaliser, decoded from JSON.

    Returns:
        Argument name -> True; ``None`` if no bound holds for this normaliser.
    """
    match state:
        case None:
            return {}
        case {"type": "Sequence", "normalizers": steps}:
            found = [normalizer(step) for step in steps]
            if any(one is None for one in found):
                return None
            return {name: True for one in found if one for name in one}
        case {"type": "NFC"}:
            return {"nfc": True}
        case {"type": "Prepend"}:
            return {}
        case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            return {"spaces_spelled": True}
    return None


def keeps_all_text(state: Mapping[str, Any] | None) -> bool:
    """Returns whether a pre-tokenizer of ``tokenizers`` only splits a text, and drops nothing."""
    match state:
        case None:
            return True
        case {"type": "Sequence", "pretokenizers": steps}:
            return all(keeps_all_text(step) for step in steps)
    return state.get("type") in _SAFE_STEPS and state.get("behavior") != "Removed"
