"""Tokens through the API: where they begin in the text, how many fit, which are sampled and shown."""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np
import openai
import pytest
from api_server import BOS, HI, Api, bytes_of
from serving import CONTEXT

from tpjax import SamplingParams
from tpjax.text.tokenizer import Tokenizer

# --- where tokens begin in the text


def begins(tokenizer: Tokenizer, ids: list[int], text: str, skipped: set[int]) -> list[int]:
    """By the definition: which character of the text holds a token's first byte."""
    ends = np.cumsum([len(char.encode()) for char in text]).tolist()
    at, found = 0, []
    for token in ids:
        found.append(bisect.bisect_right(ends, at))
        at += 0 if token in skipped else len(tokenizer.token_bytes(token))
    return found


def test_offsets_of_bytes_and_after_a_bos(api: Api) -> None:
    ask: Any = {"model": "tiny", "max_tokens": 0, "echo": True, "logprobs": 0}
    text = "é the quick 😀\u2028 fox"
    (choice,) = api.client.completions.create(prompt=text, **ask).choices
    ids = api.tokenizer.encode(text)
    assert ids[0] == BOS and len(ids) > len(text.split()) + 4  # some characters take several tokens
    assert choice.text == text and choice.logprobs and choice.logprobs.tokens
    assert len(choice.logprobs.tokens) == len(ids)
    assert choice.logprobs.text_offset == begins(api.tokenizer, ids, text, {BOS})
    (choice,) = api.client.completions.create(prompt=ids, **ask).choices  # as ids, the BOS is echoed too
    assert choice.text == "<|bos|>" + text and choice.logprobs
    assert choice.logprobs.text_offset == begins(api.tokenizer, ids, choice.text, set())


@pytest.mark.parametrize("stream", (False, True))
def test_offsets_of_an_answer(api: Api, stream: bool) -> None:
    """Every byte of a character a token of its own; and an end-of-text token, which shows nothing."""
    text = "aé😀b"
    script = [*bytes_of(api.tokenizer, text.encode()), min(api.tokenizer.eos_ids)]
    grammar = f'start: "{text}"'
    ask: Any = {"model": "tiny", "prompt": "ü the", "max_tokens": 20, "logprobs": 0, "echo": True, "seed": 1}
    bias = {str(token): 50 for token in script}
    answer = api.client.completions.create(
        **ask, stream=stream, logit_bias=bias,
        extra_body={"structured_outputs": {"grammar": grammar}, "return_token_ids": True},
    )  # fmt: skip
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == "ü the" + text
    prompt = api.tokenizer.encode("ü the")
    assert choices[0].prompt_token_ids == prompt
    ids = prompt + [token for choice in choices for token in choice.token_ids]
    assert api.tokenizer.decode(ids) == "ü the" + text
    offsets = [at for choice in choices for at in choice.logprobs.text_offset]
    assert offsets == begins(api.tokenizer, ids, "ü the" + text, {BOS, *api.tokenizer.eos_ids})
    assert len(choices) > 3 or not stream


def test_an_echo_that_ends_inside_a_character(api: Api) -> None:
    """It comes out whole where the answer goes on with it, and as U+FFFD where it does not."""
    *start, last = bytes_of(api.tokenizer, "a😀".encode())
    ask: Any = {"model": "tiny", "prompt": start, "echo": True, "logprobs": 0, "max_tokens": 1}
    for stream in (False, True):
        answer = api.client.completions.create(**ask, stream=stream, extra_body={"allowed_token_ids": [last]})
        choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
        assert "".join(choice.text for choice in choices) == "a😀"
        assert [at for choice in choices for at in choice.logprobs.text_offset] == [0, 1, 1, 1, 1]
    other = bytes_of(api.tokenizer, b"z")
    (choice,) = api.client.completions.create(**ask, extra_body={"allowed_token_ids": other}).choices
    assert choice.text == "a\ufffdz" and choice.logprobs and choice.logprobs.text_offset == [0, 1, 1, 1, 2]
    (choice,) = api.client.completions.create(**ask | {"max_tokens": 0}).choices
    assert choice.text == "a\ufffd"


