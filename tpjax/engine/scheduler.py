"""Decides what to run next. Plain Python, no jax."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tpjax.engine.block_manager import BlockManager, PageKey
from tpjax.engine.page_groups import PageGroups
from tpjax.engine.request import Request
from tpjax.errors import ContextLengthError, RequestError
from tpjax.sampling_params import SamplingParams


@dataclass(frozen=True)
class PromptChunk:
    """Runs tokens ``start`` to ``stop`` of a request's ``prefill_token_ids``.

    Attributes:
        request: the request.
        start: index of the first token.
        stop: one past the last.
        first: whether it is the first work since the request got its slot.
        final: whether the token after these is sampled.
    """

    request: Request
    start: int
    stop: int
    first: bool
    final: bool


@dataclass(frozen=True)
class Step:
    """One dispatch: samples the next tokens of some requests, and runs parts of the prompts of others.

    Attributes:
        decode: requests that are decoded.
        steps: tokens that each of them samples; 1 if there are chunks.
        chunks: parts of prompts.
    """

    decode: list[Request]
    steps: int = 1
    chunks: list[PromptChunk] = field(default_factory=list)


# How much longer than without prompt tokens a step may take that has both.
MOST_DELAY = 2.0
FAIR_RATE = 0.5  # of the most prompt tokens a second that a step could run


class ChunkSizes(Protocol):
    """The shapes of prompt chunks that a step is compiled for, as ``runtime.limits.ChunkShape``."""

    @property
    def rows(self) -> int:
        """Chunks of a step."""
        ...

    @property
    def length(self) -> int:
        """Tokens of a chunk."""
        ...


class Scheduler:
    """Schedules requests over slots and cache pages: lowest priority first, then first come, first served.

    A step takes all requests that can decode and, up to a budget of tokens, parts of prompts in order of
    rank: short prompts share a step, a long one takes several. An admitted request holds pages for its prompt
    only; if pages run out, the last of them is preempted: it releases its pages, waits again, and its tokens
    are recomputed (or found in the prefix cache) when it is admitted again.

    A request with penalties or biases takes a row of the device's history as well. Where none is free it
    waits, and so does what comes after it: nobody is overtaken.

    The devices run behind the host: ``Request.dispatched_tokens`` counts what has been dispatched,
    ``output_token_ids`` holds what has been read. Rows with a grammar, which has to see each token before the
    next is dispatched, do not hold up the others. Pages can be reassigned while a dispatch that writes to
    them is in flight: the devices execute dispatches in order.

    In a pipeline of P stages, rows form P groups. A step decodes one of them: of the rows that took part in
    none of the last P - 1 steps, at most a P-th of all, those first that have waited longest. Its tokens have
    then passed all stages when it is dispatched, or are about to, while each stage runs another group; steps
    with parts of prompts count like others. Groups are not kept: rows that come and go even out.

    Args:
        max_slots: requests that run at once.
        max_model_len: longest sequence, tokens.
        shapes: shapes of prompt chunks of a step that decodes nothing, ascending.
        mixed_shapes: shapes beside decode rows, ascending.
        score_shape: the shape of a step with prompt log-probabilities.
        max_num_batched_tokens: tokens of a step, decode rows included; at least a page of a prompt runs in
            any case. ``None``: without decode rows as many as a shape has; beside them the prompt tokens with
            which the step is predicted to take at most twice as long as without, but the smallest shape and
            half a page in any case.
        seconds: predicts the seconds of a step from its decode rows, the keys that they attend to together,
            its prompt tokens, and the tokens of that prompt before them.
        steps: decode steps of a long dispatch, which is used if nothing can come in between.
        blocks: the cache pages.
        windows: window of each page group: see :mod:`tpjax.engine.page_groups`.
        history_rows: requests with penalties or biases that run at once; ``None``: ``max_slots``.
        stages: pipeline stages, P.

    Attributes:
        shapes: as given; may change between steps.
        mixed_shapes: as given; may change between steps.
        max_model_len: as given.
        steps: as given.
        blocks: as given.
        pages: gives requests their pages in each page group.
        waiting: queued requests, in order of rank.
        running: requests that hold a slot, in order of rank.
        preemptions: number of preemptions so far.
        prefix_queries: prompt tokens looked up in the prefix cache so far; those of preempted requests once.
        prefix_hits: prompt tokens found there so far.
    """

    def __init__(
        self,
        max_slots: int,
        max_model_len: int,
        shapes: Sequence[ChunkSizes],
        mixed_shapes: Sequence[ChunkSizes],
        score_shape: ChunkSizes,
        max_num_batched_tokens: int | None,
        seconds: Callable[[int, int, int, int], float],
        steps: int,
        blocks: BlockManager,
        windows: Sequence[int | None] = (None,),
        history_rows: int | None = None,
        stages: int = 1,
    ) -> None:
        step_tokens = max(shape.rows * shape.length for shape in (*shapes, *mixed_shapes, score_shape))
        self.pages = PageGroups(blocks, windows, step_tokens)
        self.max_model_len = max_model_len
        self.steps = steps
        self.blocks = blocks
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.shapes = shapes
        self.mixed_shapes = mixed_shapes
        self._score_shape = score_shape
        self._max_num_batched_tokens = max_num_batched_tokens
        self._seconds = seconds
        self._max_slots = max_slots
        self._history_rows = max_slots if history_rows is None else history_rows
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._free_history_rows = list(range(self._history_rows - 1, -1, -1))
        self._arrivals = itertools.count()
        self._stages = stages
        self._steps = 0  # dispatched so far
        # head of the queue and ``blocks.changes`` when it did not fit: it cannot fit before they change
        self._did_not_fit: tuple[Request, int] | None = None

    def check(self, request: Request) -> None:
        """Checks that a request can ever run.

        Raises:
            RequestError: the prompt is empty, or the request does not fit the cache.
            ContextLengthError: prompt and output do not fit the context.
        """
        prompt, limit = len(request.prompt_token_ids), self.max_model_len
        if not prompt:
            raise RequestError("the prompt is empty: it has 0 tokens, and at least 1 is needed")
        if prompt > limit or (prompt == limit and request.params.max_tokens):
            raise ContextLengthError(
                f"the prompt has {prompt} tokens, but max_model_len={limit} leaves no room to answer"
            )
        if request.max_length > limit:
            raise ContextLengthError(
                f"the prompt has {prompt} tokens and max_tokens={request.params.max_tokens}: together "
                f"{request.max_length}, over max_model_len={limit}"
            )
        needed = self.pages.held(request.max_length)
        if needed > self.blocks.capacity:
            raise RequestError(
                f"the request needs {needed} cache pages, but there are {self.blocks.capacity}"
            )

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestError: it can never run.
        """
        self.check(request)
        request.arrival = next(self._arrivals)
        self._enqueue(request)

    def schedule(self) -> Step | None:
        """Returns the next step, or ``None`` if there is none before more outputs have been read."""
        self._admit()
        decoding = self._decodable()
        chunks = self._chunks(decoding)
        decoding, chunks, steps = self._reserve(
            decoding, chunks, 1 if chunks else self._steps_ahead(decoding)
        )
        return Step(decoding, steps, chunks) if decoding or chunks else None

    def dispatched(self, step: Step) -> None:
        """Records that a step has been dispatched."""
        self._steps += 1
        for one in step.decode:
            one.last_step = self._steps
            one.dispatched_tokens += min(step.steps, one.remaining)
        for chunk in step.chunks:
            chunk.request.last_step = self._steps
            chunk.request.prefilled = chunk.stop
            chunk.request.dispatched_tokens += chunk.final
            self._insert_prefix(chunk.request)

    def finish(self, request: Request) -> None:
        """Releases what an ended or cancelled request holds, if it holds anything.

        After an interrupt anywhere in it, :meth:`reset` finds the request in a queue, or holding nothing.
        """
        runs = request.slot is not None
        if request.finish_reason != "error":
            self._insert_prefix(request)
        self._release(request)
        if runs:
            self.running.remove(request)
        elif request.queued:
            request.queued = False
            with contextlib.suppress(ValueError):  # an interrupt came before it was queued
                self.waiting.remove(request)

    def reset(self) -> None:
        """Drops the running requests and the content of all pages; waiting requests keep waiting."""
        ran = set(self.running)
        self.waiting = deque(one for one in self.waiting if one not in ran)
        for one in (*ran, *self.waiting):
            one.slot, one.history_row, one.row, one.queued = None, None, None, one not in ran
            one.pages, one.dispatched_tokens = [], len(one.output_token_ids)
        self.blocks.clear()
        self._free_slots = list(range(self._max_slots - 1, -1, -1))
        self._free_history_rows = list(range(self._history_rows - 1, -1, -1))
        self._did_not_fit = None
        self.running = []

    def _insert_prefix(self, request: Request) -> None:
        """Inserts a running request's full, computed pages into the prefix cache."""
        if request.slot is None:
            return
        known = request.num_tokens - 1  # the last one has not been fed
        computed = request.prefilled if request.prefilling else max(request.prefilled, known)
        pages = min(computed // self.blocks.page_size, max(map(len, request.pages)))
        if pages > request.inserted_pages:
            keys = request.page_keys(self.blocks.page_size, pages)[:pages]
            self.pages.insert(request.pages, request.inserted_pages, keys)
            request.inserted_pages = pages

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)

    def _admit(self) -> None:
        """Gives slots and pages to the head of the queue, as long as it fits."""
        while self.waiting and self._free_slots and self._admit_head():
            pass

    def _admit_head(self) -> bool:
        """Gives a slot, pages and, if it needs one, a history to the first in the queue, if they are free."""
        request, blocks = self.waiting[0], self.blocks
        needs_history = request.params.needs_history
        if needs_history and not self._free_history_rows:
            return False
        if self._did_not_fit == (request, blocks.changes):
            return False
        if request.unread:  # preempted while several steps were in flight: it still has tokens to come
            return False
        tokens, page_size = request.num_tokens, blocks.page_size
        found = self.pages.find(())
        if not request.scores_prompt:
            # the last token is always run: the next one is sampled from its logits
            pages = (tokens - 1) // page_size
            keys = request.page_keys(page_size, pages)[:pages]
            found = self.pages.find(keys)
            if found.blocks < pages and self._is_prefilled(found.blocks, keys[found.blocks]):
                return False  # another is running just that page: it will be found then
        # one block for each running request that may need another: else its next step would preempt this one
        spare = sum(len(one.pages[0]) < blocks.pages_for(one.max_length) for one in self.running)
        needed = self.pages.missing_at_start(found, tokens) + spare * len(self.pages.windows)
        if needed > blocks.free - sum(map(blocks.count_evictable, found.pages)):
            self._did_not_fit = (request, blocks.changes)
            return False
        request.pages = self.pages.start(found, tokens)
        request.slot = self._free_slots.pop()
        request.history_row = self._free_history_rows.pop() if needs_history else None
        request.prefill_token_ids = request.token_ids(0, tokens)
        request.prefill_start = request.prefilled = found.blocks * page_size
        request.inserted_pages = found.blocks
        request.dispatched_tokens = len(request.output_token_ids)
        if request.cached_tokens is None:
            request.cached_tokens = request.prefilled
            self.prefix_queries += tokens
            self.prefix_hits += request.prefilled
        self.running.append(request)
        self.running.sort(key=lambda one: one.rank)
        self.waiting.popleft()
        request.queued = False
        return True

    def _is_prefilled(self, block: int, key: PageKey) -> bool:
        """Whether a running request will insert this block's page when its prompt has been run."""
        page_size = self.blocks.page_size
        return any(
            one.page_keys(page_size, block + 1)[block] == key
            for one in self.running
            if one.prefilling and one.inserted_pages <= block < len(one.prefill_token_ids) // page_size
        )

    def _decodable(self) -> list[Request]:
        """Returns the requests whose next token can be dispatched before more outputs have been read.

        A grammar has to see its row's last token first. Rows with a grammar are dispatched together, once all
        of them have been read; the others go on by themselves in the meantime. Nobody waits for the token
        after a prompt: where every step ends a prompt, rows with a grammar would wait until the last one.
        """
        if self._stages > 1:
            return self._next_group()
        constrained = [one for one in self.running if one.grammar is not None]
        wait = any(one.unread and one.decoded for one in constrained)
        return [
            one for one in self.running if one.decodable and (one.grammar is None or not (wait or one.unread))
        ]

    def _next_group(self) -> list[Request]:
        """Returns the rows of a pipeline's next step.

        If all that could go on are in the last steps, there are fewer rows than stages: then those of the
        earliest of these steps, one step ahead of what has been read.
        """
        decoding = [one for one in self.running if not one.prefilling]
        ready = [one for one in decoding if one.decodable and not (one.grammar is not None and one.unread)]
        ready.sort(key=lambda one: one.last_step)
        share = -(-len(decoding) // self._stages)
        group = [one for one in ready if not one.unread or one.last_step <= self._steps - self._stages + 1]
        if group or any(one.prefilling for one in self.running):
            return group[:share]
        ahead = [one for one in ready if one.dispatched_tokens == len(one.output_token_ids) + 1]
        return [one for one in ahead if one.last_step == ahead[0].last_step][:share]

    def _steps_ahead(self, decoding: list[Request]) -> int:
        """Returns the steps of the next decode dispatch: 1 if something could be done in between."""
        constrained = sum(one.grammar is not None for one in self.running)
        if constrained > len(decoding) or any(one.grammar is not None for one in decoding):
            return 1  # the next step needs the host, or few would go ahead while many wait
        if self.waiting and any(one.remaining < self.steps for one in self.running):
            return 1  # one reaches its length before the last step, or has already: its slot becomes free
        return self.steps

    def prompt_spans(self, tokens: int) -> list[tuple[int, int]]:
        """Returns the parts in which a prompt of that many tokens runs if nothing runs beside it."""
        request = Request((), SamplingParams(max_tokens=1), seed=0, prefill_token_ids=[0] * tokens)
        spans = []
        while request.prefilling:
            (chunk,) = self._best_chunks([], [request])
            spans.append((chunk.start, chunk.stop))
            request.prefilled = chunk.stop
        return spans

    def _chunks(self, decoding: list[Request]) -> list[PromptChunk]:
        """Returns the parts of prompts that run next."""
        waiting = [one for one in self.running if one.prefilling]
        if not waiting:
            return []
        if waiting[0].scores_prompt:  # alone among prompts: the logits of all tokens are held at once
            return self._fill(self._score_shape, waiting[:1])
        unscored = itertools.takewhile(lambda one: not one.scores_prompt, waiting)
        return self._best_chunks(decoding, list(unscored))

    def _best_chunks(self, decoding: list[Request], requests: list[Request]) -> list[PromptChunk]:
        """Returns the parts of the requests' prompts that run next: as many tokens as at a fair rate.

        Of the shapes that run at least half as many tokens a second as the best does, the one that runs most:
        a larger one that is partly padding is better than two steps.
        """
        rows, context = len(decoding), sum(one.next_position + 1 for one in decoding)
        each = (
            (shape, self._fill(shape, requests)) for shape in (self.mixed_shapes if decoding else self.shapes)
        )
        filled = {shape: chunks for shape, chunks in each if chunks}
        # the time of a step does not depend on how much of it is padding
        seconds = {
            shape: self._seconds(
                rows, context, shape.rows * shape.length, max(chunk.start for chunk in chunks)
            )
            for shape, chunks in filled.items()
        }
        alone = self._seconds(rows, context, 0, 0) if decoding else 0.0
        candidates = [
            (_tokens(filled[shape]) / seconds[shape], filled[shape])
            for shape in self._affordable(seconds, rows, alone)
        ]
        least = max(rate for rate, _ in candidates) * FAIR_RATE
        return max((chunks for rate, chunks in candidates if rate >= least), key=_tokens)

    def _affordable(self, seconds: dict[ChunkSizes, float], rows: int, alone: float) -> list[ChunkSizes]:
        """Returns the shapes that a step may take beside its decode rows; at least one."""
        most = self._max_num_batched_tokens
        if most is not None:
            limit = max(most - rows, self.blocks.page_size)
            return [shape for shape in seconds if shape.rows * shape.length <= limit] or [*seconds][:1]
        if not rows:
            return list(seconds)
        first, *larger = seconds
        always = self.blocks.page_size // 2
        affordable = (
            shape
            for shape in larger
            if shape.rows * shape.length <= always or seconds[shape] <= MOST_DELAY * alone
        )
        return [first, *affordable]

    def _fill(self, shape: ChunkSizes, requests: list[Request]) -> list[PromptChunk]:
        """Returns parts of the requests' prompts, in their order, that fill a shape."""
        page_size, left, chunks = self.blocks.page_size, shape.rows, []
        for request in requests:
            start, end = request.prefilled, len(request.prefill_token_ids)
            if start % min(shape.length, page_size):
                break  # a chunk begins where its shape allows one
            stop = min(end, start + left * shape.length)
            if stop < end and stop - stop % page_size > start:
                stop -= stop % page_size
            left -= -(-(stop - start) // shape.length)
            first = start == request.prefill_start
            chunks.append(PromptChunk(request, start, stop, first=first, final=stop == end))
            if not left or stop < end:
                break
        return chunks

    def _reserve(
        self, decoding: list[Request], chunks: list[PromptChunk], steps: int
    ) -> tuple[list[Request], list[PromptChunk], int]:
        """Allocates the pages of the next steps; takes fewer steps, or preempts, if pages run out.

        Returns:
            The requests that still run, decoded and prefilled, and the number of steps.
        """
        pages, blocks = self.pages, self.blocks

        def short(steps: int) -> list[tuple[Request, int, int]]:
            """Decoded requests that lack pages, where their positions end, and how many pages they lack."""
            ends = ((one, one.next_position + min(steps, one.remaining)) for one in decoding)
            counted = ((one, end, pages.missing(one.pages, end)) for one, end in ends)
            return [each for each in counted if each[2]]

        for one in decoding:
            self._give_back(one, one.next_position)
        for chunk in chunks:
            self._give_back(chunk.request, chunk.start)
        growing = short(steps)
        if sum(missing for *_, missing in growing) > blocks.free:
            steps, growing = 1, short(1)
        for one, end in [*((one, end) for one, end, _ in growing), *((c.request, c.stop) for c in chunks)]:
            while one.slot is not None and pages.missing(one.pages, end) > blocks.free:
                self._preempt(self.running[-1])
            if one.slot is not None:
                pages.extend(one.pages, end)
        decoding = [one for one in decoding if one.slot is not None]
        return decoding, [chunk for chunk in chunks if chunk.request.slot is not None], steps

    def _give_back(self, request: Request, position: int) -> None:
        """Gives back the pages that no token at ``position`` or later sees; the prefix cache keeps them."""
        if self.pages.unseen(request.pages, position):
            self._insert_prefix(request)
            self.pages.give_back(request.pages, position)

    def _preempt(self, request: Request) -> None:
        """Takes slot and pages from a running request and queues it again."""
        self._enqueue(request)
        self.running.remove(request)
        self._insert_prefix(request)
        self._release(request)
        request.prefill_token_ids, request.prefilled = [], 0
        self.preemptions += 1

    def _enqueue(self, request: Request) -> None:
        """Queues a request in order of rank: usually last, or first if it was preempted."""
        request.queued = True
        if self.waiting and request.rank < self.waiting[0].rank:
            self.waiting.appendleft(request)
            return
        at = len(self.waiting)
        while at and self.waiting[at - 1].rank > request.rank:
            at -= 1
        self.waiting.insert(at, request)

    def _release(self, request: Request) -> None:
        """Releases the slot and pages of a request."""
        if request.slot is not None:
            self._free_slots.append(request.slot)
            request.slot = None
        request.row = None
        if request.history_row is not None:
            self._free_history_rows.append(request.history_row)
            request.history_row = None
        pages, request.pages = request.pages, []
        self.pages.release(pages)


def _tokens(chunks: Sequence[PromptChunk]) -> int:
    return sum(chunk.stop - chunk.start for chunk in chunks)
