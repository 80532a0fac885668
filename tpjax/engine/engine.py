"""The step loop: runs what the scheduler decides and appends the sampled tokens to their requests."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from tpjax.distributed import process_id
from tpjax.engine.block_manager import BlockManager
from tpjax.engine.masks import pack_mask, without
from tpjax.engine.request import Request, TokenLogprobs
from tpjax.engine.scheduler import PromptChunk, Scheduler, Step
from tpjax.errors import EngineError, RequestError
from tpjax.runtime.rows import NO_TOKEN, Chunk, Row
from tpjax.runtime.runner import Runner
from tpjax.sampling import ALL_MASKED_TOKEN, NAN_TOKEN, NO_HISTORY, Sampled
from tpjax.sampling_params import SamplingParams
from tpjax.step_time import StepTime

log = logging.getLogger(__name__)


class RequestStats(NamedTuple):
    """What a running request holds.

    Attributes:
        slot: its place in the batch.
        pages: cache pages, shared ones included.
        tokens: tokens of its prompt and of its output so far.
        prompt_tokens: tokens of its prompt.
        prefilled: tokens that are in the cache, or in flight, of those to prefill before it can decode.
        to_prefill: the number of these.
    """

    slot: int
    pages: int
    tokens: int
    prompt_tokens: int
    prefilled: int
    to_prefill: int


@dataclass(frozen=True)
class Stats:
    """Load and counters of an engine; counters count from its start.

    Attributes:
        running: requests that hold a slot.
        waiting: requests in the queue.
        slots: requests that can run at once.
        kv_cache_usage: fraction of the cache pages in use, 0 to 1.
        pages: cache pages that requests can use.
        pages_in_use: pages that running requests use; a page that several share counts once.
        pages_cached: pages that nobody uses and the prefix cache keeps until their memory is needed.
        requests: what each running request holds.
        preemptions: preempted requests.
        prefix_queries: prompt tokens looked up in the prefix cache.
        prefix_hits: prompt tokens found there.
        compiles: compiled programs.
    """

    running: int
    waiting: int
    slots: int
    kv_cache_usage: float
    pages: int
    pages_in_use: int
    pages_cached: int
    requests: tuple[RequestStats, ...]
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    compiles: int

    @classmethod
    def of_all(cls, parts: Sequence[Stats]) -> Stats:
        """Returns the stats of several engines together; the slots of each are numbered after the last's."""
        first_slots = accumulate((one.slots for one in parts), initial=0)
        sums = {name: sum(getattr(one, name) for one in parts) for name in _SUMMED}
        requests = (
            request._replace(slot=first + request.slot)
            for first, one in zip(first_slots, parts, strict=False)
            for request in one.requests
        )
        return cls(**sums, kv_cache_usage=sums["pages_in_use"] / sums["pages"], requests=tuple(requests))


_SUMMED = [one.name for one in fields(Stats) if one.name not in ("kv_cache_usage", "requests")]


@dataclass(frozen=True)
class _InFlight:
    """A dispatch whose outputs have not been read.

    Attributes:
        requests: requests that output tokens, each with its row.
        sampled: device arrays [steps, rows, ...].
        steps: how many of the first steps count.
        prompt_logprobs: log-probabilities of prompt chunks, if asked for.
    """

    requests: list[tuple[int, Request]]
    sampled: Sampled
    steps: int
    prompt_logprobs: Sequence[_PromptLogprobs] = ()