def test_offsets_end_with_the_text(api: Api) -> None:
    """Of a stop string across tokens nothing is shown."""
    x, y, z = bytes_of(api.tokenizer, b"xyz")
    body = {"structured_outputs": {"regex": "zzxy+"}, "return_token_ids": True}
    bias = {str(token): 50 for token in (x, y, z)}
    for kept, expected in ((False, "zz"), (True, "zzxyy")):
        (choice,) = api.client.completions.create(
            model="tiny", prompt="the", max_tokens=20, logprobs=0, stop="xyy", logit_bias=bias,
            extra_body=body | {"include_stop_str_in_output": kept},
        ).choices  # fmt: skip
        assert choice.text == expected and choice.finish_reason == "stop"
        assert choice.token_ids == [z, z, x, y, y]  # type: ignore[attr-defined]
        assert choice.logprobs and choice.logprobs.text_offset == [0, 1, 2, 2 + kept, 2 + 2 * kept]
        chunks = api.client.completions.create(
            model="tiny", prompt="the", max_tokens=20, logprobs=0, stop="xyy", logit_bias=bias, stream=True,
            extra_body=body | {"include_stop_str_in_output": kept},
        )  # fmt: skip
        streamed = [chunk.choices[0] for chunk in chunks]
        assert "".join(one.text for one in streamed) == expected
        assert [at for one in streamed for at in one.logprobs.text_offset] == choice.logprobs.text_offset
        assert [token for one in streamed for token in one.token_ids] == [z, z, x, y, y]


# --- prompts over the context


@pytest.mark.parametrize("stream", (False, True))
def test_prompts_over_the_context(api: Api, stream: bool) -> None:
    long = "the quick brown fox " * CONTEXT
    for name, ask in (
        ("prompt", lambda: api.client.completions.create(model="tiny", prompt=long, stream=stream)),
        ("prompt", lambda: api.client.completions.create(model="tiny", prompt=[5] * CONTEXT, stream=stream)),
        (
            "prompt",
            lambda: api.client.completions.create(model="tiny", prompt=[[5], [5] * 5000], stream=stream),
        ),
        (
            "messages",
            lambda: api.client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": long}], stream=stream
            ),
        ),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask()
        error = caught.value
        assert (error.code, error.param, error.type) == (
            "context_length_exceeded", name, "invalid_request_error",
        )  # fmt: skip
    with pytest.raises(openai.BadRequestError) as caught:
        api.client.chat.completions.create(model="tiny", messages=HI, max_completion_tokens=CONTEXT)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_completion_tokens")


def test_truncated_prompts(api: Api) -> None:
    ids = list(range(10, 60))
    ask: Any = {"model": "tiny", "prompt": ids, "max_tokens": 4, "temperature": 0, "echo": True}
    for extra, kept in (
        ({"truncate_prompt_tokens": 7}, ids[-7:]),
        ({"truncate_prompt_tokens": 7, "truncation_side": "right"}, ids[:7]),
        ({"truncate_prompt_tokens": 1000}, ids),
        ({"truncate_prompt_tokens": -1}, ids),
    ):
        answer = api.client.completions.create(**ask, extra_body=extra | {"return_token_ids": True})
        assert answer.choices[0].prompt_token_ids == kept  # type: ignore[attr-defined]
        (expected,) = api.offline.generate([kept], SamplingParams(max_tokens=4, temperature=0))
        assert answer.choices[0].token_ids == expected.token_ids  # type: ignore[attr-defined]
    long = ask | {"prompt": [5] * 3000, "echo": False}
    answer = api.client.completions.create(**long, extra_body={"truncate_prompt_tokens": -1})
    assert answer.usage and answer.usage.prompt_tokens == CONTEXT - 4


# --- what may be sampled, and how it is shown


