"""Text from tokens as they come: stop strings across token borders, nothing shown too early."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tpjax.text.stream import TextStream
from tpjax.text.tokenizer import Tokenizer


class Pieces:
    """A tokenizer backend whose tokens are given byte strings."""

    def __init__(self, pieces: Sequence[bytes], *, strips_leading_space: bool = False) -> None:
        self.pieces = list(pieces)
        self.vocab_size = len(self.pieces)
        self.strips_leading_space = strips_leading_space

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id] if token_id < len(self.pieces) else b""


def tokenizer(pieces: Sequence[bytes], *, strips: bool = False, special: Sequence[int] = ()) -> Tokenizer:
    backend = Pieces(pieces, strips_leading_space=strips)
    return Tokenizer(backend, roles={}, special_ids=special, chat_templates={})


def stream_of(parts: Sequence[str | bytes], stop: Sequence[str] = ()) -> tuple[TextStream, list[str]]:
    """Feeds one token a part; returns the stream and the delta of each token, the flush last."""
    pieces = [part.encode() if isinstance(part, str) else part for part in parts]
    stream = TextStream(tokenizer(pieces), [], stop)
    deltas = [stream.push(token) for token in range(len(pieces))]
    return stream, [*deltas, stream.flush()]


def test_without_stop_strings_text_comes_at_once() -> None:
    stream, deltas = stream_of(["The", " cat", " sat"])
    assert deltas == ["The", " cat", " sat", ""]
    assert (stream.text, stream.stopped) == ("The cat sat", False)


def test_stop_string_in_one_token() -> None:
    stream, deltas = stream_of(["one ", "two END three", " four"], ["END"])
    assert deltas == ["one ", "two ", "", ""]
    assert (stream.text, stream.stopped) == ("one two ", True)


def test_stop_string_across_tokens_is_held_back() -> None:
    stream, deltas = stream_of(["a E", "N", "D b"], ["END"])
    assert deltas == ["a ", "", "", ""]
    assert (stream.text, stream.stopped) == ("a ", True)


def test_false_start_comes_out_when_it_is_certain() -> None:
    stream, deltas = stream_of(["a E", "N", "T", "ER"], ["END"])
    assert deltas == ["a ", "", "ENT", "ER", ""]
    assert (stream.text, stream.stopped) == ("a ENTER", False)


def test_false_start_that_holds_a_true_one() -> None:
    """After "aab" fails at the second a of "aaab", the match goes on from the next a, not from scratch."""
    stream, deltas = stream_of(["a", "a", "a", "b", "c"], ["aab"])
    assert deltas == ["", "", "a", "", "", ""]
    assert (stream.text, stream.stopped) == ("a", True)


def test_flush_gives_what_was_held_back() -> None:
    stream, deltas = stream_of(["x\n", "\n"], ["\n\n\n"])
    assert deltas == ["x", "", "\n\n"]
    assert (stream.text, stream.stopped) == ("x\n\n", False)


def test_several_stops_the_earliest_wins() -> None:
    stream, _ = stream_of(["a b c d"], ["d", "b"])
    assert stream.text == "a "
    stream, _ = stream_of(["xxabcdyy"], ["cd", "abcd", "bc"])
    assert stream.text == "xx"


def test_stop_at_the_very_beginning() -> None:
    stream, deltas = stream_of(["END"], ["END"])
    assert (deltas, stream.text, stream.stopped) == (["", ""], "", True)


def test_nothing_after_a_stop() -> None:
    stream, deltas = stream_of(["END", "more", "END"], ["END"])
    assert deltas == ["", "", "", ""]
    assert stream.flush() == "" and stream.text == ""


def test_stop_found_by_the_flush() -> None:
    """An incomplete character becomes U+FFFD only at the end, and may itself be the stop string."""
    stream, deltas = stream_of(["a", b"\xe2\x82"], ["�"])
    assert deltas == ["a", "", ""]
    assert (stream.text, stream.stopped) == ("a", True)


def test_characters_are_never_split() -> None:
    """A four-byte character a byte at a time, the euro sign as a stop string across tokens."""
    stream, deltas = stream_of([b"\xf0", b"\x9f", b"\x99", b"\x82!", b"\xe2", b"\x82\xac", b"z"], ["€"])
    assert deltas == ["", "", "", "🙂!", "", "", "", ""]
    assert (stream.text, stream.stopped) == ("🙂!", True)


def test_special_tokens_are_no_text() -> None:
    stream = TextStream(tokenizer([b"<eos>", b"a"], special=[0]), [], ["<"])
    assert [stream.push(1), stream.push(0), stream.push(1), stream.flush()] == ["a", "", "a", ""]


@pytest.mark.parametrize(("prompt", "expected"), (([], "a a"), ([1], " a a")))
def test_leading_space_depends_on_the_prompt(prompt: list[int], expected: str) -> None:
    stream = TextStream(tokenizer([b" a", b"b"], strips=True), prompt)
    assert stream.push(0) + stream.push(0) + stream.flush() == expected == stream.text


def test_beyond_the_vocabulary_is_no_text() -> None:
    stream = TextStream(tokenizer([b"a"]), [])
    assert [stream.push(5), stream.push(0), stream.flush()] == ["", "a", ""]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([b"a", b" a", b"\xc3", b"\xa9", b"\xf0", b"\x9f\x99", b"\x82", b"", b"\xff"]))
)
def test_where_each_token_begins(pieces: list[bytes]) -> None:
    """By the definition: the character that holds a token's first byte, each invalid one being U+FFFD."""
    stream = TextStream(tokenizer(pieces), [])
    starts = []
    for token in range(len(pieces)):
        stream.push(token)
        starts.append(stream.start)
    stream.flush()
    for at, start in enumerate(starts):
        before, after = b"".join(pieces[:at]), b"".join(pieces[at:])
        if not pieces[at]:
            assert start <= len(stream.text)
            continue
        # as many characters end before the token as are in the text up to its first byte, whole ones
        length = len((before + after[:1]).decode(errors="replace"))
        assert start == length - 1
    assert starts == sorted(starts)


