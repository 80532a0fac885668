"""Parses Harmony, the format of gpt-oss: a response is several messages, each on a channel.

``<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>``: the
analysis is reasoning; ``final`` and remarks on ``commentary`` are the text; a message with a recipient
(``to=functions.NAME``) is a tool call.
"""

from __future__ import annotations

import re

from tpjax.server.parsing.incremental import Malformed, ParsedDelta, Parsing
from tpjax.server.parsing.reasoning import trimmed
from tpjax.server.parsing.tool_call_parser import ToolCallParser

START, END, MESSAGE, CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"
CONSTRAIN, RETURN, CALL = "<|constrain|>", "<|return|>", "<|call|>"
MARKS = (START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALL)
STOPS = (RETURN, CALL)  # a response ends with either

_ENDS = (END, RETURN, CALL, START)
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([a-zA-Z0-9_.-]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*([a-z]+)")


class HarmonyParser(ToolCallParser):
    """Separates reasoning, text and tool calls."""

    def read(self) -> Parsing[None]:
        """Reads one message after the other."""
        reasoned = False  # there has been reasoning
        while (yield from self.more()):
            yield from self.accept(START)
            yield from self.accept("assistant")
            if (yield from self.follows(CHANNEL, " to=", "to=", MESSAGE)) is None:
                yield from self.until((*_ENDS, CHANNEL), self._text_piece)  # text outside the format
                continue
            header: list[str] = []
            if (yield from self.until((MESSAGE, *_ENDS), header.append)) != MESSAGE:
                if not "".join(header).startswith(CHANNEL) or not self._ended:
                    self._text_piece("".join(header))
                continue
            channel = _CHANNEL.search("".join(header))
            recipient = _RECIPIENT.search("".join(header))
            if recipient and (yield from self.attempt(self._call(recipient[1]))):
                continue
            if channel and channel[1] == "analysis":
                if reasoned:
                    self.emit(ParsedDelta("\n", reasoning=True))
                reasoned = True
                yield from self.until(
                    _ENDS, trimmed(lambda text: self.emit(ParsedDelta(text, reasoning=True)))
                )
            else:
                yield from self.until(_ENDS, self._text_piece)
        self.emit(ParsedDelta(self._pending_space))

    def _call(self, name: str) -> Parsing[None]:
        yield from self.spaces()
        if (yield from self.follows("{")):
            if not (yield from self.ahead(self.object_begins())):
                raise Malformed
            self.begin_call(name)
            yield from self.until(_ENDS, trimmed(self.append_arguments))
        elif (yield from self.accept(*_ENDS)) or not (yield from self.more()):
            self.complete_call(name, {})  # an empty message has no arguments
        else:
            raise Malformed
