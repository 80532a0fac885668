"""Makes requests of prompts and sampling parameters, checked against model and tokenizer."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tpjax.config import brief
from tpjax.engine.request import Grammar, Request
from tpjax.engine.token_filter import TokenFilter, word_sequences
from tpjax.errors import RequestError
from tpjax.sampling_params import MAX_SEED, RANDOM_SEED, SamplingParams
from tpjax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class CheckedParams:
    """Sampling parameters checked against model and tokenizer, which is done once for many requests.

    Attributes:
        params: sampling parameters, with the model's defaults.
        stop_ids: tokens that end a text, ascending.
        barred_ids: tokens that are never sampled.
        token_filter: bars further tokens, depending on the output; ``None`` if nothing may need it.
    """

    params: SamplingParams
    stop_ids: tuple[int, ...]
    barred_ids: tuple[int, ...]
    token_filter: TokenFilter | None

    def with_numbers(self, **numbers: float | None) -> CheckedParams:
        """Returns a copy with other numbers: see :meth:`SamplingParams.with_numbers`."""
        return replace(self, params=self.params.with_numbers(**numbers))


class RequestBuilder:
    """Makes requests for one model.

    Args:
        vocab: tokens of the vocabulary.
        tokenizer: ``None``: prompts are token ids.
        eos_ids: tokens that end a text.
        defaults: sampling parameters that apply if a request does not give them.
        seed: seed of the seeds of requests without one of their own; -1: another one at each start.
        path: the checkpoint, for messages.
    """

    def __init__(
        self,
        vocab: int,
        tokenizer: Tokenizer | None,
        eos_ids: frozenset[int],
        defaults: Mapping[str, Any],
        seed: int,
        path: Path,
    ) -> None:
        self._vocab, self._tokenizer, self._eos_ids = vocab, tokenizer, eos_ids
        self._defaults, self._path = defaults, path
        self._seeds = np.random.default_rng(None if seed == RANDOM_SEED else seed % 2**64)

    def check(self, params: SamplingParams) -> CheckedParams:
        """Checks sampling parameters against model and tokenizer.

        Raises:
            RequestError: a parameter is invalid.
        """
        if params.stop and self._tokenizer is None:
            raise RequestError(f"stop={params.stop!r} needs a tokenizer, and {self._path} has none")
        if params.bad_words and self._tokenizer is None:
            raise RequestError(f"bad_words={params.bad_words!r} needs a tokenizer, and {self._path} has none")
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            self.checked(list(getattr(params, name) or ()), name)
        params, vocab, allowed = params.resolved(self._defaults), self._vocab, params.allowed_token_ids
        ends = {*params.stop_token_ids, *self._stop_ids(params.stop)}
        ends |= set() if params.ignore_eos else self._eos_ids
        sequences = word_sequences(params.bad_words, self._encode_bare, vocab) if params.bad_words else []
        barred = tuple(one[0] for one in sequences if len(one) == 1)
        left = set(allowed or ()) - set(barred)
        if not (vocab - len(barred) if allowed is None else len(left)):
            raise RequestError("bad_words bars every token that may be sampled: at least 1 has to be left")
        if params.min_tokens and left and ends >= left:
            of_them = "each of allowed_token_ids" + " that bad_words leave" * bool(barred)
            raise RequestError(f"min_tokens={params.min_tokens}, but {of_them} ends the text at once")
        longer = [one for one in sequences if len(one) > 1]
        limited = longer or barred or allowed is not None
        limits = TokenFilter(vocab, params.allowed_array, barred, longer) if limited else None
        return CheckedParams(params, tuple(sorted(ends)), barred, limits)

    def build(
        self,
        prompt: str | Sequence[int],
        params: CheckedParams,
        seeds: Sequence[int | None],
        grammars: Sequence[Grammar | None] = (),
        **extra: Any,
    ) -> list[Request]:
        """Returns requests for several choices of one prompt, which share what is the same for all.

        Args:
            prompt: text, or token ids.
            params: checked sampling parameters; their seed is not used.
            seeds: one for each choice; ``None``: derived from the model's.
            grammars: one for each choice, or none.
            **extra: further fields of the requests (``cache_salt``, ``priority``).

        Raises:
            RequestError: the prompt is invalid, or what may be sampled does not fit a grammar.
        """
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise RequestError(f"{self._path} has no tokenizer: give the prompt as token ids")
            prompt = self._tokenizer.encode(prompt)
        ids = self.checked(prompt)  # a tokenizer may know more tokens than the model
        return [
            Request(
                ids,
                params.params,
                int(self._seeds.integers(0, MAX_SEED, endpoint=True)) if seed is None else seed,
                params.stop_ids,
                grammar=self._filtered(params, grammars[index] if grammars else None),
                barred_ids=params.barred_ids,
                **extra,
            )
            for index, seed in enumerate(seeds)
        ]

    def checked(self, token_ids: Sequence[int], name: str = "the prompt") -> list[int]:
        """Returns token ids as a list; raises a ``RequestError`` if one is not in the vocabulary."""
        vocab = self._vocab
        if isinstance(token_ids, bytes | Mapping):  # their items are integers, or keys
            raise RequestError(f"{name} is of {type(token_ids).__name__}, not a list of token ids")
        try:
            ids = [operator.index(token) for token in token_ids]
        except TypeError as error:
            raise RequestError(f"{name} is not a list of token ids: {error}") from error
        if ids and not 0 <= min(ids) <= max(ids) < vocab:
            wrong = next(token for token in ids if not 0 <= token < vocab)
            raise RequestError(
                f"{name} has token id {brief(wrong)}{self._spelled(wrong)}, "
                f"but the vocabulary has {vocab} (0 to {vocab - 1})"
            )
        return ids

    def _filtered(self, checked: CheckedParams, grammar: Grammar | None) -> Grammar | None:
        """Returns the grammar of a choice, with what the parameters bar beside it or over the output."""
        limits = checked.token_filter
        if limits is None or (grammar is None and not limits.depends_on_output):
            return grammar  # biases on the device bar the rest
        both = limits.over(grammar)
        if not both.mask().any():
            given = [name for name in ("allowed_token_ids", "bad_words") if getattr(checked.params, name)]
            raise RequestError(f"{' and '.join(given)} leave no token that the schema allows")
        return both

    def _encode_bare(self, text: str) -> list[int]:
        """Encodes a text without adding special tokens."""
        assert self._tokenizer is not None
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _stop_ids(self, stop: Sequence[str]) -> set[int]:
        """Returns the ids of stop strings that are special tokens: the text would not contain those."""
        found = (self._tokenizer.special_id(text) for text in stop) if self._tokenizer else ()
        return {token for token in found if token is not None}

    def _spelled(self, token: int) -> str:
        """Returns the text of a token in brackets, if the tokenizer knows it."""
        data = b"" if self._tokenizer is None else self._tokenizer.token_bytes(token)
        return f" ({data.decode('utf-8', 'replace')!r})" if data else ""
