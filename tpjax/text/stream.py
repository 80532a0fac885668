"""Generated tokens to text, as they come: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tpjax.text.tokenizer import IncrementalDetokenizer, Tokenizer


class TextStream:
    """The text of one request.

    Text that might be the beginning of a stop string is held back until it is certain.

    Args:
        tokenizer: of the model.
        prompt_ids: the prompt's tokens; they decide about a leading space.
        stop: strings that end the text.
        include_stop: the text ends with the stop string, and not before it.
        skip_special_tokens: control tokens show nothing.
        shown: control tokens that are shown all the same.

    Attributes:
        text: everything given out so far.
        stopped: whether a stop string was met.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        shown: Collection[int] = (),
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_ids=prompt_ids, skip_special_tokens=skip_special_tokens, shown=shown
        )
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is now certain."""
        return self._release(self._detokenizer.push(token), last=False)

    @property
    def start(self) -> int:
        """Where the last token pushed begins, characters of the text."""
        return min(self._detokenizer.start, len(self.text)) if self.stopped else self._detokenizer.start

    @property
    def end(self) -> int:
        """Length of the text, what is held back included, characters."""
        return len(self.text) + len(self._held)

    def flush(self) -> str:
        """Returns what was held back; call it when the request has ended."""
        return self._release(self._detokenizer.flush(), last=True)

    def _release(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        met = [(at, at + len(stop)) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if met:
            before, after = min(met)
            out, self._held, self.stopped = self._held[: after if self._include_stop else before], "", True
        else:
            keep = 0 if last else self._possible_stop()
            cut = len(self._held) - keep
            out, self._held = self._held[:cut], self._held[cut:]
        self.text += out
        return out

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
