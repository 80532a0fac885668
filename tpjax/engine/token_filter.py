"""``allowed_token_ids`` and ``bad_words`` if they depend on the output so far. No jax.

Tokens that are barred throughout a request have a bias on the device (``Runner.set_history``). A word of
several tokens, or a grammar beside either parameter, has to see each token before the next is sampled: such a
request runs like one with a grammar.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

import numpy as np

from tpjax.engine.masks import pack_mask, without
from tpjax.engine.request import Grammar


class TokenFilter:
    """A :class:`Grammar` that bars further tokens, over another grammar or none.

    Args:
        vocab_size: vocabulary size of the model.
        allowed: the only tokens that may be sampled; ``None``: all.
        barred: tokens that may not be sampled.
        sequences: the last token of each may not be sampled if the output ends in the tokens before it.
        grammar: constrains the tokens further.

    Attributes:
        finished: whether nothing may follow.
    """

    def __init__(
        self,
        vocab_size: int,
        allowed: Sequence[int] | None,
        barred: Sequence[int],
        sequences: Sequence[Sequence[int]],
        grammar: Grammar | None = None,
    ) -> None:
        self.finished = False
        self._grammar = grammar
        self._always = pack_mask(vocab_size, allowed, barred)
        self._endings: dict[int, list[tuple[tuple[int, ...], int]]] = defaultdict(list)
        for *prefix, last in sequences:
            self._endings[prefix[-1]].append((tuple(prefix), last))
        self._longest = max((len(sequence) - 1 for sequence in sequences), default=0)
        self._recent: list[int] = []
        self._mask = self._next()

    @property
    def depends_on_output(self) -> bool:
        """Whether it bars a token after others only."""
        return bool(self._endings)

    def over(self, grammar: Grammar | None) -> TokenFilter:
        """Returns an unused filter that bars the same tokens over another grammar; they share the tables."""
        other = copy.copy(self)
        other._grammar, other._recent, other.finished = grammar, [], False
        other._mask = other._next()
        return other

    @property
    def error(self) -> str | None:
        """What went wrong, if it did: the request fails."""
        error = None if self._grammar is None else self._grammar.error
        if error is None and self.finished and self._grammar is not None and not self._grammar.finished:
            return "bad_words and allowed_token_ids leave no token that the schema allows"
        return error

    def mask(self) -> np.ndarray:
        """Returns uint32 [ceil(V / 32)]: bit ``i`` of word ``w`` allows token ``32 * w + i``."""
        return self._mask

    def advance(self, token: int) -> None:
        """Accepts the sampled token."""
        if self._longest:
            self._recent = [*self._recent, token][-self._longest :]
        if self._grammar is not None:
            self._grammar.advance(token)
            if self._grammar.finished:
                self.finished = True
                return
        self._mask = self._next()
        self.finished = not self._mask.any()

    def _next(self) -> np.ndarray:
        """Computes the mask of the next token."""
        mask = self._always
        if self._grammar is not None:
            mask = mask & self._grammar.mask()
        endings = self._endings.get(self._recent[-1], ()) if self._recent else ()
        barred = [last for prefix, last in endings if tuple(self._recent[-len(prefix) :]) == prefix]
        return without(mask, barred)


def word_sequences(
    words: Collection[str], encode: Callable[[str], list[int]], vocab_size: int
) -> list[tuple[int, ...]]:
    """Returns the tokens of words that must not be generated, by vLLM's rule.

    Each word is taken as it is and, if that begins with another token and has as many tokens, after a space.

    Args:
        words: texts.
        encode: encodes a text without adding special tokens.
        vocab_size: vocabulary size of the model: sequences with tokens beyond it are left out.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare, spaced = (tuple(encode(space + word.lstrip())) for space in ("", " "))
        forms = [bare]
        if bare and spaced and bare[0] != spaced[0] and len(bare) == len(spaced):
            forms.append(spaced)
        found |= {form: None for form in forms if form and max(form) < vocab_size}
    return list(found)
