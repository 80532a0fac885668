"""What a model thinks before it answers, told from the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tpjax.server.parsing.incremental import ParsedDelta, Parsing, Reader


@dataclass(frozen=True)
class ReasoningFormat:
    """The marks a model puts round its reasoning.

    Attributes:
        opens: before it; a template may have written it already.
        closes: after it.
    """

    opens: str
    closes: str

    @property
    def marks(self) -> tuple[str, ...]:
        """What has to be visible in the text."""
        return (self.opens.removesuffix("thought\n"), self.closes)


# By what stands in a template, the more particular first.
_FORMATS = (
    ReasoningFormat("[THINK]", "[/THINK]"),  # Magistral, Ministral
    ReasoningFormat("<|START_THINKING|>", "<|END_THINKING|>"),  # Command R7B, Command A
    ReasoningFormat("<seed:think>", "</seed:think>"),
    ReasoningFormat("<|channel>thought\n", "<channel|>"),  # Gemma 4
    ReasoningFormat("<think>", "</think>"),  # Qwen3, QwQ, DeepSeek R1, SmolLM3, GLM, Granite, ...
)


def reasoning_format(source: str) -> ReasoningFormat | None:
    """How a model reasons whose chat template this is; ``None`` where the template knows nothing of it."""
    return next((one for one in _FORMATS if one.closes in source), None)


class ReasoningParser(Reader):
    """Tells reasoning from what follows it; white space round either is neither's.

    Args:
        form: the marks.
        inside: the prompt ends inside the reasoning: only its end is still to come.
    """

    def __init__(self, form: ReasoningFormat, *, inside: bool) -> None:
        super().__init__()
        self._form = form
        self._inside = inside

    def read(self) -> Parsing[None]:
        """Reasoning, if there is any, and the rest."""
        start = self._at
        yield from self.spaces()
        if (yield from self.accept(self._form.opens)) or self._inside:
            emit = trimmed(lambda text: self.give(ParsedDelta(text, reasoning=True)))
            yield from self.until((self._form.closes,), emit)
            yield from self.spaces()
        else:
            self._at = start
        while (yield from self.more()):
            self.give(ParsedDelta(self._text[self._at :]))
            self._at = len(self._text)


def trimmed(emit: Callable[[str], None]) -> Callable[[str], None]:
    """Hands text on without the white space at its beginning and its end."""
    begun, held = False, ""

    def take(text: str) -> None:
        nonlocal begun, held
        text = held + text
        if not begun:
            text = text.lstrip()
        kept = text.rstrip()
        held = text[len(kept) :] if begun or kept else ""
        begun = begun or bool(kept)
        if kept:
            emit(kept)

    return take