def test_a_stop_string_is_kept_where_asked_for() -> None:
    for stops, expected in ((["END"], "one END"), (["D", "END"], "one END"), (["ND", "END"], "one END")):
        stream = TextStream(tokenizer([b"one E", b"N", b"D b"]), [], stops, include_stop=True)
        text = "".join(stream.push(token) for token in range(3)) + stream.flush()
        assert text == stream.text == expected and stream.stopped
        assert stream.start == len("one EN")


texts = st.text(alphabet="ab€🙂", max_size=30)
stops = st.lists(st.text(alphabet="ab€🙂", min_size=1, max_size=4), max_size=3)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(texts, stops, st.integers(0, 2**16))
@example("aaab", ["aab"], 0)
@example("€€a", ["€a", "€€"], 1)
def test_any_text_cut_anywhere(text: str, stop: list[str], seed: int) -> None:
    """Deltas add up to the text, which ends where a scan character by character first completes a stop."""
    data, rng = text.encode(), random.Random(seed)
    parts, start = [], 0
    while start < len(data):
        size = rng.randint(1, 5)
        parts.append(data[start : start + size])
        start += size
    stream, deltas = stream_of(parts, stop)
    assert "".join(deltas) == stream.text
    met = [text.index(s) for s in stop if s in text]
    assert stream.stopped == bool(met)
    if not met:
        assert stream.text == text
        return
    # Cut at a stop string; no earlier-completed one is left in what was given out. Which of two that
    # arrive in one token wins is settled by where they begin.
    assert text.startswith(stream.text)
    assert any(text.startswith(s, len(stream.text)) for s in stop)
    assert not any(s in stream.text for s in stop)
    if len(set(map(len, stop))) == 1:
        assert len(stream.text) == min(met)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(texts, stops)
def test_nothing_that_may_be_a_stop_is_shown_and_nothing_else_is_held(text: str, stop: list[str]) -> None:
    """After each token: what was shown is never taken back, and only a stop's beginning is kept from view."""
    stream, seen = TextStream(tokenizer([c.encode() for c in text]), [], stop), ""
    for token in range(len(text)):
        seen += stream.push(token)
        assert stream.text == seen
        if stream.stopped:
            return
        held = text[len(seen) : token + 1]
        assert not held or any(s.startswith(held) for s in stop)
        so_far = text[: token + 1]
        longest = max((n for s in stop for n in range(len(s)) if so_far.endswith(s[:n])), default=0)
        assert len(held) == longest
