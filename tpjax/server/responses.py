"""From a request's choices to what goes back: pieces completions and chat have in common."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from tpjax.engine.generation import Delta, Generation
from tpjax.errors import ContextLengthError, RequestError
from tpjax.sampling_params import MAX_SEED, MIN_SEED, RANDOM_SEED
from tpjax.server.error_responses import bad_request, from_request_error
from tpjax.server.protocol import Sampling
from tpjax.server.service import Service, Stream

if TYPE_CHECKING:
    from tpjax.engine.request import Request, TokenLogprobs
    from tpjax.llm import LLM
    from tpjax.text.tokenizer import Tokenizer

# Deltas a streaming reader may lag behind: a few seconds of a fast model.
STREAM_LIMIT = 1024
_PIECE = 4096  # items of a list


class Answer(Protocol):
    """An answer in the making: whole, or as the data of server-sent events."""

    stream: Stream

    async def whole(self) -> dict[str, Any]:
        """Waits for all of it."""
        ...

    def events(self) -> AsyncIterator[dict[str, Any]]:
        """Yields it in chunks."""
        ...


def make_requests(
    llm: LLM,
    body: Sampling,
    prompt: str | Sequence[int],
    max_tokens: int | None,
    default_tokens: int | None,
    grammars: Sequence[Any] = (),
    **params: Any,
) -> list[Request]:
    """Requests for the choices of one prompt, checked; they share its tokens.

    Args:
        llm: the model.
        body: how to sample.
        prompt: text, or token ids.
        max_tokens: as asked for.
        default_tokens: where it is not, as far as the context has room; ``None``: all the room.
        grammars: one a choice, or none.
        **params: further sampling parameters.

    Raises:
        ApiError: 400, naming the parameter.
    """
    try:
        # the prompt's own check comes first: its length decides about the rest
        prompt = _truncated(llm, body, prompt, max_tokens)
        ids = llm.request(prompt, body.sampling_params(0, seed=0, min_tokens=0)).prompt_token_ids
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
        return [
            llm.request(
                ids,
                body.sampling_params(max_tokens, seed=_choice_seed(seed, i), **params),
                cache_salt=body.cache_salt or "",
                grammar=grammars[i] if grammars else None,
                priority=body.priority or 0,
            )
            for i in range(body.n or 1)
        ]
    except RequestError as error:
        raise from_request_error(error, type(body).model_fields) from error


def _choice_seed(seed: int, choice: int) -> int:
    """The seed of one of several choices: the next ones, round the int64 range and past what means random."""
    own = (seed + choice - MIN_SEED) % 2**64 + MIN_SEED
    return own + (seed < RANDOM_SEED <= own)


def _truncated(
    llm: LLM, body: Sampling, prompt: str | Sequence[int], max_tokens: int | None
) -> str | Sequence[int]:
    """A prompt cut to ``truncate_prompt_tokens``; -1 is what leaves room for the answer."""
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
    """Hands requests to the engine; some special tokens may be shown in their texts."""
    generations = [Generation(request, llm.tokenizer, shown) for request in requests]
    return service.submit(generations, STREAM_LIMIT * len(generations) if body.stream else None)


async def gather(stream: Stream) -> list[Delta]:
    """The whole of each choice, as one delta."""
    parts: list[list[Delta]] = [[] for _ in stream.generations]
    async for index, delta in stream.deltas():
        parts[index].append(delta)
    return [_joined(deltas) for deltas in parts]


def _joined(deltas: Sequence[Delta]) -> Delta:
    text = "".join(delta.text for delta in deltas)
    return Delta(
        text,
        [token for delta in deltas for token in delta.token_ids],
        deltas[-1].finish_reason,
        [entry for delta in deltas for entry in delta.logprobs],
        [min(at, len(text)) for delta in deltas for at in delta.offsets],  # a stop string was cut off
        deltas[-1].error,
    )


def usage(stream: Stream, n: int) -> dict[str, Any]:
    """What was read and written, tokens; a prompt counts once however many choices it has."""
    requests = [generation.request for generation in stream.generations]
    prompt = sum(len(request.prompt_token_ids) for request in requests[::n])
    completion = sum(len(request.output_token_ids) for request in requests)
    cached = sum(request.cached_tokens for request in requests[::n])
    return _counts(prompt, completion) | {"prompt_tokens_details": {"cached_tokens": cached}}


class RunningUsage:
    """Usage of each choice as its deltas come, for the chunks of a stream.

    Args:
        stream: what the engine gives.
        body: says whether every chunk has it, only the last one, or none.
    """

    def __init__(self, stream: Stream, body: Sampling) -> None:
        self._generations = stream.generations
        self._body = body
        self._written = [0] * len(stream.generations)

    def grew(self, index: int, delta: Delta) -> dict[str, Any]:
        """The ``usage`` of the chunks of a delta: that of its choice, null, or no such field."""
        self._written[index] += len(delta.token_ids)
        if not self._body.include_usage:
            return {}
        if not self._body.continuous_usage:
            return {"usage": None}
        return {
            "usage": _counts(len(self._generations[index].request.prompt_token_ids), self._written[index])
        }


def _counts(prompt: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def prompt_logprobs(request: Request, count: int, show: Callable[[int], str]) -> list[dict[str, Any] | None]:
    """Log-probabilities of a prompt's tokens in vLLM's form; the rank of one below the top is not known."""

    def entry(found: TokenLogprobs) -> dict[str, Any]:
        ranked = {token: rank for rank, token in enumerate(found.top, start=1)}
        values = dict(list(found.top.items())[:count]) | {found.token_id: found.logprob}
        return {
            str(token): {"logprob": value, "rank": ranked.get(token), "decoded_token": show(token)}
            for token, value in values.items()
        }

    return [None if found is None else entry(found) for found in request.prompt_logprobs]


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """A server-sent event; in ASCII, since some clients end lines at U+2028 or U+0085 too."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def json_of(fields: Mapping[str, Any], lists: Mapping[str, Iterable[Any] | None]) -> bytes:
    """An object as JSON, its long lists piece by piece: other threads run between two pieces."""
    text = [json.dumps(dict(fields), separators=(",", ":"))[:-1]]
    for name, values in lists.items():
        text.append(f',"{name}":')
        if values is None:
            text.append("null")
            continue
        rest, pieces = iter(values), []
        while piece := list(islice(rest, _PIECE)):
            pieces.append(json.dumps(piece, ensure_ascii=False, separators=(",", ":"))[1:-1])
        text.append(f"[{','.join(pieces)}]")
    return "".join([*text, "}"]).encode()


def token_text(tokenizer: Tokenizer | None, as_ids: bool | None = False) -> Callable[[int], str]:
    r"""How a token is shown; bytes that are no text by themselves as OpenAI shows them, ``bytes:\\xe4``."""

    def show(token: int) -> str:
        if tokenizer is None or as_ids:
            return f"token_id:{token}"
        data = tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    return show
