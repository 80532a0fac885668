"""The step loop: asks the scheduler what to run, runs it, and hands the tokens to their requests."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tpjax.config import ModelConfig
from tpjax.engine.block_manager import BlockManager
from tpjax.engine.request import Request, TokenLogprobs
from tpjax.engine.scheduler import Decode, Prefill, Scheduler
from tpjax.errors import EngineError
from tpjax.runtime.rows import NO_TOKEN, Row
from tpjax.runtime.runner import Runner
from tpjax.sampling import NAN_TOKEN, NOTHING_ALLOWED, Sampled
from tpjax.sampling_params import SamplingParams

log = logging.getLogger(__name__)

# While others decode, a prompt runs in chunks of this many tokens: what a stream waits for at most.
PREFILL_BUDGET = 64


@dataclass(frozen=True)
class Stats:
    """What an engine is doing.

    Attributes:
        running: requests that hold a slot.
        waiting: requests in the queue.
        slots: requests that can run at once.
        kv_cache_usage: cache pages in use, 0 to 1.
        preemptions: requests that had to give their pages back, since the start.
        prefix_queries: prompt tokens looked up in the cache, since the start.
        prefix_hits: prompt tokens found there.
        compiles: programs compiled, since the start.
    """

    running: int
    waiting: int
    slots: int
    kv_cache_usage: float
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    compiles: int


@dataclass(frozen=True)
class _Launched:
    """Work under way on the devices: what it will give whom."""

    requests: list[Request]
    drawn: Sampled
    scored: _Scored | None = None


class Engine:
    """Continues many prompts at once on one runner.

    The next dispatch is launched before the last one's tokens are read, so that the devices do not wait for
    the host. One thread at a time may use an engine.

    A dispatch takes the devices' state by donation, so one that fails leaves none, for nobody. What ran then
    fails, what waits goes on waiting, and the engine starts over: on a fresh state, with no page known.

    Args:
        runner: the compiled model.
        prefill_budget: most prompt tokens of a dispatch while others decode.
    """

    def __init__(self, runner: Runner, prefill_budget: int = PREFILL_BUDGET) -> None:
        limits = runner.limits
        self.runner = runner
        self.scheduler = Scheduler(
            limits.max_slots,
            limits.max_model_len,
            runner.chunk_sizes,
            prefill_budget,
            limits.steps,
            BlockManager(limits.num_pages, limits.page_size),
        )
        self._under_way: _Launched | None = None
        self._grown: list[tuple[Request, list[int]]] = []  # read, and not yet handed out
        self._torn = False  # something has not run to its end
        self._losses = runner.losses

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestError: it can never run.
        """
        request.rope_scaling_key = self.runner.config.rope_scaling_key(request.most_tokens)
        self.scheduler.add(request)

    def cancel(self, request: Request) -> None:
        """Ends a request early and frees what it holds; does nothing for one that has ended."""
        if request.finish_reason is None:
            request.finish_reason = "abort"
        with self.guarded():
            self.scheduler.finish(request)

    def step(self) -> list[tuple[Request, list[int]]]:
        """Launches a dispatch, and reads the one launched before it.

        Where that fails, the requests that ran end with the reason ``error``; an interrupt is raised again.

        Returns:
            The requests that got tokens, and those tokens; an ended request has its ``finish_reason`` set.
        """
        try:
            with self.guarded():
                work = self.scheduler.schedule()
                launched = None if work is None else self._launch(work)
                self._read()
                self._under_way = launched
        except Exception as error:
            log.exception("a dispatch failed: the requests that ran end, and the engine starts over")
            if not self._grown and self.scheduler.waiting:  # what fails with nobody running fails for ever
                request = self.scheduler.waiting[0]
                self._fail(request, _what_failed(error))
                self.scheduler.finish(request)
        grown, self._grown = self._grown, []
        return grown

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits after each of at least one token, in pages of their own; float32 [T, V].

        Raises:
            RequestError: not enough pages are free.
            EngineError: a dispatch failed; requests that ran end as they do in :meth:`step`.
        """
        blocks, chunk = self.scheduler.blocks, self.runner.chunk_sizes[-1]
        self._mend()
        pages = blocks.allocate(blocks.pages_for(len(tokens)))
        slot = self.runner.limits.max_slots
        try:
            with self.guarded():
                parts = [
                    self.runner.score(
                        Row(slot, start, pages, _GREEDY, 0, max_length=len(tokens)),
                        tokens[start : start + chunk],
                    )
                    for start in range(0, len(tokens), chunk)
                ]
                blocks.release(pages)
        except Exception as error:
            raise EngineError(_what_failed(error)) from error
        return np.concatenate(parts)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Runs a block that uses the runner, or changes who holds what; starts over where it fails."""
        self._mend()
        self._torn = True
        try:
            yield
        except BaseException as error:
            self._start_over(_what_failed(error))
            raise
        self._torn = False

    def _mend(self) -> None:
        """Starts over where that was interrupted too, or where others lost the state."""
        if self._torn or self.runner.losses != self._losses:
            self._start_over("the state on the devices was lost while this request ran")

    def _start_over(self, why: str) -> None:
        """Ends the requests that run, and forgets what the devices hold."""
        self._torn = True
        self._under_way = None
        self.runner.reset()
        for request in self.scheduler.running:
            self._fail(request, why)
        self.scheduler.reset()
        self._losses, self._torn = self.runner.losses, False

    def _fail(self, request: Request, why: str) -> None:
        if request.finish_reason is None:
            request.finish_reason, request.error, request.lost = "error", why, True
            self._grown.append((request, []))

    @property
    def busy(self) -> bool:
        """Whether anything waits, runs, has not been read, or has not been handed out."""
        return self.scheduler.busy or self._under_way is not None or bool(self._grown)

    def stats(self) -> Stats:
        """What the engine is doing now."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            slots=self.runner.limits.max_slots,
            kv_cache_usage=1 - blocks.free / blocks.capacity,
            preemptions=scheduler.preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            compiles=self.runner.compile_count,
        )

    def _launch(self, work: Prefill | Decode) -> _Launched:
        launched = self._prefill(work) if isinstance(work, Prefill) else self._decode(work)
        self.scheduler.launched(work)
        return launched

    def _prefill(self, work: Prefill) -> _Launched:
        request, runner = work.request, self.runner
        if work.first and request.params.needs_history:
            runner.set_history(
                _slot(request), request.prompt_ids, request.output_ids, request.params, request.barred_ids
            )
        if work.first and request.grammar is None and request.must_go_on:
            runner.set_masks({_slot(request): _without(_all_of(self.runner.config), request.stop_ids)})
        # what follows an inner chunk is known: nothing is drawn that counts
        params = request.params if work.final else _GREEDY
        if work.final:
            self._allow([request])
        row = Row(
            slot=_slot(request),
            position=work.start,
            pages=request.pages,
            params=params,
            seed=request.seed,
            masked_until=_masked_until(request) if work.final else 0,
            max_length=request.most_tokens,
        )
        tokens = request.prefill_ids[work.start : work.stop]
        grows = [request] if work.final else []
        if request.params.prompt_logprobs is None or request.output_ids:
            return _Launched(grows, runner.prefill(row, tokens))
        targets = request.prefill_ids[work.start + 1 : work.stop + 1]
        drawn, scores = runner.prefill_and_score(row, tokens, targets)
        return _Launched(grows, drawn, _Scored(request, work.start, targets, scores))

    def _decode(self, work: Decode) -> _Launched:
        self._allow(work.requests)
        rows = [
            Row(
                slot=_slot(request),
                position=request.next_position,
                pages=request.pages,
                params=request.params,
                seed=request.seed,
                remaining=request.remaining,
                stop_ids=request.stop_ids,
                masked_until=_masked_until(request),
                max_length=request.most_tokens,
            )
            for request in work.requests
        ]
        return _Launched(work.requests, self.runner.decode(rows, work.steps))

    def _allow(self, requests: list[Request]) -> None:
        """Uploads what the grammars among them allow next."""
        bound = {_slot(one): _mask(one) for one in requests if one.grammar is not None}
        if bound:
            self.runner.set_masks(bound)

    def _read(self) -> None:
        """Waits for the work under way and gives each request its own, up to what ends it."""
        work, self._under_way = self._under_way, None
        if work is None:
            return
        if work.scored is not None:
            work.scored.read()
        tokens = np.asarray(work.drawn.tokens)  # [steps, B]; waits, so that no more than one is ahead
        reported = None
        if any(request.params.logprobs is not None for request in work.requests):
            reported = _host(work.drawn)
        for row, request in enumerate(work.requests):
            if request.finish_reason is not None:
                continue  # it ended, or was cancelled, after this was launched
            before = len(request.output_ids)
            for step, token in enumerate(tokens[:, row].tolist()):
                if token == NO_TOKEN or request.finish_reason is not None:
                    break
                if token == NAN_TOKEN:
                    request.finish_reason = "error"
                    request.error = f"the model's logits are not numbers after {_length(request)} tokens"
                    break
                if token == NOTHING_ALLOWED:
                    request.finish_reason = "error"
                    request.error = f"no token is allowed after {_length(request)} tokens: all are masked"
                    break
                if not request.params.max_tokens:  # only the prompt's log-probabilities were asked for
                    request.finish_reason = "length"
                    break
                request.append(token)
                if reported is not None and request.params.logprobs is not None:
                    entry = _logprobs(token, request.params.logprobs, *(x[step, row] for x in reported))
                    request.logprobs.append(entry)
            self._grown.append((request, request.output_ids[before:]))
            if request.finish_reason is not None:
                self.scheduler.finish(request)


_GREEDY = SamplingParams(temperature=0)
_ALWAYS = 2**31 - 1  # past every position


def _masked_until(request: Request) -> int:
    """The position before which a request draws only what its slot's mask allows."""
    return _ALWAYS if request.grammar is not None else len(request.prompt_ids) + request.params.min_tokens