class Engine:
    """Continues many prompts at once on one runner.

    The next dispatch starts before the outputs of the last are read, so that the devices do not wait for the
    host; in a pipeline, as many are in flight as there are stages. Only one thread at a time may use an
    engine.

    The device state is donated to each dispatch, so a dispatch that fails leaves no state for anybody: all
    running requests fail, waiting ones keep waiting, and the engine resets: it goes on with a new state and
    an empty prefix cache.

    Args:
        runner: the compiled model.
        max_num_batched_tokens: maximum tokens of a step, decode rows included; ``None``: what
            ``step_time`` predicts to delay decode rows little: see :class:`Scheduler`.
        step_time: predicts the time of a step; ``None``: all tokens are taken to cost the same.

    Attributes:
        runner: as given.
        scheduler: decides what to run.
    """

    def __init__(
        self,
        runner: Runner,
        max_num_batched_tokens: int | None = None,
        step_time: StepTime | None = None,
    ) -> None:
        limits = runner.limits
        self.runner = runner
        self.scheduler = Scheduler(
            limits.max_slots,
            limits.max_model_len,
            limits.usable_chunk_shapes,
            limits.mixed_chunk_shapes,
            limits.score_chunks,
            max_num_batched_tokens,
            _seconds_by_tokens if step_time is None else step_time.seconds,
            limits.steps,
            BlockManager(limits.num_pages, limits.page_size),
            limits.windows,
            history_rows=limits.history_rows,
            stages=limits.stages,
        )
        self._in_flight: deque[_InFlight] = deque()  # the earliest first
        self._outputs: list[tuple[Request, list[int]]] = []  # read, but not yet returned by ``step``
        self._interrupted = False  # a guarded block has not run to its end
        self._state_resets = runner.state_resets
        self._closed = False

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestError: the request can never run.
            EngineError: the engine is closed.
        """
        self.check_open()
        self._set_rope_scaling(request)
        self.scheduler.add(request)

    def cached_pages(self, request: Request) -> int:
        """Returns how many full pages of a request's prompt are in the prefix cache now.

        It may be called on another thread than the one that steps the engine.
        """
        self._set_rope_scaling(request)
        size = self.runner.limits.page_size
        pages = (len(request.prompt_token_ids) - 1) // size
        return self.scheduler.pages.find(request.page_keys(size, pages)[:pages]).blocks

    def _set_rope_scaling(self, request: Request) -> None:
        request.rope_scaling_key = self.runner.config.rope.scaling_key(request.max_length)

    def cancel(self, request: Request) -> None:
        """Ends a request early and releases what it holds; does nothing if it has ended."""
        if request.finish_reason is None:
            request.finish_reason = "abort"
        with self.guarded():
            self.scheduler.finish(request)

    def step(self) -> list[tuple[Request, list[int]]]:
        """Starts the next dispatch and reads the outputs of the one before; of P stages, P dispatches before.

        If that fails, the running requests end with the reason ``error``; an interrupt is raised again.

        Returns:
            Requests with new tokens or that have ended, and their new tokens. An ended request has its
            ``finish_reason`` set.
        """
        try:
            with self.guarded():
                self.scheduler.shapes, self.scheduler.mixed_shapes = self.runner.chunk_shapes()
                work = self.scheduler.schedule()
                if work is not None:
                    self._in_flight.append(self._dispatch(work))
                if work is None or len(self._in_flight) > self.runner.limits.stages:
                    self._read()
        except Exception as error:
            log.exception("a dispatch failed: the running requests end, and the engine resets")
            if not self._outputs and self.scheduler.waiting:  # with nobody running, the first in line is why
                request = self.scheduler.waiting[0]
                self._fail(request, _failure(error))
                self.scheduler.finish(request)
        outputs, self._outputs = self._outputs, []
        return outputs

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Computes the logits after each token, float32 [T, V], in pages of their own.

        Args:
            token_ids: T tokens, at least one.

        Raises:
            RequestError: not enough pages are free.
            EngineError: a dispatch failed; running requests end as in :meth:`step`. Or the engine is closed.
        """
        self.check_open()
        groups, size = self.scheduler.pages, self.runner.limits.usable_chunk_shapes[-1].tokens
        self._reset_if_lost()
        # all that it will hold, now: where pages run short later the state would be taken for lost
        if (held := groups.held(len(token_ids))) > (free := groups.blocks.free):
            raise RequestError(f"{held} cache pages are needed, but {free} are free")
        slot, parts = self.runner.limits.max_slots, []
        try:
            with self.guarded():
                pages = groups.start(groups.find(()), len(token_ids))
                for start in range(0, len(token_ids), size):
                    part = token_ids[start : start + size]
                    groups.give_back(pages, start)
                    groups.extend(pages, start + len(part))
                    row = Row(slot, start, pages, _GREEDY, 0, max_length=len(token_ids))
                    parts.append(self.runner.score(Chunk(row, part)))
                groups.release(pages)
        except Exception as error:
            raise EngineError(_failure(error)) from error
        return np.concatenate(parts)

    def close(self) -> None:
        """Ends all requests, waiting ones too, with an error, and frees the memory of the devices.

        :meth:`step` still returns the requests that have ended so.
        """
        if self._closed:
            return
        self._closed = True
        why = "the model was closed while this request ran"
        self._reset(why)
        for request in list(self.scheduler.waiting):
            self._fail(request, why)
            self.scheduler.finish(request)
        self.runner.close()
        self._state_resets = self.runner.state_resets

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return self._closed

    def check_devices(self) -> None:
        """Runs a step of nothing; it fails if the devices cannot be used any more."""
        with self.guarded():
            self.runner.run_nothing()

    def check_open(self) -> None:
        """Raises an ``EngineError`` if the engine is closed, or only follows another process."""
        if self._closed:
            raise EngineError("the model is closed: its memory has been given back, and nothing can run")
        if process_id():
            raise EngineError(
                f"process {process_id()} has no requests: it runs what process 0 does, in follow()"
            )

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Guards a block that uses the runner or the scheduler: the engine resets if the block fails."""
        self._reset_if_lost()
        self._interrupted = True
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception):
                self.runner.fail(error)
            self._reset(_failure(error))
            raise
        self._interrupted = False

    def _reset_if_lost(self) -> None:
        """Resets if a reset was itself interrupted, or if somebody else made the runner lose its state."""
        if self._interrupted or self.runner.state_resets != self._state_resets:
            self._reset("the state on the devices was lost while this request ran")

    def _reset(self, why: str) -> None:
        """Fails the running requests, and drops the device state and the prefix cache."""
        self._interrupted = True
        self._in_flight.clear()
        self.runner.reset()
        for request in self.scheduler.running:
            self._fail(request, why)
        self.scheduler.reset()
        self._state_resets, self._interrupted = self.runner.state_resets, False

    def _fail(self, request: Request, why: str) -> None:
        """Ends a request with an error."""
        if request.finish_reason is None:
            request.finish_reason, request.error, request.state_lost = "error", why, True
            self._outputs.append((request, []))

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs, or any output has not been returned by :meth:`step`."""
        return self.scheduler.busy or bool(self._in_flight) or bool(self._outputs)

    def stats(self) -> Stats:
        """Returns the present load and the counters."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            slots=self.runner.limits.max_slots,
            kv_cache_usage=1 - blocks.free / blocks.capacity,
            pages=blocks.capacity,
            pages_in_use=blocks.capacity - blocks.free,
            pages_cached=blocks.evictable,
            requests=tuple(
                RequestStats(
                    one.slot,
                    scheduler.pages.count(one.pages),
                    one.num_tokens,
                    len(one.prompt_token_ids),
                    one.prefilled,
                    len(one.prefill_token_ids),
                )
                for one in scheduler.running
                if one.slot is not None
            ),
            preemptions=scheduler.preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            compiles=self.runner.compile_count,
        )

    def _dispatch(self, step: Step) -> _InFlight:
        """Hands a step to the devices, without waiting for it."""
        for chunk in step.chunks:
            if chunk.first:
                self._set_up_slot(chunk.request)
        final = [chunk.request for chunk in step.chunks if chunk.final]
        self._set_masks([*step.decode, *final])
        rows = [_row(one, one.next_position) for one in step.decode]
        if not step.chunks:
            in_flight = _InFlight(_numbered(step.decode), self.runner.decode(rows, step.steps), step.steps)
        else:
            in_flight = self._run_chunks(step, rows)
        self.scheduler.dispatched(step)
        return in_flight

    def _run_chunks(self, step: Step, rows: list[Row]) -> _InFlight:
        """Dispatches a step with prompt chunks."""
        out = self.runner.step(rows, [_chunk(chunk) for chunk in step.chunks])
        ended = [
            (row, chunk.request)
            for row, chunk in zip(out.sampled_at, step.chunks, strict=True)
            if chunk.final
        ]
        scores = []
        if out.scored is not None:
            arrays = out.scored
            scores = [
                _PromptLogprobs(chunk.request, chunk.start, _targets(chunk), first, arrays)
                for first, chunk in zip(out.scored_at, step.chunks, strict=True)
            ]
        return _InFlight([*_numbered(step.decode), *ended], out.sampled, 1, scores)

    def _set_up_slot(self, request: Request) -> None:
        """Uploads a request's history and, if no grammar sets its mask, the tokens before ``min_tokens``."""
        if request.history_row is not None:
            self.runner.set_history(
                request.history_row,
                request.prompt_token_ids,
                request.output_token_ids,
                request.params,
                request.barred_ids,
            )
        if request.grammar is None and request.below_min_tokens:
            mask = without(pack_mask(self.runner.config.vocab_size), request.stop_ids)
            self.runner.set_masks({_slot(request): mask})

    def _set_masks(self, requests: list[Request]) -> None:
        """Uploads the tokens that the requests' grammars allow next."""
        masks = {_slot(one): _mask(one) for one in requests if one.grammar is not None}
        if masks:
            self.runner.set_masks(masks)

    def _read(self) -> None:
        """Waits for the earliest dispatch in flight and appends its tokens to their requests."""
        if not self._in_flight:
            return
        dispatched = self._in_flight.popleft()
        for scores in dispatched.prompt_logprobs:
            scores.read()
        # [steps, rows]; waits: at most as many dispatches as there are stages are ahead
        tokens = np.asarray(dispatched.sampled.tokens)[: dispatched.steps]
        logprobs = None
        if any(request.params.logprobs is not None for _, request in dispatched.requests):
            logprobs = _logprob_arrays(dispatched.sampled)
        for row, request in dispatched.requests:
            if request.finished:
                continue  # it ended, or was cancelled, after the dispatch
            before = len(request.output_token_ids)
            for step, token in enumerate(tokens[:, row].tolist()):
                if token == NO_TOKEN or not _append(request, token):
                    break
                if logprobs is not None and request.params.logprobs is not None:
                    entry = _token_logprobs(token, request.params.logprobs, *(x[step, row] for x in logprobs))
                    request.logprobs.append(entry)
            self._outputs.append((request, request.output_token_ids[before:]))
            if request.finish_reason is not None:
                self.scheduler.finish(request)


