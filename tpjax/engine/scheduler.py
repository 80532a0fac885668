"""Decides what to run next. Plain Python, no jax."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tpjax.engine.block_manager import BlockManager
from tpjax.engine.request import Request
from tpjax.errors import ContextLengthError, RequestError


@dataclass(frozen=True)
class Prefill:
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
class Decode:
    """Samples the next ``steps`` tokens of these requests."""

    requests: list[Request]
    steps: int


class Scheduler:
    """Schedules requests over slots and cache pages: lowest priority first, then first come, first served.

    One prompt is prefilled at a time, in chunks; while others decode, chunks are small and alternate with
    decode steps, so that a long prompt does not stall them. An admitted request holds pages for its prompt
    only; if pages run out, the last of them is preempted: it releases its pages, waits again,
    and its tokens are recomputed (or found in the prefix cache) when it is admitted again.

    The devices run behind the host: ``Request.dispatched_tokens`` counts what has been dispatched,
    ``output_token_ids`` holds what has been read. Rows with a grammar, which has to see each token before the
    next is dispatched, do not hold up the others. Pages can be reassigned while a dispatch that writes to
    them is in flight: the devices execute dispatches in order.

    Args:
        max_slots: requests that run at once.
        max_model_len: longest sequence, tokens.
        chunk_sizes: prefill sizes, ascending; each divides the page size or is a multiple of it.
        budget: maximum tokens of a prefill while others decode.
        steps: decode steps of a long dispatch, which is used if nothing can come in between.
        blocks: the cache pages.

    Attributes:
        max_model_len: as given.
        chunk_sizes: as given.
        budget: as given, but at least the smallest chunk.
        steps: as given.
        blocks: as given.
        waiting: queued requests, in order of rank.
        running: requests that hold a slot, in order of rank.
        preemptions: number of preemptions so far.
        prefix_queries: prompt tokens looked up in the prefix cache so far.
        prefix_hits: prompt tokens found there so far.
    """

    def __init__(
        self,
        max_slots: int,
        max_model_len: int,
        chunk_sizes: Sequence[int],
        budget: int,
        steps: int,
        blocks: BlockManager,
    ) -> None:
        self.max_model_len = max_model_len
        self.chunk_sizes = tuple(chunk_sizes)
        self.budget = max(budget, chunk_sizes[0])
        self.steps = steps
        self.blocks = blocks
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._max_slots = max_slots
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._arrivals = itertools.count()
        self._decode_next = False
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
        needed = self.blocks.pages_for(request.max_length)
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

    def schedule(self) -> Prefill | Decode | None:
        """Returns the next work, or ``None`` if there is none before more outputs have been read."""
        self._admit()
        prefilling = next((one for one in self.running if one.prefilling), None)
        decoding = self._decodable()
        if prefilling is not None and not (decoding and self._decode_next):
            self._decode_next = True
            return self._prefill(prefilling, self.budget if decoding else self.chunk_sizes[-1])
        self._decode_next = False
        steps = 1 if prefilling is not None else self._steps_ahead(decoding)
        decoding, steps = self._reserve(decoding, steps)
        if not decoding:
            return None
        return Decode(decoding, steps)

    def dispatched(self, work: Prefill | Decode) -> None:
        """Records that work has been dispatched."""
        if isinstance(work, Decode):
            for one in work.requests:
                one.dispatched_tokens += min(work.steps, one.remaining)
            return
        work.request.prefilled = work.stop
        work.request.dispatched_tokens += work.final
        self._insert_prefix(work.request)

    def finish(self, request: Request) -> None:
        """Releases what an ended or cancelled request holds, if it holds anything."""
        if request.slot is not None:
            self.running.remove(request)
        elif request.queued:
            request.queued = False
            self.waiting.remove(request)
        if request.finish_reason != "error":
            self._insert_prefix(request)
        self._release(request)

    def reset(self) -> None:
        """Drops the running requests and the content of all pages; waiting requests keep waiting."""
        ran = set(self.running)
        self.waiting = deque(one for one in self.waiting if one not in ran)
        for one in (*ran, *self.waiting):
            one.slot, one.queued = None, one not in ran
            one.pages.clear()
        self.blocks.clear()
        self._free_slots = list(range(self._max_slots - 1, -1, -1))
        self._did_not_fit = None
        self.running = []

    def _insert_prefix(self, request: Request) -> None:
        """Inserts a running request's full, computed pages into the prefix cache."""
        if request.slot is None:
            return
        known = request.num_tokens - 1  # the last one has not been fed
        computed = request.prefilled if request.prefilling else max(request.prefilled, known)
        pages = min(computed // self.blocks.page_size, len(request.pages))
        keys = request.page_keys(self.blocks.page_size, pages)
        for index in range(request.inserted_pages, pages):
            self.blocks.insert(request.pages[index], keys[index])
        request.inserted_pages = max(request.inserted_pages, pages)

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)

    def _admit(self) -> None:
        """Gives a slot and pages to the head of the queue, if it fits and nobody is prefilling.

        One prefill at a time: the next then finds the pages of the one before in the prefix cache.
        """
        if not (self.waiting and self._free_slots) or any(one.prefilling for one in self.running):
            return
        request, blocks = self.waiting[0], self.blocks
        if self._did_not_fit == (request, blocks.changes):
            return
        tokens, page_size = request.num_tokens, blocks.page_size
        found: list[int] = []
        if request.params.prompt_logprobs is None:  # these need the logits of every token
            # the last token is always run: the next one is sampled from its logits
            pages = (tokens - 1) // page_size
            found = blocks.find(request.page_keys(page_size, pages)[:pages])
        new = blocks.pages_for(tokens) - len(found)
        # one page for each running request that may need another: else its next step would preempt this one
        spare = sum(len(one.pages) < blocks.pages_for(one.max_length) for one in self.running)
        if new + spare > blocks.free - blocks.count_evictable(found):
            self._did_not_fit = (request, blocks.changes)
            return
        request.pages = blocks.acquire(found) + blocks.allocate(new)
        request.slot = self._free_slots.pop()
        request.prefill_token_ids = request.token_ids(0, tokens)
        request.prefill_start = request.prefilled = len(found) * page_size
        request.inserted_pages = len(found)
        request.dispatched_tokens = len(request.output_token_ids)
        if not request.output_token_ids:
            request.cached_tokens = request.prefilled
            self.prefix_queries += tokens
            self.prefix_hits += request.prefilled
        self.running.append(request)
        self.running.sort(key=lambda one: one.rank)
        self.waiting.popleft()
        request.queued = False

    def _decodable(self) -> list[Request]:
        """Returns the requests whose next token can be dispatched before more outputs have been read.

        A grammar has to see its row's last token first. Rows with a grammar are dispatched together, once all
        of them have been read; the others go on by themselves in the meantime.
        """
        unread = any(one.grammar is not None and one.unread for one in self.running)
        return [one for one in self.running if one.decodable and not (unread and one.grammar is not None)]

    def _steps_ahead(self, decoding: list[Request]) -> int:
        """Returns the steps of the next decode dispatch: 1 if something could be done in between."""
        constrained = sum(one.grammar is not None for one in self.running)
        if constrained > len(decoding) or any(one.grammar is not None for one in decoding):
            return 1  # the next step needs the host, or few would go ahead while many wait
        if self.waiting and any(one.remaining < self.steps for one in self.running):
            return 1  # one reaches its length before the last step, or has already: its slot becomes free
        return self.steps

    def _prefill(self, request: Request, limit: int) -> Prefill:
        """Returns the next chunk of a request, of at most ``limit`` tokens."""
        start, page_size = request.prefilled, self.blocks.page_size
        if request.params.prompt_logprobs is not None:
            limit = min(limit, page_size)  # the logits of the whole chunk are held at once
        size = max(
            size for size in self.chunk_sizes if size <= limit and start % min(size, page_size) == 0
        )  # a chunk does not begin inside a page unless it ends in it
        end = len(request.prefill_token_ids)
        stop = min(start + size, end)
        return Prefill(request, start, stop, first=start == request.prefill_start, final=stop == end)

    def _reserve(self, decoding: list[Request], steps: int) -> tuple[list[Request], int]:
        """Allocates the pages of the next steps; takes fewer steps, or preempts, if pages run out.

        Returns:
            The requests that still run, and the number of steps.
        """

        def missing(one: Request, steps: int) -> int:
            stop = one.next_position + min(steps, one.remaining)
            return max(0, self.blocks.pages_for(stop) - len(one.pages))

        if sum(missing(one, steps) for one in decoding) > self.blocks.free:
            steps = 1
        for one in decoding:
            while one.slot is not None and missing(one, steps) > self.blocks.free:
                self._preempt(self.running[-1])
            if one.slot is not None:
                one.pages += self.blocks.allocate(missing(one, steps))
        return [one for one in decoding if one.slot is not None], steps

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
        self.blocks.release(request.pages)
