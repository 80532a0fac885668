"""Shared by completions and chat: making requests, gathering deltas, usage, log-probabilities, events."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from tpjax.engine.generation import Delta, Generation
from tpjax.errors import ContextLengthError, RequestError
from tpjax.sampling_params import MAX_SEED, MIN_SEED, RANDOM_SEED
from tpjax.server.error_responses import bad_request, from_request_error
from tpjax.server.grammars.compiler import TokenGrammar
from tpjax.server.json_types import Json, JsonObject
from tpjax.server.protocol import Sampling
from tpjax.server.service import Service, Stream

if TYPE_CHECKING:
    from tpjax.engine.request import Request, TokenLogprobs
    from tpjax.engine.request_builder import CheckedParams
    from tpjax.llm import LLM
    from tpjax.text.tokenizer import Tokenizer

# Deltas that a streaming reader may lag behind: a few seconds of a fast model.
STREAM_LIMIT = 1024
_BATCH = 4096  # list items encoded as JSON at a time


class GenerationResponse(Protocol):
    """A response whose generations run: whole, or as the data of server-sent events."""

    stream: Stream

    async def complete(self) -> JsonObject:
        """Waits for all choices; returns the whole response."""
        ...

    def chunks(self) -> AsyncIterator[JsonObject]:
        """Yields the response in chunks."""
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
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens: the context of {llm.max_model_len} has no room to answer"
            )
        if max_tokens is None:
            default = room if default_tokens is None else max(default_tokens, body.min_tokens or 0)
            max_tokens = max(1, min(default, room))
        if max_tokens > room:
            raise bad_request(
                f"the prompt has {len(ids)} tokens and max_tokens={max_tokens}: together "
                f"{len(ids) + max_tokens}, over the context of {llm.max_model_len}",
                body.limit_name,
                "context_length_exceeded",
            )
        seed = RANDOM_SEED if body.seed is None else body.seed
        if seed == RANDOM_SEED:
            seed = secrets.randbelow(MAX_SEED)
        return llm.requests(
            ids,
            params.with_numbers(max_tokens=max_tokens),
            [_choice_seed(seed, i) for i in range(body.n or 1)],
            grammars,
            cache_salt=body.cache_salt or "",
            priority=body.priority or 0,
        )
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
    cached = sum(request.cached_tokens for request in requests[::n])
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
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def json_of(fields: Mapping[str, Json], lists: Mapping[str, Iterable[Json] | None]) -> bytes:
    """Encodes an object as JSON, its long lists in batches: other threads run between two batches."""
    text = [json.dumps(dict(fields), separators=(",", ":"))[:-1]]
    for name, values in lists.items():
        text.append(f',"{name}":')
        if values is None:
            text.append("null")
            continue
        rest, batches = iter(values), []
        while batch := list(islice(rest, _BATCH)):
            batches.append(json.dumps(batch, ensure_ascii=False, separators=(",", ":"))[1:-1])
        text.append(f"[{','.join(batches)}]")
    return "".join([*text, "}"]).encode()


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