_GREEDY = SamplingParams(temperature=0)


def _seconds_by_tokens(rows: int, context: int, prompt_tokens: int, before: int) -> float:
    """Stands in for a prediction: any token takes as long as any other."""
    return float(rows + prompt_tokens)


_ALWAYS = 2**31 - 1  # past every position


def _row(request: Request, position: int) -> Row:
    """Returns a request's row of a dispatch that begins at ``position``; it is kept while it has its slot."""
    row: Row | None = request.row
    if row is not None:
        row.position, row.remaining, row.masked_until = position, request.remaining, _masked_until(request)
        return row
    request.row = row = Row(
        slot=_slot(request),
        position=position,
        pages=request.pages,
        params=request.params,
        seed=request.seed,
        remaining=request.remaining,
        stop_ids=request.stop_ids,
        masked_until=_masked_until(request),
        max_length=request.max_length,
        history_row=NO_HISTORY if request.history_row is None else request.history_row,
    )
    return row


def _chunk(chunk: PromptChunk) -> Chunk:
    """Returns a chunk as the runner takes it."""
    request = chunk.request
    row = _row(request, chunk.start)
    if not chunk.final:  # the next token is known: what is sampled is not used
        row = replace(row, params=_GREEDY, masked_until=0)
    token_ids = request.prefill_token_ids[chunk.start : chunk.stop]
    return Chunk(row, token_ids, _targets(chunk) if request.scores_prompt else None)


