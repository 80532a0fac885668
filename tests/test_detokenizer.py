"""Text as it streams: what decoding the whole would show, and never half a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trained_tokenizers import TEXTS

from tpjax.text.detokenizer import IncrementalDetokenizer
from tpjax.text.tokenizer import Tokenizer


def _stream(tokenizer: Tokenizer, ids, **options) -> str:
    stream = IncrementalDetokenizer(tokenizer, **options)
    parts = [stream.push(i) for i in ids]
    return "".join(parts) + stream.flush()


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(-1, 410), max_size=40), skip=st.booleans())
@pytest.mark.parametrize("kind", ["byte_level", "spm"])
def test_stream_equals_decode_for_random_ids(kind, ids, skip, byte_level, spm):
    tokenizer = {"byte_level": byte_level, "spm": spm}[kind]
    assert _stream(tokenizer, ids, skip_special_tokens=skip) == tokenizer.decode(
        ids, skip_special_tokens=skip
    )


@settings(max_examples=300, deadline=None)
@given(prompt=st.text(max_size=12), ids=st.lists(st.integers(0, 410), max_size=20))
@pytest.mark.parametrize("kind", ["byte_level", "spm"])
def test_stream_after_a_prompt_is_what_decode_adds(kind, prompt, ids, byte_level, spm):
    tokenizer = {"byte_level": byte_level, "spm": spm}[kind]
    prompt_token_ids = tokenizer.encode(prompt)
    whole, before = tokenizer.decode([*prompt_token_ids, *ids]), tokenizer.decode(prompt_token_ids)
    assert before + _stream(tokenizer, ids, prompt_token_ids=prompt_token_ids) == whole


@pytest.mark.parametrize("name", ["byte_level", "spm", "smollm2_tokenizer", "gemma3_tokenizer"])
def test_stream_never_shows_half_a_character(name, request):
    tokenizer = request.getfixturevalue(name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        stream = IncrementalDetokenizer(tokenizer)
        parts = [stream.push(i) for i in ids]
        assert not any("\ufffd" in part for part in parts)
        assert stream.flush() == ""
        assert "".join(parts) == tokenizer.decode(ids)


def test_leading_space_is_kept_after_a_prompt_and_dropped_without(spm):
    ids = spm.encode("a b", add_special_tokens=False)
    assert _stream(spm, ids) == "a b"
    assert _stream(spm, ids, prompt_token_ids=spm.encode("x")) == " a b"
    assert _stream(spm, ids, prompt_token_ids=[spm.bos_id]) == "a b"  # BOS shows nothing: this is the start


def test_of_a_prompt_of_control_tokens_the_end_is_looked_at(spm, monkeypatch):
    ids, seen = spm.encode("a b", add_special_tokens=False), []
    monkeypatch.setattr(
        spm, "visible_bytes", lambda *args: seen.append(args) or Tokenizer.visible_bytes(spm, *args)
    )
    assert _stream(spm, ids, prompt_token_ids=[spm.bos_id] * 64) == "a b"
    assert _stream(spm, ids, prompt_token_ids=[*spm.encode("x"), *[spm.bos_id] * 100_000]) == " a b"
    assert len(seen) == 2 * (64 + len(ids))


def test_character_begun_in_the_prompt_is_completed(byte_level):
    ids = byte_level.encode("🫠", add_special_tokens=False)
    assert len(ids) > 1
    assert _stream(byte_level, ids[-1:], prompt_token_ids=ids[:-1]) == "🫠"
    assert _stream(byte_level, ids[:-1]) == "\ufffd"
