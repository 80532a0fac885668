"""The chat format of a model: what its chat template accepts, how it writes tool calls and reasoning."""

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
    """The chat format of one template.

    Attributes:
        traits: what the template accepts.
        tool_calls: how the model writes tool calls.
        reasoning: the marks round its reasoning; ``None`` if it has none, or its tool-call format includes it
            (harmony).
        special: text -> id of the special tokens.
    """

    traits: Traits
    tool_calls: ToolCallFormat
    reasoning: ReasoningFormat | None
    special: Mapping[str, int]

    @classmethod
    async def of(cls, source: str, tokenizer: Tokenizer, render: Render, *, with_tools: bool) -> ChatFormat:
        """Probes a template; see :func:`traits_of`."""
        traits = await traits_of(render, source, with_tools=with_tools)
        texts = {i: tokenizer.token_bytes(i).decode("utf-8", "replace") for i in tokenizer.special_ids}
        special = {text: i for i, text in texts.items() if text}
        return cls(traits, tool_call_format(source), reasoning_format(source), special)

    @property
    def reasons(self) -> bool:
        """Whether a response may hold reasoning."""
        return self.reasoning is not None or self.tool_calls is HARMONY

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response, besides the model's EOS."""
        return tuple(self.special[text] for text in self.tool_calls.stops if text in self.special)

    def shown_ids(self, *, with_calls: bool) -> frozenset[int]:
        """Returns the special tokens that have to be visible to the parsers."""
        marks = list(self.reasoning.marks) if self.reasoning else []
        if with_calls or self.tool_calls is HARMONY:
            marks += self.tool_calls.marks
        return frozenset(self.special[mark] for mark in marks if mark in self.special)

    def inside_reasoning(self, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int]) -> bool:
        """Returns whether a prompt ends inside the model's reasoning."""
        if self.reasoning is None or tokenizer is None:
            return False
        tail = tokenizer.decode(prompt_token_ids[-32:], skip_special_tokens=False)
        return tail.rstrip().endswith(self.reasoning.opens.rstrip())

    def parser(self, tools: Schemas | None, *, inside: bool) -> ResponseParser | None:
        """Returns a parser of one response; ``None`` if all of it is text.

        Args:
            tools: schemas of the tools' parameters; ``None``: no tools are offered.
            inside: the prompt ends inside the reasoning.
        """
        if tools is None and not self.reasons:
            return None
        reasoning = ReasoningParser(self.reasoning, inside=inside) if self.reasoning else None
        if self.tool_calls is HARMONY:
            return ResponseParser(None, HarmonyParser(tools))
        return ResponseParser(reasoning, None if tools is None else self.tool_calls.parser(tools))


class ResponseParser:
    """Separates reasoning, text and tool calls while a response is generated.

    Args:
        reasoning: parses the reasoning at the start.
        calls: parses the tool calls in the rest.
    """

    def __init__(self, reasoning: ReasoningParser | None, calls: ToolCallParser | None) -> None:
        self._reasoning = reasoning
        self._calls = calls

    @property
    def called(self) -> bool:
        """Whether there has been a tool call."""
        return self._calls is not None and self._calls.calls > 0

    def push(self, text: str) -> list[ParsedDelta]:
        """Adds text of the response; returns what is now certain."""
        return self._passed_on(self._reasoning.push(text) if self._reasoning else [ParsedDelta(text)])

    def flush(self) -> list[ParsedDelta]:
        """Ends the response; returns what was held back."""
        parts = self._passed_on(self._reasoning.flush() if self._reasoning else [])
        return parts + (self._calls.flush() if self._calls else [])

    def _passed_on(self, parts: Sequence[ParsedDelta]) -> list[ParsedDelta]:
        found: list[ParsedDelta] = []
        for part in parts:
            found += [part] if part.reasoning or self._calls is None else self._calls.push(part.text)
        return [part for part in found if part.text or part.name is not None]