def _targets(chunk: PromptChunk) -> list[int]:
    """Returns the tokens one later than those of a chunk."""
    return chunk.request.prefill_token_ids[chunk.start + 1 : chunk.stop + 1]


def _numbered(requests: Sequence[Request]) -> list[tuple[int, Request]]:
    return list(enumerate(requests))


def _append(request: Request, token: int) -> bool:
    """Appends a sampled token to a request that has not ended; else, or if it is no token, returns False."""
    if request.finish_reason is not None:
        return False
    if token == NAN_TOKEN:
        request.finish_reason = "error"
        request.error = f"the model's logits are not numbers after {request.num_tokens} tokens"
    elif token == ALL_MASKED_TOKEN:
        request.finish_reason = "error"
        request.error = f"no token is allowed after {request.num_tokens} tokens: all are masked"
    elif not request.params.max_tokens:  # only the prompt's log-probabilities were asked for
        request.finish_reason = "length"
    else:
        request.append(token)
        return True
    return False


def _masked_until(request: Request) -> int:
    """Returns the position before which only tokens that the slot's mask allows are sampled."""
    if request.grammar is not None:
        return _ALWAYS
    return len(request.prompt_token_ids) + request.params.min_tokens


def _mask(request: Request) -> np.ndarray:
    """Returns what a grammar allows next, without stop tokens before ``min_tokens`` if anything is left."""
    assert request.grammar is not None
    allowed = np.asarray(request.grammar.mask())
    longer = without(allowed, request.stop_ids) if request.below_min_tokens else allowed
    return longer if longer.any() else allowed


