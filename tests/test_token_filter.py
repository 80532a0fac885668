"""``allowed_token_ids`` and ``bad_words``, against logits by the definition and at a real vocabulary size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tpjax import LLM, SamplingParams
from tpjax.engine.token_filter import TokenFilter, word_sequences
from tpjax.errors import RequestError
from tpjax.text.tokenizer import Tokenizer

PROMPT = "The capital of France is"


@pytest.fixture
def llm(smollm2_short: LLM) -> LLM:
    return smollm2_short


@pytest.fixture
def tokenizer(llm: LLM) -> Tokenizer:
    assert llm.tokenizer is not None
    return llm.tokenizer


def best(llm: LLM, prompt: list[int], count: int, barred: Callable[[list[int]], set[int]]) -> list[int]:
    """The likeliest tokens one by one, of those that are not barred."""
    out: list[int] = []
    while len(out) < count:
        logits = llm.logits(prompt + out)[-1].copy()
        logits[list(barred(out))] = -np.inf
        out.append(int(logits.argmax()))
    return out


@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_only_allowed_tokens_are_sampled(llm: LLM, tokenizer: Tokenizer, temperature: float) -> None:
    """Among others that run at the same time, and whose draws stay what they are."""
    prompt = tokenizer.encode(PROMPT)
    few = [int(token) for token in np.random.default_rng(0).integers(10, 49_000, 40)]
    free = SamplingParams(max_tokens=8, temperature=temperature, seed=1, ignore_eos=True)
    bound = SamplingParams(
        max_tokens=8, temperature=temperature, seed=1, ignore_eos=True, allowed_token_ids=few
    )
    alone, (other, mine) = llm.generate([prompt], free), llm.generate([prompt, prompt], [free, bound])
    assert other.token_ids == alone[0].token_ids and set(mine.token_ids) <= set(few)
    if not temperature:
        rest = set(range(llm.config.vocab_size)) - set(few)
        assert mine.token_ids == best(llm, prompt, 8, lambda _: rest)
    (again,) = llm.generate([prompt], free)  # nothing of it stays with the slot
    assert again.token_ids == alone[0].token_ids


def test_words_of_one_token_and_of_several(llm: LLM, tokenizer: Tokenizer) -> None:
    """Each step takes the likeliest token that completes no word; words come from what was said without."""
    prompt = tokenizer.encode("Once upon a time there was a little girl who")
    (free,) = llm.generate([prompt], SamplingParams(max_tokens=10, temperature=0, ignore_eos=True))
    ids = free.token_ids
    assert not set(ids) & tokenizer.special_ids
    pieces = [tokenizer.decode([token]).strip() for token in ids]
    single = next(one for one in pieces if len(tokenizer.encode(one, add_special_tokens=False)) == 1)
    words = [single, tokenizer.decode(ids[2:4]), tokenizer.decode(ids[5:8])]
    # by vLLM's rule: each as it is, and after a space where that is as many tokens that begin otherwise
    forms: list[list[int]] = []
    for word in words:
        bare, spaced = (tokenizer.encode(s + word.lstrip(), add_special_tokens=False) for s in ("", " "))
        forms.append(bare)
        if spaced[0] != bare[0] and len(spaced) == len(bare):
            forms.append(spaced)
    assert {1} < {len(form) for form in forms}

    def barred(out: list[int]) -> set[int]:
        return {form[-1] for form in forms if len(form) == 1 or out[1 - len(form) :] == form[:-1]}

    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True, bad_words=words)
    (mine,) = llm.generate([prompt], params)
    assert mine.token_ids == best(llm, prompt, 10, barred) != ids
    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True, bad_words=words[:1])
    (mine,) = llm.generate([prompt], params)
    assert mine.token_ids == best(llm, prompt, 10, lambda _: {f[0] for f in forms if len(f) == 1})


def test_a_word_of_several_tokens_is_never_said(llm: LLM, tokenizer: Tokenizer) -> None:
    """Where all are about as likely: no sequence is completed, and others that share its tokens are."""
    a, b, c = (tokenizer.encode(x, add_special_tokens=False)[0] for x in (" a", " b", " c"))
    (first,) = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a b", add_special_tokens=False) == [first, b]
    params = [
        SamplingParams(
            max_tokens=60,
            temperature=100,
            seed=seed,
            allowed_token_ids=[a, b, c],
            bad_words=["a b", "c c a"],
        )
        for seed in range(2)
    ]
    for completion in llm.generate([PROMPT] * 2, params):
        pairs = set(zip(completion.token_ids, completion.token_ids[1:], strict=False))
        assert (a, b) not in pairs and {(a, a), (b, b), (b, a), (c, b)} <= pairs
        triples = set(zip(*(completion.token_ids[i:] for i in range(3)), strict=False))
        assert (c, c, a) not in triples and (c, a) in pairs


class Letters:
    """Allows tokens in turn: 1 or 2, then 3, then nothing."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.error = None

    @property
    def finished(self) -> bool:
        return len(self.taken) == 2

    def mask(self) -> np.ndarray:
        return np.array([0b110 if not self.taken else 0b1000, 0], np.uint32)

    def advance(self, token: int) -> None:
        self.taken.append(token)


