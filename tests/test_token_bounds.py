"""The fewest tokens that a text may take: never more than there are, and near enough to be of use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import tiny_checkpoint

from tpjax.text.loading import load_tokenizer
from tpjax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=("tiny", "gguf", "sentencepiece"))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "tiny":
        path = tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    else:
        path = request.getfixturevalue("smollm2_gguf" if request.param == "gguf" else "gemma3_gguf")
    loaded = load_tokenizer(path)
    assert loaded is not None
    return loaded


PIECES = (
    *("a", "aaaa", " ", "     ", "\n", "\n\n\n", "\t", "▁", "▁▁▁", "é", "e\u0301", "日本語", "가", "\ufb01"),
    *(
        "\x00",
        "\x01",
        "\u3000",
        "\u200b",
        "\U0001f600",
        "<|im_start|>",
        "<|im_end|>",
        "<bos>",
        "<0x41>",
        "the ",
    ),
    *(
        "internationalization",
        "----------------",
        "0123456789",
        "=" * 70,
        "\u1fef",
        "\r\n",
        "<start_of_turn>",
    ),
)


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.tuples(st.sampled_from(PIECES) | st.text(max_size=4), st.integers(1, 50)), max_size=12)
)
def test_no_text_takes_fewer_tokens_than_its_bound(
    tokenizer: Tokenizer, parts: list[tuple[str, int]]
) -> None:
    text = "".join(part * count for part, count in parts)
    assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text))


def test_the_bound_is_of_use(tokenizer: Tokenizer) -> None:
    for text in ("a" * 10_000, "hello, world " * 1000, "日本語" * 1000):
        assert tokenizer.fewest_tokens(text) * 40 > len(tokenizer.encode(text)) > 0


@pytest.mark.parametrize(
    ("normalizer", "text", "count"),
    (
        ('{"type": "Lowercase"}', "AAAA", 0),
        ('{"type": "Strip", "strip_left": true, "strip_right": true}', "    ", 0),
        ('{"type": "NFKC"}', "\uff21", 0),
        ('{"type": "NFC"}', "\u1fef" * 40, None),
    ),
)
def test_a_normaliser_that_shortens_has_no_bound(
    tmp_path: Path, normalizer: str, text: str, count: int | None
) -> None:
    tiny_checkpoint(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": json.loads(normalizer)}))
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    fewest = loaded.fewest_tokens(text)
    assert fewest <= len(loaded.encode(text))
    assert fewest == count if count is not None else fewest > 0