@dataclass(frozen=True)
class _PromptLogprobs:
    """Log-probabilities of a prompt chunk, in flight.

    Attributes:
        request: the request.
        start: position of the chunk's first token.
        targets: the token after each of the chunk's tokens.
        first: row of the first target.
        scored: device arrays [tokens, ...] for the targets of all chunks of the step.
    """

    request: Request
    start: int
    targets: Sequence[int]
    first: int
    scored: Sampled

    def read(self) -> None:
        """Waits for the log-probabilities and appends them to the request."""
        request, count = self.request, self.request.params.prompt_logprobs
        assert count is not None
        if not self.start:
            request.prompt_logprobs[:] = [None]  # nothing comes before the first token
        scored = _logprob_arrays(self.scored)
        for index, token in enumerate(self.targets, self.first):
            request.prompt_logprobs.append(_token_logprobs(token, count, *(x[index] for x in scored)))


def _logprob_arrays(sampled: Sampled) -> list[np.ndarray]:
    """Copies log-probabilities to the host: of the token, and ids and log-probabilities of the likeliest."""
    return [np.asarray(x) for x in (sampled.logprobs, sampled.top_tokens, sampled.top_logprobs)]


def _token_logprobs(
    token: int, count: int, own: np.ndarray, top_tokens: np.ndarray, top_logprobs: np.ndarray
) -> TokenLogprobs:
    """Returns the log-probabilities at one position, with the ``count`` likeliest tokens."""
    top = zip(top_tokens[:count].tolist(), top_logprobs[:count].tolist(), strict=True)
    return TokenLogprobs(token, float(own), dict(top))


def _failure(error: BaseException) -> str:
    """Returns one line about an error that occurred while requests ran."""
    if not isinstance(error, Exception):
        return f"interrupted ({type(error).__name__}) while this ran"
    line = next(iter(str(error).splitlines()), "")[:300]
    return f"a dispatch failed while this ran: {type(error).__name__}: {line}"


def _slot(request: Request) -> int:
    assert request.slot is not None
    return request.slot
