"""Incremental parsing of a response while it is generated: the base of the reasoning and tool-call parsers.

A parser is a generator over one text. It asks for what it expects next (``yield from self.until(...)``),
pauses at the end of the text so far, and resumes when there is more. It decides nothing that more text could
change, so its output does not depend on how the text was split into deltas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

# Most text of a response that failed attempts may read again, characters: a tenth of a second or two.
# Each of thousands of marks may start an attempt that reads to the end of the response.
MAX_REREAD = 128 << 10

T = TypeVar("T")
Parsing = Generator[None, None, T]  # yields when it needs more text


@dataclass(frozen=True)
class ParsedDelta:
    """A part of a response: text, reasoning, or a part of a tool call.

    Attributes:
        text: text of the response, of the reasoning, or of the call's arguments.
        call: number of the call; ``None`` for text and reasoning.
        name: name of the function, in the first part of a call.
        reasoning: the text is reasoning.
    """

    text: str
    call: int | None = None
    name: str | None = None
    reasoning: bool = False


class Malformed(Exception):
    """The text turned out not to be what a parser attempted to read."""


class IncrementalParser:
    """A parser of one response; subclasses implement :meth:`read`."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0  # position of the next character to read
        self._back: int | None = None  # position to return to if an attempt is malformed
        self._reread = 0  # characters that failed attempts have gone back over
        self._ended = False
        self._output: list[ParsedDelta] = []
        self._reading: Generator[None, None, None] | None = None

    def push(self, text: str) -> list[ParsedDelta]:
        """Adds text of the response; returns what is now certain."""
        self._text += text
        if text or self._ended:
            self._reading = self._reading or self.read()
            next(self._reading, None)
        if self._back is None and self._at > 4096:  # drops the text that has been read
            self._text, self._at = self._text[self._at :], 0
        return self._merged_output()

    def flush(self) -> list[ParsedDelta]:
        """Ends the response; returns what was held back."""
        self._ended = True
        return self.push("")

    def read(self) -> Parsing[None]:
        """Reads the whole response."""
        raise NotImplementedError

    def emit(self, part: ParsedDelta) -> None:
        """Adds a part to the output."""
        self._output.append(part)

    def _merged_output(self) -> list[ParsedDelta]:
        """Returns the output, adjacent parts of a kind joined, and clears it."""
        groups: list[list[ParsedDelta]] = []
        for piece in self._output:
            first = groups[-1][0] if groups else None
            if (
                first
                and piece.name is None
                and (first.call, first.reasoning) == (piece.call, piece.reasoning)
            ):
                groups[-1].append(piece)
            else:
                groups.append([piece])
        self._output = []
        pieces = [replace(group[0], text="".join(one.text for one in group)) for group in groups]
        return [piece for piece in pieces if piece.text or piece.name is not None]

    # --- steps

    def more(self) -> Parsing[bool]:
        """Waits for unread text; returns False at the end of the response."""
        while self._at == len(self._text):
            if self._ended:
                return False
            yield
        return True

    def follows(self, *literals: str) -> Parsing[str | None]:
        """Returns the longest of some literals that comes next, without reading it."""
        while True:
            rest = self._text[self._at : self._at + max(map(len, literals))]
            undecided = any(len(rest) < len(one) and one.startswith(rest) for one in literals)
            if not undecided or self._ended:
                return max((one for one in literals if rest.startswith(one)), key=len, default=None)
            yield

    def accept(self, *literals: str) -> Parsing[bool]:
        """Reads one of some literals if it comes next; returns whether it did."""
        found = yield from self.follows(*literals)
        self._at += len(found or "")
        return found is not None

    def expect(self, *literals: str) -> Parsing[None]:
        """Reads one of some literals.

        Raises:
            Malformed: something else comes next.
        """
        if not (yield from self.accept(*literals)):
            raise Malformed

    def spaces(self) -> Parsing[None]:
        """Reads white space."""
        while (yield from self.more()) and self._text[self._at].isspace():
            self._at += 1

    def run(self, pattern: re.Pattern[str], emit: Callable[[str], None] | None = None) -> Parsing[str]:
        """Reads as many characters as a pattern of single characters (``[...]+``) matches."""
        parts = []
        while (yield from self.more()) and (match := pattern.match(self._text, self._at)):
            self._at = match.end()
            parts.append(match[0])
            if emit:
                emit(match[0])
        return "".join(parts)

    def until(self, marks: Sequence[str], emit: Callable[[str], None]) -> Parsing[str | None]:
        """Reads up to and including the first of some marks; passes the text before it to ``emit``.

        Returns:
            The mark, the longest if several start at one position; ``None`` at the end of the response.
        """
        first = re.compile("|".join(sorted({re.escape(mark[0]) for mark in marks})))
        while (yield from self.more()):
            match = first.search(self._text, self._at)
            end = match.start() if match else len(self._text)
            if end > self._at:
                emit(self._text[self._at : end])
                self._at = end
            elif mark := (yield from self.follows(*marks)):
                self._at += len(mark)
                return mark
            else:
                emit(self._text[self._at])
                self._at += 1
        return None

    def attempt(self, reading: Parsing[None]) -> Parsing[bool]:
        """Runs a parser that may fail.

        Returns:
            False if the text is malformed, or ``MAX_REREAD`` is used up; the position is then where it was.
            True also if it is malformed after :meth:`commit`.
        """
        if self._reread > MAX_REREAD:
            reading.close()
            return False
        self._back = self._at
        try:
            yield from reading
        except Malformed:
            back = self._take_back()
            if back is None:
                return True
            self._reread += self._at - back
            self._at = back
            return False
        self._take_back()
        return True

    def ahead(self, reading: Parsing[T]) -> Parsing[T]:
        """Runs a parser that must not commit, and returns to the position before it."""
        at, outer = self._at, self._back
        self._back = at if outer is None else outer  # until then no text is dropped
        try:
            return (yield from reading)
        finally:
            self._at, self._back = at, outer

    def _take_back(self) -> int | None:
        back, self._back = self._back, None
        return back

    def commit(self) -> None:
        """Commits the current attempt: it keeps what it has read even if the rest is malformed."""
        self._back = None

    # --- JSON

    def json_string(self) -> Parsing[str]:
        """Reads a JSON string.

        Raises:
            Malformed: no valid string comes next.
        """
        yield from self.expect('"')
        parts = ['"']
        while True:
            yield from self.run(_PLAIN, parts.append)
            if not (yield from self.more()):
                raise Malformed
            char = self._text[self._at]
            self._at += 1
            parts.append(char)
            if char == '"':
                break
            if not (yield from self.more()):  # the character after a backslash
                raise Malformed
            parts.append(self._text[self._at])
            self._at += 1
        try:
            value: str = json.loads("".join(parts), strict=False)
        except ValueError as error:
            raise Malformed from error
        return value

    def json_value(self, emit: Callable[[str], None]) -> Parsing[None]:
        """Reads any JSON value and passes it to ``emit``; of an invalid value, all that is balanced.

        Raises:
            Malformed: no value comes next.
        """
        if not (yield from self.more()):
            raise Malformed
        if self._text[self._at] not in '{["':
            if not (yield from self.run(_SCALAR, emit)):
                raise Malformed
            return
        depth, quoted = 0, False
        while (yield from self.more()):
            yield from self.run(_QUOTED if quoted else _UNQUOTED, emit)
            if not (yield from self.more()):
                return
            char = self._text[self._at]
            self._at += 1
            if quoted and char == "\\":
                emit(char)
                if (yield from self.more()):
                    emit(self._text[self._at])
                    self._at += 1
                continue
            emit(char)
            if char == '"':
                quoted = not quoted
            elif not quoted:
                depth += 1 if char in "{[" else -1
            if depth <= 0 and not quoted:
                return


_PLAIN = re.compile(r'[^"\\]+')
_QUOTED = _PLAIN
_UNQUOTED = re.compile(r'[^"{}\[\]]+')
_SCALAR = re.compile(r"[\w.+-]+")
