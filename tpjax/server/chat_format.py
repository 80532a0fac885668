"""How one model converses: what its chat template takes, how it writes calls and reasoning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tpjax.server.parsing.harmony import HarmonyParser
from tpjax.server.parsing.incremental import ParsedDelta
from tpjax.server.parsing.reasoning import ReasoningFormat, ReasoningParser, reasoning_format
from tpjax.server.parsing.tool_call_formats import HARMONY, ToolCallFormat, tool_call_format
from tpjax.server.parsing.tool_call_parser import Schemas, ToolCallParser
from tpjax.server.template_traits import Render, Traits, traits_of
from tpjax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatFormat:
    """How a model converses whose chat template this is.

    Attributes:
        traits: what the template takes.
        calls: how the model writes calls.
        reasoning: how it reasons; ``None`` where it does not, or in the way of its calls (harmony).
        special: its special tokens by their text.
    """

    traits: Traits
    calls: ToolCallFormat
    reasoning: ReasoningFormat | None
    special: Mapping[str, int]

    @classmethod
    async def of(cls, source: str, tokenizer: Tokenizer, render: Render, *, with_tools: bool) -> ChatFormat:
        """Finds out about a template; see :func:`traits_of`."""
        traits = await traits_of(render, source, with_tools=with_tools)
        texts = {i: tokenizer.token_bytes(i).decode("utf-8", "replace") for i in tokenizer.special_ids}
        special = {text: i for i, text in texts.items() if text}
        return cls(traits, tool_call_format(source), reasoning_format(source), special)

    @property
    def reasons(self) -> bool:
        """Whether an answer may hold reasoning."""
        return self.reasoning is not None or self.calls is HARMONY

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, besides the model's own."""
        return tuple(self.special[text] for text in self.calls.stops if text in self.special)

    def shown_ids(self, *, with_calls: bool) -> frozenset[int]:
        """Special tokens that the readers need to see."""
        marks = list(self.reasoning.marks) if self.reasoning else []
        if with_calls or self.calls is HARMONY:
            marks += self.calls.marks
        return frozenset(self.special[mark] for mark in marks if mark in self.special)

    def inside(self, tokenizer: Tokenizer | None, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends where the model goes on with its reasoning."""
        if self.reasoning is None or tokenizer is None:
            return False
        tail = tokenizer.decode(prompt[-32:], skip_special_tokens=False)
        return tail.rstrip().endswith(self.reasoning.opens.rstrip())

    def reader(self, tools: Schemas | None, *, inside: bool) -> ResponseParser | None:
        """What reads an answer; ``None`` where all of it is text.

        Args:
            tools: schemas of the tools' parameters; ``None``: none are offered.
            inside: the prompt ends inside the reasoning.
        """
        if tools is None and not self.reasons:
            return None
        reasoning = ReasoningParser(self.reasoning, inside=inside) if self.reasoning else None
        if self.calls is HARMONY:
            return ResponseParser(None, HarmonyParser(tools))
        return ResponseParser(reasoning, None if tools is None else self.calls.reader(tools))


class ResponseParser:
    """Tells reasoning, text and calls apart, as the answer comes.

    Args:
        reasoning: reads the reasoning at its beginning.
        calls: reads the calls in the rest.
    """

    def __init__(self, reasoning: ReasoningParser | None, calls: ToolCallParser | None) -> None:
        self._reasoning = reasoning
        self._calls = calls

    @property
    def called(self) -> bool:
        """Whether there has been a call."""
        return self._calls is not None and self._calls.calls > 0

    def push(self, text: str) -> list[ParsedDelta]:
        """Takes more of the answer; returns what is now certain."""
        return self._passed_on(self._reasoning.push(text) if self._reasoning else [ParsedDelta(text)])

    def flush(self) -> list[ParsedDelta]:
        """Ends the answer; returns what was held back."""
        pieces = self._passed_on(self._reasoning.flush() if self._reasoning else [])
        return pieces + (self._calls.flush() if self._calls else [])

    def _passed_on(self, pieces: Sequence[ParsedDelta]) -> list[ParsedDelta]:
        found: list[ParsedDelta] = []
        for piece in pieces:
            found += [piece] if piece.reasoning or self._calls is None else self._calls.push(piece.text)
        return [piece for piece in found if piece.text or piece.name is not None]
