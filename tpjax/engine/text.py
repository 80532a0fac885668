"""Generated tokens to text, as they come: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tpjax.tokenizer import IncrementalDetokenizer, Tokenizer


class TextStream:
    """The text of one request.

    Text that might be the beginning of a stop string is held back until it is certain.

    Args:
        tokenizer: of the model.
        prompt_ids: the prompt's tokens; they decide about a leading space.
        stop: strings that end the text.
        min_tokens: tokens within which none does; one that begins there may end after them.

    Attributes:
        text: everything given out so far.
        stopped: whether a stop string was met; the text ends before it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids=prompt_ids)
        self._stop = tuple(stop)
        self._held = ""
        self._early = 0  # characters of the held text that came within min_tokens
        self._early_tokens = min_tokens
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is now certain."""
        self._early_tokens -= 1
        return self._release(self._detokenizer.push(token), last=False)

    def flush(self) -> str:
        """Returns what was held back; call it when the request has ended."""
        return self._release(self._detokenizer.flush(), last=True)

    def _release(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        if self._early_tokens >= 0:
            self._early = len(self._held)
        met = [at for at in map(self._find, self._stop) if at >= 0]
        if met:
            out, self._held, self.stopped = self._held[: min(met)], "", True
        else:
            keep = 0 if last else self._possible_stop()
            cut = len(self._held) - keep
            out, self._held = self._held[:cut], self._held[cut:]
            self._early = max(0, self._early - cut)
        self.text += out
        return out

    def _find(self, stop: str) -> int:
        """Where a stop string is met in the held text, or -1: it has to end after the early characters."""
        return self._held.find(stop, max(0, self._early - len(stop) + 1))

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
