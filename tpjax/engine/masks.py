"""Masks of tokens, uint32 [ceil(V / 32)]: bit ``i`` of word ``w`` allows token ``32 * w + i``. No jax."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack_mask(
    vocab_size: int, allowed: Sequence[int] | None = None, barred: Sequence[int] = ()
) -> np.ndarray:
    """Returns a mask of the allowed tokens (``None``: all) that are not barred."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    bits[:vocab_size] = allowed is None
    bits[np.asarray(() if allowed is None else allowed, np.int64)] = True
    bits[list(barred)] = False
    return np.packbits(bits, bitorder="little").view(np.uint32)


def without(mask: np.ndarray, token_ids: Sequence[int]) -> np.ndarray:
    """Returns a copy of a mask that does not allow these tokens; they may be beyond the vocabulary."""
    mask, bits = mask.copy(), np.array([token for token in token_ids if token < 32 * len(mask)], np.uint32)
    np.bitwise_and.at(mask, bits // 32, ~(np.uint32(1) << bits % 32))
    return mask
