"""Streams the text of a request: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tpjax.text.detokenizer import IncrementalDetokenizer
from tpjax.text.tokenizer import Tokenizer


class TextStream:
    """Decodes the tokens of one request and ends its text at a stop string.

    Holds back text that may be the beginning of a stop string until that is decided.

    Args:
        tokenizer: decodes the tokens.
        prompt_token_ids: tokens of the prompt; without them the first text token loses its leading space.
        stop: strings that end the text.
        min_tokens: number of tokens within which no stop string ends the text; one that begins there may end
            after them.
        include_stop: the text ends with the stop string instead of before it.
        skip_special_tokens: leave out control tokens.
        shown: control tokens that are not left out.

    Attributes:
        stopped: whether a stop string was found.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        shown: Collection[int] = (),
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_token_ids=prompt_token_ids, skip_special_tokens=skip_special_tokens, shown=shown
        )
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self._early = 0  # characters of the held text that came within min_tokens
        self._early_tokens = min_tokens
        self._parts: list[str] = []  # of a text of 131,072 tokens, adding one to the text copied 0.15 ms
        self._length = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is now certain."""
        self._early_tokens -= 1
        return self._release(self._detokenizer.push(token), last=False)

    @property
    def text(self) -> str:
        """The text returned so far."""
        self._parts[:] = ["".join(self._parts)]
        return self._parts[0]

    @property
    def start(self) -> int:
        """Offset of the last token pushed, characters of the text."""
        return min(self._detokenizer.start, self._length) if self.stopped else self._detokenizer.start

    @property
    def end(self) -> int:
        """Length of the text, including what is held back, characters."""
        return self._length + len(self._held)

    def flush(self) -> str:
        """Returns the text that was held back; call it when the request has ended."""
        return self._release(self._detokenizer.flush(), last=True)

    def _release(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        if self._early_tokens >= 0:
            self._early = len(self._held)
        met = [(at, at + len(stop)) for stop in self._stop if (at := self._find(stop)) >= 0]
        if met:
            before, after = min(met)
            out, self._held, self.stopped = self._held[: after if self._include_stop else before], "", True
        else:
            keep = 0 if last else self._possible_stop()
            cut = len(self._held) - keep
            out, self._held = self._held[:cut], self._held[cut:]
            self._early = max(0, self._early - cut)
        self._parts.append(out)
        self._length += len(out)
        return out

    def _find(self, stop: str) -> int:
        """Returns where the held text has a stop string that ends after the early characters, or -1."""
        return self._held.find(stop, max(0, self._early - len(stop) + 1))

    def _possible_stop(self) -> int:
        """Returns the length of the longest suffix of the held text that is a prefix of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
