"""Shared by completions and chat: making requests, gathering deltas, usage, log-probabilities, events."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Protocol, TypeVar

from tpjax.engine.generation import Delta, Generation
from tpjax.errors import ContextLengthError, RequestError
from tpjax.sampling_params import MAX_SEED, MIN_SEED, RANDOM_SEED
from tpjax.server.error_responses import bad_request, from_request_error, over_context
from tpjax.server.grammars.compiler import TokenGrammar
from tpjax.server.json_types import Json, JsonObject, utf8, well_formed
from tpjax.server.protocol import MAX_CHOICES, Sampling
from tpjax.server.service import Service, Stream

if TYPE_CHECKING:
    from tpjax.engine.request import Request, TokenLogprobs
    from tpjax.engine.request_builder import CheckedParams
    from tpjax.llm import LLM
    from tpjax.text.tokenizer import Tokenizer

# Deltas that a streaming reader may lag behind: a few seconds of a fast model.
STREAM_LIMIT = 1024
# Most log-probabilities of prompts in one response: over 60 MB of JSON. 8k tokens with 20 each are 172,032.
MAX_PROMPT_LOGPROBS = 1 << 20
_SMALL = 4096  # tokens and log-probabilities of a response that takes the event loop a few milliseconds
_BATCH = 256  # list items encoded as JSON at a time
_LEVELS = 4  # of a response whose parts are encoded by themselves: itself, its choices, each, its logprobs

T = TypeVar("T")


class GenerationResponse(Protocol):
    """A response whose generations run: whole, or as the data of server-sent events."""

    stream: Stream

    async def complete(self) -> bytes:
        """Waits for all choices; returns the whole response as JSON."""
        ...

    def events(self) -> AsyncIterator[bytes]:
        """Yields the response in chunks, as server-sent events."""
        ...


def checked_params(llm: LLM, body: Sampling, max_tokens: int | None, **params: Json) -> CheckedParams:
    """Returns the sampling parameters of a request, checked once for all its prompts and choices.

    Args:
        llm: the model.
        body: the sampling parameters.
        max_tokens: as given by the client.
        **params: further sampling parameters.

    Raises:
        ApiError: 400, naming the parameter.
    """
    allowed, vocab = body.allowed_token_ids or (), llm.config.vocab_size
    if len(allowed) > vocab:  # before each is looked at: a body holds millions
        raise bad_request(
            f"allowed_token_ids has {len(allowed)} tokens, over the vocabulary of {vocab}",
            "allowed_token_ids",
        )
    least = body.min_tokens or 0
    try:
        return llm.checked_params(body.sampling_params(least if max_tokens is None else max_tokens, **params))
    except RequestError as error:
        raise from_request_error(error, type(body).model_fields) from error


def make_requests(
    llm: LLM,
    body: Sampling,
    params: CheckedParams,
    prompt: str | Sequence[int],
    max_tokens: int | None,
    default_tokens: int | None,
    grammars: Sequence[TokenGrammar] = (),
) -> list[Request]:
    """Returns checked requests for the choices of one prompt; they share its token ids and their parameters.

    Only the first computes the log-probabilities of the prompt, which are those of all.

    Args:
        llm: the model.
        body: the request.
        params: its sampling parameters, of :func:`checked_params`.
        prompt: text, or token ids.
        max_tokens: as given by the client.
        default_tokens: used if ``max_tokens`` is not given, up to the room in the context; ``None``: all the
            room.
        grammars: one per choice, or none.

    Raises:
        ApiError: 400, naming the parameter.
    """
    try:
        # The prompt's check comes first: the other limits follow from its length.
        prompt = _truncated(llm, body, prompt, max_tokens)
        alone = params.with_numbers(max_tokens=0, min_tokens=0)
        ids = llm.requests(prompt, alone, [0])[0].prompt_token_ids
        room = llm.max_model_len - len(ids)
        if not room and max_tokens != 0:
            none = f"the prompt has {len(ids)} tokens, which leaves no room to answer"
            raise ContextLengthError(over_context(none, llm.max_model_len))
        if max_tokens is None:
            default = room if default_tokens is None else max(default_tokens, body.min_tokens or 0)
            max_tokens = max(1, min(default, room))
        if max_tokens > room:
            both = f"the prompt has {len(ids)} tokens and max_tokens={max_tokens}"
            raise bad_request(
                over_context(f"{both}, together {len(ids) + max_tokens}", llm.max_model_len),
                body.limit_name,
                "context_length_exceeded",
            )
        seed = RANDOM_SEED if body.seed is None else body.seed
        if seed == RANDOM_SEED:
            seed = secrets.randbelow(MAX_SEED)
        requests = llm.requests(
            ids,
            params.with_numbers(max_tokens=max_tokens),
            [_choice_seed(seed, i) for i in range(body.n or 1)],
            grammars,
            cache_salt=body.cache_salt or "",
            priority=body.priority or 0,
        )
        if params.params.prompt_logprobs is not None:
            rest = requests[0].params.with_numbers(prompt_logprobs=None)
            for request in requests[1:]:
                request.params = rest
        return requests
    except RequestError as error:
        raise from_request_error(error, type(body).model_fields) from error


def _choice_seed(seed: int, choice: int) -> int:
    """Returns the seed of one of several choices: consecutive in int64, without the random seed."""
    own = (seed + choice - MIN_SEED) % 2**64 + MIN_SEED
    return own + (seed < RANDOM_SEED <= own)


def _truncated(
    llm: LLM, body: Sampling, prompt: str | Sequence[int], max_tokens: int | None
) -> str | Sequence[int]:
    """Truncates a prompt to ``truncate_prompt_tokens``; -1 leaves room for ``max_tokens``."""
    most = body.truncate_prompt_tokens
    if most is None:
        return prompt
    if most == -1:
        most = llm.max_model_len - (1 if max_tokens is None else max_tokens)
    if isinstance(prompt, str) and llm.tokenizer is not None:
        prompt = llm.tokenizer.encode(prompt)
    most = min(max(most, 0), len(prompt))
    return prompt[:most] if body.truncation_side == "right" else prompt[len(prompt) - most :]


def check_prompt_logprobs(tokens: int, count: int, copies: int, param: str) -> None:
    """Checks that the log-probabilities of prompts are not too many for one response.

    Args:
        tokens: tokens of all prompts together.
        count: most likely tokens at each position; the prompt's own comes with them.
        copies: choices of each prompt that repeat them.
        param: parameter that asks for them.

    Raises:
        ApiError: 400.
    """
    entries = tokens * (count + 1) * copies
    if entries > MAX_PROMPT_LOGPROBS:
        times = f" in each of {copies} choices" if copies > 1 else ""
        raise bad_request(
            f"{param}={count} for {tokens} tokens of the prompt{times} are {entries} log-probabilities, "
            f"over {MAX_PROMPT_LOGPROBS}",
            param,
        )


async def built(size: int, build: Callable[[], T]) -> T:
    """Builds a response, or a part of it; in a thread if it is not small: ``/health`` answers meanwhile.

    Args:
        size: its tokens and log-probabilities.
        build: function that builds it.
    """
    return build() if size <= _SMALL else await asyncio.to_thread(build)


def submit(
    service: Service, llm: LLM, body: Sampling, requests: Sequence[Request], shown: Collection[int] = ()
) -> Stream:
    """Submits requests to the engine; ``shown`` are special tokens that stay visible in their texts."""
    generations = [Generation(request, llm.tokenizer, shown) for request in requests]
    return service.submit(generations, STREAM_LIMIT * len(generations) if body.stream else None)


async def gather(stream: Stream) -> list[Delta]:
    """Waits for all choices; returns each as one delta."""
    parts: list[list[Delta]] = [[] for _ in stream.generations]
    async for index, delta in stream.deltas():
        parts[index].append(delta)
    return [joined(deltas) for deltas in parts]


def joined(deltas: Sequence[Delta], before: int = 0) -> Delta:
    """Joins consecutive deltas; ``before`` is the length of the text before them, characters."""
    text = "".join(delta.text for delta in deltas)
    end = before + len(text)
    return Delta(
        text,
        [token for delta in deltas for token in delta.token_ids],
        deltas[-1].finish_reason,
        [entry for delta in deltas for entry in delta.logprobs],
        [min(at, end) for delta in deltas for at in delta.offsets],  # a stop string was removed
        deltas[-1].error,
    )


class HeldDeltas:
    """Holds back deltas of one choice while the text of their tokens may still turn out to be a stop string.

    Without it, a streamed ``text_offset`` could lie past the end of a text whose stop string was removed.
    """

    def __init__(self) -> None:
        self._held: list[Delta] = []
        self._length = 0  # of the text passed on, characters

    def push(self, delta: Delta) -> Delta | None:
        """Adds a delta; returns it joined with those held back, or ``None`` if it is held back too."""
        self._held.append(delta)
        whole = joined(self._held, self._length)
        end = self._length + len(whole.text)
        if delta.finish_reason is None and any(at > end for one in self._held for at in one.offsets):
            return None
        self._held, self._length = [], end
        return whole


def usage(stream: Stream, n: int) -> JsonObject:
    """Counts prompt and generated tokens; a prompt counts once for all its ``n`` choices."""
    requests = [generation.request for generation in stream.generations]
    prompt = sum(len(request.prompt_token_ids) for request in requests[::n])
    completion = sum(len(request.output_token_ids) for request in requests)
    cached = sum(request.cached_tokens or 0 for request in requests[::n])
    return _counts(prompt, completion) | {"prompt_tokens_details": {"cached_tokens": cached}}


class RunningUsage:
    """Counts the tokens of each choice for the chunks of a stream.

    Args:
        stream: the generations.
        body: says whether every chunk has the usage, only the last one, or none.
    """

    def __init__(self, stream: Stream, body: Sampling) -> None:
        self._generations = stream.generations
        self._body = body
        self._generated = [0] * len(stream.generations)

    def add(self, index: int, delta: Delta) -> JsonObject:
        """Adds a delta; returns the ``usage`` field of its chunks: that of its choice, null, or no field."""
        self._generated[index] += len(delta.token_ids)
        if not self._body.include_usage:
            return {}
        if not self._body.continuous_usage:
            return {"usage": None}
        prompt = len(self._generations[index].request.prompt_token_ids)
        return {"usage": _counts(prompt, self._generated[index])}


def _counts(prompt: int, completion: int) -> JsonObject:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def prompt_logprobs(request: Request, count: int, show: Callable[[int], str]) -> list[JsonObject | None]:
    """Returns the log-probabilities of a prompt's tokens in vLLM's form; ranks below the top are null."""

    def entry(found: TokenLogprobs) -> JsonObject:
        ranked = {token: rank for rank, token in enumerate(found.top, start=1)}
        values = dict(list(found.top.items())[:count]) | {found.token_id: found.logprob}
        return {
            str(token): {"logprob": value, "rank": ranked.get(token), "decoded_token": show(token)}
            for token, value in values.items()
        }

    return [None if found is None else entry(found) for found in request.prompt_logprobs]


def event(data: JsonObject, name: str | None = None) -> bytes:
    """Encodes a server-sent event, in ASCII: some clients end lines at U+2028 or U+0085 too."""
    head = f"event: {name}\n" if name else ""
    text = _encoded(data, ensure_ascii=True)
    if "\\ud" in text:  # surrogates: most are pairs, but not all
        value = json.loads(well_formed(json.dumps(json.loads(text), ensure_ascii=False)))
        text = _encoded(value, ensure_ascii=True)
    return f"{head}data: {text}\n\n".encode()


def json_of(value: Json) -> bytes:
    """Encodes a response as JSON in pieces, its long lists in batches: other threads run in between.

    Iterators are encoded as lists.
    """
    return utf8(_encoded(value, ensure_ascii=False))


def _encoded(value: Json, *, ensure_ascii: bool) -> str:
    dump = partial(json.dumps, ensure_ascii=ensure_ascii, allow_nan=False, separators=(",", ":"))
    return "".join(_pieces(value, dump, _LEVELS))


def _pieces(value: Json, dump: Callable[[Json], str], levels: int) -> Iterator[str]:
    """Yields the JSON of a value: of each field and choice down to some levels, and of batches of lists."""
    if isinstance(value, dict) and levels:
        between = "{"
        for name, one in value.items():
            yield f"{between}{dump(name)}:"
            yield from _pieces(one, dump, levels - 1)
            between = ","
        yield "}" if value else "{}"
    elif isinstance(value, list) and levels == _LEVELS - 1 and len(value) <= MAX_CHOICES:  # the choices
        between = "["
        for one in value:
            yield between
            yield from _pieces(one, dump, levels - 1)
            between = ","
        yield "]" if value else "[]"
    elif isinstance(value, list | Iterator):
        rest, between = iter(value), ""
        yield "["
        while batch := list(islice(rest, _BATCH)):
            yield between + dump(batch)[1:-1]
            between = ","
        yield "]"
    else:
        yield dump(value)


def token_text(tokenizer: Tokenizer | None, as_ids: bool | None = False) -> Callable[[int], str]:
    r"""Returns a function that shows a token; bytes that are not UTF-8 by themselves as ``bytes:\\xe4``."""

    def show(token: int) -> str:
        if tokenizer is None or as_ids:
            return f"token_id:{token}"
        data = tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    return show
