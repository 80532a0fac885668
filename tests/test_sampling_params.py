"""Every bad sampling parameter is refused by name and value."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import pytest

from tpjax import SamplingParams
from tpjax.errors import RequestError, TpjaxError
from tpjax.runtime.rows import Row
from tpjax.sampling_params import NEUTRAL

NAN, INF = math.nan, math.inf
NOT_NUMBERS: tuple[Any, ...] = (NAN, INF, -INF, True, "1", [1.0], 1j)
NOT_COUNTS: tuple[Any, ...] = (NAN, INF, 1.0, True, False, "1", [1])

BAD: dict[str, tuple[Any, ...]] = {
    "max_tokens": (*NOT_COUNTS, None, -1),
    "temperature": (*NOT_NUMBERS, -0.1, -1),
    "top_k": (*NOT_COUNTS, -1),
    "top_p": (*NOT_NUMBERS, 0, 0.0, -0.1, 1.0001, 2),
    "min_p": (*NOT_NUMBERS, -0.1, 1.0001, 2),
    "seed": (*NOT_COUNTS, -(2**63) - 1, 2**63),
    "repetition_penalty": (*NOT_NUMBERS, 0, 0.0, -1.0),
    "min_tokens": (*NOT_COUNTS, None, -1),
    "presence_penalty": (*NOT_NUMBERS, None, -2.1, 2.1),
    "frequency_penalty": (*NOT_NUMBERS, None, -2.1, 2.1),
    "logprobs": (*NOT_COUNTS, -1, 21),
    "prompt_logprobs": (*NOT_COUNTS, -1, 21),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, bad in BAD.items() for value in bad])
def test_bad_number(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{name: value})
    assert str(error.value).startswith(f"{name}={value!r} is not a ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "bounds"),
    (
        ("max_tokens", -1, "a whole number, 0 or more"),
        ("seed", 2**63, "a whole number, -9223372036854775808 to 9223372036854775807"),
        ("logprobs", 21, "a whole number, 0 to 20"),
        ("temperature", NAN, "a finite number, 0 or more"),
        ("top_p", 0.0, "a finite number, above 0 and at most 1"),
        ("min_p", 1.5, "a finite number, 0 or more and at most 1"),
        ("presence_penalty", 3, "a finite number, -2 or more and at most 2"),
        ("repetition_penalty", 0, "a finite number, above 0"),
    ),
)
def test_message_gives_the_bounds(name: str, value: Any, bounds: str) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{name: value})
    assert str(error.value) == f"{name}={value!r} is not {bounds}"


@pytest.mark.parametrize("stop", ("", ("a", ""), (1,), (None,), (b"a",)))
def test_bad_stop(stop: Any) -> None:
    with pytest.raises(RequestError, match=r"^stop=.* is not a non-empty string$"):
        SamplingParams(stop=stop)


@pytest.mark.parametrize("token", (-1, 1.0, True, "a", None))
def test_bad_stop_token(token: Any) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(stop_token_ids=[3, token])
    assert str(error.value) == f"stop_token_ids has {token!r}, which is not a token id"


@pytest.mark.parametrize("token", (-1, 1.0, True, "5", None))
def test_bad_biased_token(token: Any) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(logit_bias={token: 1.0})
    assert str(error.value) == f"logit_bias has {token!r}, which is not a token id"


@pytest.mark.parametrize("bias", (NAN, INF, -INF, "1", None, True))
def test_bad_bias(bias: Any) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(logit_bias={7: bias})
    assert str(error.value) == f"logit_bias[7]={bias!r} is not a finite number"


@pytest.mark.parametrize(
    ("name", "value"),
    (("stop", 5), ("stop", None), ("stop_token_ids", 5), ("logit_bias", 5), ("logit_bias", [1])),
)
def test_containers_of_the_wrong_type(name: str, value: Any) -> None:
    """A server passes on what a client sent: these too must be the request's fault."""
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("value", (1e39, 1e308, 10**400), ids=("1e39", "1e308", "integer"))
@pytest.mark.parametrize("name", ("temperature", "repetition_penalty"))
def test_numbers_beyond_float32(name: str, value: float) -> None:
    """The device computes in float32, where these are infinite."""
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("bias", (1e39, -1e308, 10**400), ids=("1e39", "-1e308", "integer"))
def test_bias_beyond_float32(bias: float) -> None:
    with pytest.raises(RequestError, match=r"logit_bias\[7\]=-?1"):
        SamplingParams(logit_bias={7: bias})