def test_special_tokens_in_the_text(api: Api) -> None:
    start, end = api.tokenizer.encode("<|im_start|><|im_end|>", add_special_tokens=False)
    (a,) = bytes_of(api.tokenizer, b"a")
    ask: Any = {"model": "tiny", "prompt": "the", "max_tokens": 6, "seed": 5, "temperature": 2}
    allowed = {"allowed_token_ids": [start, a], "logit_bias": {str(start): 0}, "return_token_ids": True}
    seen = set()
    for skip in (True, False):
        answer = api.client.completions.create(**ask, extra_body=allowed | {"skip_special_tokens": skip})
        ids = answer.choices[0].token_ids  # type: ignore[attr-defined]
        assert set(ids) <= {start, a} and ids.count(start)
        assert answer.choices[0].text == api.tokenizer.decode(ids, skip_special_tokens=skip)
        seen.add(tuple(ids))
    assert len(seen) == 1  # what is sampled does not depend on how it is shown
    stop: Any = {"allowed_token_ids": [end], "stop_token_ids": [end]}
    for extra, text in (
        ({}, ""),
        ({"include_stop_str_in_output": True}, ""),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "<|im_end|>"),
    ):
        (choice,) = api.client.completions.create(**ask, extra_body=stop | extra).choices
        assert choice.text == text and choice.finish_reason == "stop"


def test_bad_words_and_allowed_tokens_in_chat(api: Api) -> None:
    ask: Any = {"model": "tiny", "messages": HI, "max_tokens": 20, "temperature": 0}
    x, y = bytes_of(api.tokenizer, b"xy")
    body: dict[str, Any] = {"allowed_token_ids": [x, y], "logit_bias": {str(x): 9}}
    (choice,) = api.client.chat.completions.create(**ask, extra_body=body).choices
    assert choice.message.content == "x" * 20
    body["bad_words"] = ["xxx"]
    assert (
        api.client.chat.completions.create(**ask, extra_body=body).choices[0].message.content
        == "xxy" * 6 + "xx"
    )
    with pytest.raises(openai.BadRequestError, match="allowed_token_ids has token id 999") as caught:
        api.client.chat.completions.create(**ask, extra_body={"allowed_token_ids": [999]})
    assert caught.value.param == "allowed_token_ids"
    with pytest.raises(openai.BadRequestError, match="at least 1 has to be left") as caught:
        api.client.chat.completions.create(**ask, extra_body={"allowed_token_ids": [x], "bad_words": ["x"]})
    assert caught.value.param == "bad_words"
    left = {"allowed_token_ids": [x, y], "bad_words": ["x"], "stop_token_ids": [y], "min_tokens": 1}
    with pytest.raises(openai.BadRequestError, match=r"min_tokens=1, but each .* that bad_words leave ends"):
        api.client.chat.completions.create(**ask, extra_body=left)
    shape = {"structured_outputs": {"regex": "[xz]+"}}
    with pytest.raises(
        openai.BadRequestError, match="allowed_token_ids leave no token that the schema allows"
    ):
        api.client.chat.completions.create(**ask, extra_body=body | shape)  # neither y nor a third x


@pytest.mark.parametrize("regex", ("zx", "xz", "x{30}"))
@pytest.mark.parametrize("stream", (False, True))
def test_allowed_tokens_that_the_schema_leaves_out(api: Api, regex: str, stream: bool) -> None:
    """At the first token, at a later one, or only at the token after the last."""
    (x,) = bytes_of(api.tokenizer, b"x")
    body = {"allowed_token_ids": [x], "structured_outputs": {"regex": regex}}
    ask: Any = {"model": "tiny", "messages": HI, "max_tokens": 20, "temperature": 0, "stream": stream}
    if regex == "xz":  # at the last token that was asked for it is no error
        short = api.client.chat.completions.create(
            **ask | {"max_tokens": 1, "stream": False}, extra_body=body
        )
        assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("x", "length")
    if regex == "x{30}":
        answer = api.client.chat.completions.create(**ask, extra_body=body)
        assert stream or answer.choices[0].message.content == "x" * 20
        return
    with pytest.raises(
        openai.APIError, match="allowed_token_ids leave no token that the schema allows"
    ) as caught:
        list(api.client.chat.completions.create(**ask, extra_body=body))
    assert stream or isinstance(caught.value, openai.BadRequestError)
    assert "internal" not in str(caught.value) and caught.value.type == "invalid_request_error"
