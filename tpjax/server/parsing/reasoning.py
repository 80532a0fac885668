"""Separates the reasoning of a model from its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tpjax.server.parsing.incremental import IncrementalParser, ParsedDelta, Parsing


@dataclass(frozen=True)
class ReasoningFormat:
    """The marks round a model's reasoning.

    Attributes:
        opens: mark before it; the chat template may have written it already.
        closes: mark after it.
    """

    opens: str
    closes: str

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens that have to be visible in the text."""
        return (self.opens.removesuffix("thought\n"), self.closes)


# Found by the closing mark in a template's source, the more specific first.
_FORMATS = (
    ReasoningFormat("[THINK]", "[/THINK]"),  # Magistral, Ministral
    ReasoningFormat("<|START_THINKING|>", "<|END_THINKING|>"),  # Command R7B, Command A
    ReasoningFormat("<seed:think>", "</seed:think>"),
    ReasoningFormat("<|channel>thought\n", "<channel|>"),  # Gemma 4
    ReasoningFormat("<think>", "</think>"),  # Qwen3, QwQ, DeepSeek R1, SmolLM3, GLM, Granite, ...
)


def reasoning_format(source: str) -> ReasoningFormat | None:
    """Returns the reasoning format of a chat template; ``None`` if its source has no closing mark."""
    return next((one for one in _FORMATS if one.closes in source), None)


class ReasoningParser(IncrementalParser):
    """Separates reasoning from the rest; drops the white space round the reasoning.

    Args:
        form: the marks.
        inside: the prompt ends inside the reasoning, so only the closing mark is to come.
    """

    def __init__(self, form: ReasoningFormat, *, inside: bool) -> None:
        super().__init__()
        self._form = form
        self._inside = inside

    def read(self) -> Parsing[None]:
        """Reads the reasoning, if there is any, and the rest."""
        if (yield from self.attempt(self._opening())) or self._inside:
            emit = trimmed(lambda text: self.emit(ParsedDelta(text, reasoning=True)))
            yield from self.until((self._form.closes,), emit)
            yield from self.spaces()
        while (yield from self.more()):
            self.emit(ParsedDelta(self._text[self._at :]))
            self._at = len(self._text)

    def _opening(self) -> Parsing[None]:
        yield from self.spaces()
        yield from self.expect(self._form.opens)


def trimmed(emit: Callable[[str], None]) -> Callable[[str], None]:
    """Returns a function that passes text to ``emit`` without leading and trailing white space."""
    begun, held = False, ""

    def push(text: str) -> None:
        nonlocal begun, held
        text = held + text
        if not begun:
            text = text.lstrip()
        kept = text.rstrip()
        held = text[len(kept) :] if begun or kept else ""
        begun = begun or bool(kept)
        if kept:
            emit(kept)

    return push