def test_bounds_are_inclusive() -> None:
    low = SamplingParams(
        max_tokens=1, temperature=0, top_k=0, top_p=1e-3, min_p=0, seed=-(2**63), repetition_penalty=1e-3,
        presence_penalty=-2, frequency_penalty=-2, logprobs=0,
    )  # fmt: skip
    high = SamplingParams(
        max_tokens=10**9, temperature=100, top_k=10**9, top_p=1, min_p=1, seed=2**63 - 1,
        repetition_penalty=10, presence_penalty=2, frequency_penalty=2, logprobs=20,
    )  # fmt: skip
    assert (low.temperature, low.logprobs, low.seed) == (0, 0, -(2**63))
    assert (high.seed, high.top_p, high.logprobs) == (2**63 - 1, 1, 20)


def test_defaults_and_normal_forms() -> None:
    params = SamplingParams()
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)
    assert {getattr(params, name) for name in NEUTRAL} == {None}
    assert {name: params.value(name) for name in NEUTRAL} == NEUTRAL
    assert SamplingParams(seed=-1).seed is None
    assert params.stop == () and params.stop_token_ids == () and params.logit_bias == {}
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)
    bias = {1: 2.0}
    held = SamplingParams(logit_bias=bias)
    bias[1] = 9.0
    assert held.logit_bias == {1: 2.0}
    assert pickle.loads(pickle.dumps(held)) == held


def test_resolved() -> None:
    """What is given counts, then the model's, then the neutral value; all else stays as it is."""
    given = SamplingParams(max_tokens=3, temperature=0.0, top_k=0, stop="x", logit_bias={2: 1.0})
    whole = given.resolved({"temperature": 0.6, "top_k": 20, "top_p": 0.9})
    assert {name: getattr(whole, name) for name in NEUTRAL} == {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 0.9,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert (whole.max_tokens, whole.stop, whole.logit_bias) == (3, ("x",), {2: 1.0})
    assert whole.resolved({"temperature": 0.1, "min_p": 0.5}) == whole
    assert SamplingParams().resolved({"repetition_penalty": 1.2}).needs_history


def test_fewest_and_most_tokens() -> None:
    assert SamplingParams(min_tokens=16).min_tokens == 16
    with pytest.raises(RequestError, match=r"^min_tokens=17 is over max_tokens=16$"):
        SamplingParams(min_tokens=17)


@pytest.mark.parametrize(
    ("given", "expected"),
    (
        ({}, False),
        ({"temperature": 0.3, "top_k": 4, "top_p": 0.5, "min_p": 0.1, "logprobs": 3}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -0.5}, True),
        ({"frequency_penalty": 0.5}, True),
        ({"logit_bias": {3: 0.0}}, True),
        ({"repetition_penalty": 1, "presence_penalty": 0}, False),
    ),
)
def test_needs_history(given: dict[str, Any], expected: bool) -> None:
    assert SamplingParams(**given).needs_history is expected


@pytest.mark.parametrize(
    ("given", "expected"),
    (
        ({"temperature": 0}, True),
        ({"temperature": 0, "top_k": 4, "top_p": 0.5, "min_p": 0.1, "seed": 3, "prompt_logprobs": 2}, True),
        ({}, False),
        ({"temperature": 1e-30}, False),
        ({"temperature": 0, "logprobs": 0}, False),
        ({"temperature": 0, "logit_bias": {3: 0.0}}, False),
    ),
)
def test_plain_greedy(given: dict[str, Any], expected: bool) -> None:
    assert SamplingParams(**given).plain_greedy is expected


def test_rows_with_a_mask_are_not_plain() -> None:
    """A mask applies to positions before ``masked_until``; the first sampled is after the tokens fed."""
    row = Row(0, 7, (), SamplingParams(temperature=0), 0, masked_until=9)
    assert [row.plain_greedy(tokens) for tokens in (1, 2, 3)] == [False, True, True]
    assert not replace(row, params=SamplingParams(), masked_until=0).plain_greedy()


def test_error_is_a_tpjax_error_and_a_value_error() -> None:
    assert issubclass(RequestError, TpjaxError) and issubclass(RequestError, ValueError)
