"""Reads an answer while it is written: what parsers of tool calls and of reasoning are made of.

A parser is a generator over one text. It says what it wants next (`yield from self.until(...)`), is left
waiting where the text has not come that far, and goes on when it has. It decides nothing that more text could
change, so what it gives does not depend on where the text was cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Parsing = Generator[None, None, T]  # yields where it needs more text


@dataclass(frozen=True)
class ParsedDelta:
    """A part of an answer: text, reasoning, or a part of a call.

    Attributes:
        text: of the answer or the reasoning; or of the call's arguments.
        call: number of the call; ``None`` for text.
        name: the function's, with the first piece of a call.
        reasoning: it is what the model thinks before it answers.
    """

    text: str
    call: int | None = None
    name: str | None = None
    reasoning: bool = False


class Malformed(Exception):
    """The text is not what it began as."""


class Reader:
    """A parser of one answer; subclasses say how in :meth:`read`."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0  # what is before it has been read
        self._back: int | None = None  # where to go back to, should it turn out malformed
        self._ended = False
        self._out: list[ParsedDelta] = []
        self._reading: Generator[None, None, None] | None = None

    def push(self, text: str) -> list[ParsedDelta]:
        """Takes more of the answer; returns what is now certain."""
        self._text += text
        if text or self._ended:
            self._reading = self._reading or self.read()
            next(self._reading, None)
        if self._back is None and self._at > 4096:  # lets go of what has been read
            self._text, self._at = self._text[self._at :], 0
        return self._given()

    def flush(self) -> list[ParsedDelta]:
        """Ends the answer; returns what was held back."""
        self._ended = True
        return self.push("")

    def read(self) -> Parsing[None]:
        """Reads the whole answer."""
        raise NotImplementedError

    def give(self, piece: ParsedDelta) -> None:
        """Adds to the parsed answer."""
        self._out.append(piece)

    def _given(self) -> list[ParsedDelta]:
        """What was given, neighbours of a kind joined."""
        pieces: list[ParsedDelta] = []
        for piece in self._out:
            last = pieces[-1] if pieces else None
            if last and piece.name is None and (last.call, last.reasoning) == (piece.call, piece.reasoning):
                pieces[-1] = ParsedDelta(last.text + piece.text, last.call, last.name, last.reasoning)
            else:
                pieces.append(piece)
        self._out = []
        return [piece for piece in pieces if piece.text or piece.name is not None]

    # --- steps

    def more(self) -> Parsing[bool]:
        """Waits for text that has not been read; False at the end of the answer."""
        while self._at == len(self._text):
            if self._ended:
                return False
            yield
        return True

    def follows(self, *literals: str) -> Parsing[str | None]:
        """Which of some literals comes next, the longest where several do; reads nothing."""
        while True:
            rest = self._text[self._at : self._at + max(map(len, literals))]
            undecided = any(len(rest) < len(one) and one.startswith(rest) for one in literals)
            if not undecided or self._ended:
                return max((one for one in literals if rest.startswith(one)), key=len, default=None)
            yield

    def accept(self, *literals: str) -> Parsing[bool]:
        """Reads one of some literals if it comes next."""
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
        """Reads as many characters as a pattern of single characters (``[...]+``) takes."""
        parts = []
        while (yield from self.more()) and (match := pattern.match(self._text, self._at)):
            self._at = match.end()
            parts.append(match[0])
            if emit:
                emit(match[0])
        return "".join(parts)

    def until(self, marks: Sequence[str], emit: Callable[[str], None]) -> Parsing[str | None]:
        """Reads up to and with the first of some marks; what comes before it is handed on as it comes.

        Returns:
            The mark, the longest where several begin at one place; ``None`` at the end of the answer.
        """
        first = re.compile("|".join(sorted({re.escape(mark[0]) for mark in marks})))
        while (yield from self.more()):
            match = first.search(self._text, self._at)
            cut = match.start() if match else len(self._text)
            if cut > self._at:
                emit(self._text[self._at : cut])
                self._at = cut
            elif mark := (yield from self.follows(*marks)):
                self._at += len(mark)
                return mark
            else:
                emit(self._text[self._at])
                self._at += 1
        return None

    def attempt(self, reading: Parsing[None]) -> Parsing[bool]:
        """Tries to read something.

        Returns:
            False where it is malformed: then nothing of it has been read, unless it was committed to before.
        """
        self._back = self._at
        try:
            yield from reading
        except Malformed:
            back = self._take_back()
            self._at = self._at if back is None else back
            return back is None
        self._take_back()
        return True

    def _take_back(self) -> int | None:
        back, self._back = self._back, None
        return back

    def commit(self) -> None:
        """What is being attempted is it, even if it goes on badly."""
        self._back = None

    # --- JSON

    def json_string(self) -> Parsing[str]:
        """Reads a string of JSON.

        Raises:
            Malformed: it is none.
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
            if not (yield from self.more()):  # what a backslash hides is the next character
                raise Malformed
            parts.append(self._text[self._at])
            self._at += 1
        try:
            value: str = json.loads("".join(parts), strict=False)
        except ValueError as error:
            raise Malformed from error
        return value

    def json_value(self, emit: Callable[[str], None]) -> Parsing[None]:
        """Reads any value of JSON, and hands it on as it comes; of what is broken, all that is balanced.

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
