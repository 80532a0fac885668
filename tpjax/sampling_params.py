"""Sampling parameters of a request. Plain data, no jax import."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tpjax.config import brief
from tpjax.errors import RequestError

MAX_LOGPROBS = 20
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
MAX_COUNT = 2**63 - 1  # of tokens
RANDOM_SEED = -1  # as in vLLM: the same as no seed
# Values of parameters that neither the request nor the model's generation_config.json gives.
NEUTRAL: Mapping[str, float] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
_MAX_FLOAT32 = (2 - 2**-23) * 2.0**127  # the device computes in float32, where more is infinite


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters, under the names vLLM and transformers use.

    Applied in this order: penalties, ``logit_bias``, temperature, ``top_k``, ``top_p``, ``min_p``. If
    ``temperature``, ``top_k``, ``top_p``, ``min_p`` or ``repetition_penalty`` is ``None``, the value of the
    model's ``generation_config.json`` applies, and if that has none, the value of ``NEUTRAL``.

    Attributes:
        max_tokens: maximum number of tokens to generate; 0 only runs the prompt.
        min_tokens: number of tokens before which no token that ends the text is sampled and no stop string
            counts. A grammar that can only end takes precedence.
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_k: keep the k likeliest tokens, and those that tie with the last of them; 0 keeps all.
        top_p: keep the likeliest tokens that together hold this probability, and those that tie with the
            last of them; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        seed: seed of this request's noise, any int64 but -1; ``None`` or -1: derived from the engine's seed.
        stop: strings that end the text; they are not part of it. One that is a special token of the model
            ends the text at its id.
        stop_token_ids: tokens that end the text besides the model's own.
        ignore_eos: go on past the model's end-of-text tokens.
        repetition_penalty: divides (if positive, else multiplies) logits of tokens in prompt or output; 1
            changes nothing.
        presence_penalty: subtracted from logits of tokens in the output.
        frequency_penalty: subtracted once for each time a token is in the output.
        logit_bias: added to the logits of these token ids.
        logprobs: also return the log-probability of each token and of this many likeliest ones, 0 to 20,
            before penalties and temperature; ``None``: none.
        prompt_logprobs: the same for each token of the prompt; ``None``: none.
        allowed_token_ids: the only tokens that are sampled; ``None``: all.
        bad_words: texts that are not generated: the last token of each is not sampled if the output ends in
            the tokens before it. Each is also taken with a space before it, as in vLLM.
        detokenize: whether to produce text; ``stop`` needs it.
        skip_special_tokens: whether control tokens are left out of the text.
        include_stop_str_in_output: whether the text includes the stop string or token that ended it.

    Raises:
        RequestError: naming the parameter and its value.
    """

    max_tokens: int = 16
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        self._check_containers()
        self._check_numbers()
        self._check_items()

    def _check_numbers(self) -> None:
        self._check_int("max_tokens", 0)
        self._check_int("min_tokens", 0)
        if self.min_tokens > self.max_tokens:
            given = f"min_tokens={brief(self.min_tokens)}"
            raise RequestError(f"{given} is over max_tokens={brief(self.max_tokens)}")
        if self.top_k is not None:
            self._check_int("top_k", 0)
        if self.seed is not None:
            self._check_int("seed", MIN_SEED, MAX_SEED)
            if self.seed == RANDOM_SEED:
                object.__setattr__(self, "seed", None)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check_int(name, 0, MAX_LOGPROBS)
        for name, high, open_low in (
            ("temperature", math.inf, False),
            ("top_p", 1.0, True),
            ("min_p", 1.0, False),
            ("repetition_penalty", math.inf, True),
        ):
            if getattr(self, name) is not None:
                self._check_float(name, 0.0, high, open_low=open_low)
        self._check_float("presence_penalty", -2.0, 2.0)
        self._check_float("frequency_penalty", -2.0, 2.0)

    def _check_items(self) -> None:
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop={text!r} is not a non-empty string")
        for token in self.stop_token_ids:
            if not _is_int(token) or token < 0:
                raise RequestError(f"stop_token_ids has {brief(token)}, which is not a token id")
        for token in self.allowed_token_ids or ():
            if not _is_int(token) or token < 0:
                raise RequestError(f"allowed_token_ids has {brief(token)}, which is not a token id")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty: at least 1 token is needed")
        for word in self.bad_words:
            if not isinstance(word, str) or not word.strip():
                raise RequestError(f"bad_words={word!r} is not a non-empty string")
        for name in ("detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}={getattr(self, name)!r} is neither True nor False")
        if self.stop and not self.detokenize:
            raise RequestError(f"stop={self.stop!r} needs detokenize=True: it is looked for in the text")
        for token, bias in self.logit_bias.items():
            if not _is_int(token) or token < 0:
                raise RequestError(f"logit_bias has {brief(token)}, which is not a token id")
            if not _is_number(bias) or not abs(bias) <= _MAX_FLOAT32:
                raise RequestError(f"logit_bias[{brief(token)}]={brief(bias)} is not a finite number")

    @cached_property
    def needs_history(self) -> bool:
        """Whether logits depend on previous tokens or on a bias."""
        penalties = (self.value("repetition_penalty"), self.presence_penalty, self.frequency_penalty)
        limits = self.allowed_token_ids is not None or bool(self.bad_words)
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias) or limits

    @cached_property  # whoever has a copy of these parameters has it too
    def allowed_array(self) -> array[int] | None:
        """``allowed_token_ids`` as an array, which NumPy reads without converting each; ``None``: all."""
        return None if self.allowed_token_ids is None else array("q", self.allowed_token_ids)

    @cached_property  # asked at every step
    def plain_greedy(self) -> bool:
        """Whether the next token is the arg-max of the logits, and nothing else is asked for."""
        return self.value("temperature") == 0 and not self.needs_history and self.logprobs is None

    def value(self, name: str) -> float:
        """Returns a parameter of ``NEUTRAL``, or its neutral value if it is not given."""
        given: float | None = getattr(self, name)
        return NEUTRAL[name] if given is None else given

    def resolved(self, defaults: Mapping[str, float]) -> SamplingParams:
        """Returns a copy in which a model's defaults, then the neutral values, replace what is not given."""
        every = {**NEUTRAL, **defaults}
        missing: dict[str, Any] = {name: every[name] for name in NEUTRAL if getattr(self, name) is None}
        return self.with_numbers(**missing)

    def with_numbers(self, **numbers: float | None) -> SamplingParams:
        """Returns a copy with other numbers; texts and token ids are shared and not checked again.

        Raises:
            RequestError: naming the parameter and its value.
        """
        other = copy.copy(self)
        for name in ("needs_history", "plain_greedy"):
            other.__dict__.pop(name, None)  # they depend on numbers
        for name, value in numbers.items():
            object.__setattr__(other, name, value)
        other._check_numbers()
        return other

    @classmethod
    def of(
        cls, params: SamplingParams | Sequence[SamplingParams] | None, fields: Mapping[str, Any]
    ) -> SamplingParams | Sequence[SamplingParams]:
        """Returns parameters that were given as such, or as fields: ``generate(prompt, max_tokens=4)``.

        Args:
            params: as given; ``None``: they are given as fields, or not at all.
            fields: values by field name.

        Raises:
            RequestError: both are given, or ``params`` is something else, or a field does not exist; the
                message has a near one, or all.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"is {near[0]} meant?" if near else f"there are {', '.join(known)}"
                raise RequestError(f"{name}={fields[name]!r} is no sampling parameter: {hint}")
        if params is not None and fields:
            raise RequestError(
                f"params and {', '.join(fields)} are both given: give all sampling parameters in one way"
            )
        if params is None:
            return cls(**fields)
        each: Any = [params] if isinstance(params, SamplingParams) else params
        if not isinstance(each, Sequence) or not all(isinstance(one, SamplingParams) for one in each):
            kind = type(params).__name__
            raise RequestError(
                f"params is a {kind}, not SamplingParams or a list of them; fields go by name: max_tokens=4"
            )
        return params

    def _check_containers(self) -> None:
        kinds: dict[str, Any] = {
            "stop": (str, Sequence),
            "stop_token_ids": Sequence,
            "logit_bias": Mapping,
            "bad_words": Sequence,
        }
        if self.allowed_token_ids is not None:
            kinds["allowed_token_ids"] = Sequence
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise RequestError(f"{name}={getattr(self, name)!r} is not a collection")
        if isinstance(self.bad_words, str):
            raise RequestError(f"bad_words={self.bad_words!r} is not a list of words")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        object.__setattr__(self, "bad_words", tuple(self.bad_words))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))

    def _check_int(self, name: str, low: int, high: int = MAX_COUNT) -> None:
        value = getattr(self, name)
        if not _is_int(value) or not low <= value <= high:
            has_end = high != MAX_COUNT or low < 0 or (_is_int(value) and value > high)
            bounds = f"{low} to {high}" if has_end else f"{low} or more"
            raise RequestError(f"{name}={brief(value)} is not a whole number, {bounds}")

    def _check_float(self, name: str, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        fine = _is_number(value) and low <= value <= min(high, _MAX_FLOAT32)
        if not fine or (open_low and value == low):
            over = f"above {low:g}" if open_low else f"{low:g} or more"
            bounds = over if high == math.inf else f"{over} and at most {high:g}"
            raise RequestError(f"{name}={brief(value)} is not a finite number, {bounds}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