def _mask(request: Request) -> np.ndarray:
    """What a request's grammar allows next; no end before ``min_tokens``, unless there is nothing else."""
    assert request.grammar is not None
    allowed = np.asarray(request.grammar.mask())
    longer = _without(allowed, request.stop_ids) if request.must_go_on else allowed
    return longer if longer.any() else allowed


def _all_of(config: ModelConfig) -> np.ndarray:
    return np.full(-(-config.vocab_size // 32), 0xFFFFFFFF, np.uint32)


def _without(mask: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """A mask, uint32 [ceil(V / 32)], with the bits of these tokens cleared."""
    mask, places = mask.copy(), np.array([token for token in tokens if token < 32 * len(mask)], np.uint32)
    np.bitwise_and.at(mask, places // 32, ~(np.uint32(1) << places % 32))
    return mask


@dataclass(frozen=True)
class _Scored:
    """Log-probabilities of a chunk of a prompt, on their way from the devices."""

    request: Request
    start: int
    targets: list[int]
    scores: Sampled

    def read(self) -> None:
        """Waits for them and gives them to the request."""
        request, count = self.request, self.request.params.prompt_logprobs
        assert count is not None
        if not self.start:
            request.prompt_logprobs[:] = [None]  # nothing comes before the first token
        scores = _host(self.scores)
        for at, token in enumerate(self.targets):
            request.prompt_logprobs.append(_logprobs(token, count, *(x[at] for x in scores)))


def _host(drawn: Sampled) -> list[np.ndarray]:
    return [np.asarray(x) for x in (drawn.logprobs, drawn.top_tokens, drawn.top_logprobs)]


def _logprobs(
    token: int, count: int, own: np.ndarray, top_tokens: np.ndarray, top_logprobs: np.ndarray
) -> TokenLogprobs:
    top = zip(top_tokens[:count].tolist(), top_logprobs[:count].tolist(), strict=True)
    return TokenLogprobs(token, float(own), dict(top))


def _what_failed(error: BaseException) -> str:
    """One line about an error that was met while requests ran."""
    if not isinstance(error, Exception):
        return f"interrupted ({type(error).__name__}) while this ran"
    line = next(iter(str(error).splitlines()), "")[:300]
    return f"a dispatch failed while this ran: {type(error).__name__}: {line}"


def _slot(request: Request) -> int:
    assert request.slot is not None
    return request.slot


def _length(request: Request) -> int:
    return len(request.prompt_ids) + len(request.output_ids)