def test_with_a_grammar_both_hold() -> None:
    one = TokenFilter(40, [1, 3, 35], [35], [], Letters())
    assert one.mask().tolist() == [0b10, 0] and not one.finished
    one.advance(1)
    assert one.mask().tolist() == [0b1000, 0] and not one.finished and one.error is None
    one.advance(3)
    assert one.finished and one.error is None
    dead = TokenFilter(40, None, [], [(1, 3)], Letters())
    assert dead.mask().tolist() == [0b110, 0]
    dead.advance(1)
    assert dead.finished and "leave no token" in (dead.error or "")
    bound = TokenFilter(40, [33], [], [(33, 33)], None)
    assert bound.mask().tolist() == [0, 0b10]
    bound.advance(33)
    assert bound.finished and bound.error is None


def test_words_that_a_model_cannot_say() -> None:
    codes = {"a": [1], " a": [9, 1], "b": [500, 2], " b": [3, 500]}
    assert word_sequences(["a", "b", "a"], codes.__getitem__, 100) == [(1,)]


@pytest.mark.parametrize(
    ("given", "message"),
    (
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids has -1, which is not a token id"),
        ({"allowed_token_ids": [1.0]}, "allowed_token_ids has 1.0, which is not a token id"),
        ({"allowed_token_ids": 5}, "allowed_token_ids=5 is not a collection"),
        ({"bad_words": "word"}, "bad_words='word' is not a list of words"),
        ({"bad_words": ["a", " "]}, "bad_words=' ' is not a non-empty string"),
        ({"bad_words": [1]}, "bad_words=1 is not a non-empty string"),
        ({"bad_words": 5}, "bad_words=5 is not a collection"),
        ({"skip_special_tokens": 1}, "skip_special_tokens=1 is neither True nor False"),
        ({"include_stop_str_in_output": None}, "include_stop_str_in_output=None is neither"),
        ({"detokenize": False, "stop": "a"}, "stop=('a',) needs detokenize=True"),
    ),
)
def test_wrong_parameters(given: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**given)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_wrong_for_the_model(llm: LLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(
        RequestError, match="allowed_token_ids has token id 49152, but the vocabulary has 49152"
    ):
        llm.generate(PROMPT, SamplingParams(allowed_token_ids=[5, 49_152]))
    (paris,) = tokenizer.encode(" Paris", add_special_tokens=False)
    with pytest.raises(RequestError, match="bad_words bars every token"):
        llm.generate(PROMPT, SamplingParams(allowed_token_ids=[paris], bad_words=["Paris"]))


def test_text_that_is_not_made(llm: LLM) -> None:
    (made,) = llm.generate(PROMPT, SamplingParams(max_tokens=4, temperature=0))
    (bare,) = llm.generate(PROMPT, SamplingParams(max_tokens=4, temperature=0, detokenize=False))
    assert bare.token_ids == made.token_ids and bare.text == "" != made.text


def test_special_tokens_and_stops_in_the_text(llm: LLM, tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    assert end in tokenizer.eos_ids

    def text(**given: object) -> str:
        params = SamplingParams(max_tokens=3, temperature=0, allowed_token_ids=[end], **given)  # type: ignore[arg-type]
        return llm.generate(PROMPT, params)[0].text

    assert text() == text(include_stop_str_in_output=True) == text(skip_special_tokens=False) == ""
    assert text(skip_special_tokens=False, include_stop_str_in_output=True) == "<|im_end|>"
    assert text(skip_special_tokens=False, ignore_eos=True) == "<|im_end|>" * 3
    assert text(ignore_eos=True) == ""
