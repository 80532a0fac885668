"""What to run next. Plain Python, no jax: it is tested by itself."""

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
    """Run tokens ``start`` to ``stop`` of a request's ``prefill_ids``.

    Attributes:
        request: whose.
        start: first token.
        stop: one past the last.
        first: nothing of the request has run since it got its slot.
        final: the token after these is drawn.
    """

    request: Request
    start: int
    stop: int
    first: bool
    final: bool


@dataclass(frozen=True)
class Decode:
    """Draw the next ``steps`` tokens of these requests."""

    requests: list[Request]
    steps: int


class Scheduler:
    """The lowest priority first, and of equals first come, first served, over slots and cache pages.

    One prompt is prefilled at a time, in chunks; while others decode, chunks are small and alternate with
    their steps, so that a long prompt does not stall them. A request that is admitted holds pages for its
    prompt only; where pages run out, the last of them is preempted: it gives its pages back, waits again,
    and its tokens are computed again (or found in the cache) when it is admitted again.

    The device runs behind: a request's ``launched`` counts what was asked of it, ``output_ids`` holds what
    has been read. Rows that wait for the host, since a grammar has to see each token, hold up nobody else.
    Pages may be given away while work that writes to them is under way, since the device runs
    work in order.

    Args:
        max_slots: requests that run at once.
        max_model_len: longest sequence, tokens.
        chunk_sizes: prefill sizes, ascending; each divides the page size or is a multiple of it.
        budget: most tokens of a prefill while others decode.
        steps: decode steps of the long dispatch, taken where nothing can come in between.
        blocks: the cache pages.
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
        self.running: list[Request] = []  # in order of rank, as is `waiting`
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._max_slots = max_slots
        self._slots = list(range(max_slots - 1, -1, -1))
        self._arrivals = itertools.count()
        self._decode_next = False
        self._refused: tuple[Request, int] | None = None  # the head of the queue, and the pages' changes then

    def check(self, request: Request) -> None:
        """Refuses what can never run.

        Raises:
            RequestError: the prompt is empty, or the request does not fit the cache.
            ContextLengthError: prompt and output do not fit the context.
        """
        prompt, limit = len(request.prompt_ids), self.max_model_len
        if not prompt:
            raise RequestError("the prompt is empty: it has 0 tokens, and at least 1 is needed")
        if prompt > limit or (prompt == limit and request.params.max_tokens):
            raise ContextLengthError(
                f"the prompt has {prompt} tokens, but max_model_len={limit} leaves no room to answer"
            )
        if request.most_tokens > limit:
            raise ContextLengthError(
                f"the prompt has {prompt} tokens and max_tokens={request.params.max_tokens}: together "
                f"{request.most_tokens}, over max_model_len={limit}"
            )
        needed = self.blocks.pages_for(request.most_tokens)
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
        self._wait(request)

    def schedule(self) -> Prefill | Decode | None:
        """The next thing to run, or ``None`` when there is nothing to run before more has been read."""
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

    def launched(self, work: Prefill | Decode) -> None:
        """Takes note that work has been handed to the device."""
        if isinstance(work, Decode):
            for one in work.requests:
                one.launched += min(work.steps, one.remaining)
            return
        work.request.prefilled = work.stop
        work.request.launched += work.final
        self.publish(work.request)

    def finish(self, request: Request) -> None:
        """Frees what an ended or cancelled request holds; does nothing for one that holds nothing."""
        if request.slot is not None:
            self.running.remove(request)
        elif request.queued:
            request.queued = False
            self.waiting.remove(request)
        if request.finish_reason != "error":
            self.publish(request)
        self._vacate(request)

    def reset(self) -> None:
        """Forgets who runs and what every page holds; who waits goes on waiting."""
        ran = set(self.running)
        self.waiting = deque(one for one in self.waiting if one not in ran)
        for one in (*ran, *self.waiting):
            one.slot, one.queued = None, one not in ran
            one.pages.clear()
        self.blocks.clear()
        self._slots = list(range(self._max_slots - 1, -1, -1))
        self._refused = None
        self.running = []

    def publish(self, request: Request) -> None:
        """Makes a running request's full pages findable: those whose tokens are all known and computed."""
        if request.slot is None:
            return
        known = request.num_tokens - 1  # the last one has not been fed
        computed = request.prefilled if request.prefilling else max(request.prefilled, known)
        pages = min(computed // self.blocks.page_size, len(request.pages))
        keys = request.page_keys(self.blocks.page_size, pages)
        for index in range(request.published, pages):
            self.blocks.register(request.pages[index], keys[index])
        request.published = max(request.published, pages)

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    def _admit(self) -> None:
        # One prefill at a time: the next finds the pages of the one before it.
        if not (self.waiting and self._slots) or any(one.prefilling for one in self.running):
            return
        request, blocks = self.waiting[0], self.blocks
        if self._refused == (request, blocks.changes):
            return  # nothing has become free or findable since it did not fit
        tokens, page_size = request.num_tokens, blocks.page_size
        found: list[int] = []
        if request.params.prompt_logprobs is None:  # these need the logits of every token
            # the last token is always run: its logits are what the next one is drawn from
            pages = (tokens - 1) // page_size
            found = blocks.find(request.page_keys(page_size, pages)[:pages])
        new = blocks.pages_for(tokens) - len(found)
        # one for each that may need another, or the first step of someone who runs would preempt it again
        spare = sum(len(one.pages) < blocks.pages_for(one.most_tokens) for one in self.running)
        if new + spare > blocks.free - blocks.unused(found):
            self._refused = (request, blocks.changes)
            return
        request.pages = blocks.take(found) + blocks.allocate(new)
        request.slot = self._slots.pop()
        request.prefill_ids = request.tokens(0, tokens)
        request.prefill_start = request.prefilled = len(found) * page_size
        request.published = len(found)
        request.launched = len(request.output_ids)
        if not request.output_ids:
            request.cached_tokens = request.prefilled
            self.prefix_queries += tokens
            self.prefix_hits += request.prefilled
        self.running.append(request)
        self.running.sort(key=lambda one: one.rank)
        self.waiting.popleft()
        request.queued = False

    def _decodable(self) -> list[Request]:
        """Who can go on before more has been read.

        A grammar has to see a row's token before the row goes on. Such rows go together, when all have been
        read; the others go ahead by themselves in the meantime.
        """
        unread = any(one.grammar is not None and one.unread for one in self.running)
        return [one for one in self.running if one.decodable and not (unread and one.grammar is not None)]

    def _steps_ahead(self, decoding: list[Request]) -> int:
        """Steps of the next dispatch: several, unless something could be done in between."""
        bound = sum(one.grammar is not None for one in self.running)
        if bound > len(decoding) or any(one.grammar is not None for one in decoding):
            return 1  # the next step needs the host, or few would go ahead while many wait
        if self.waiting and any(one.remaining < self.steps for one in self.running):
            return 1  # one reaches its length before the last step, or has done so unread: its place is free
        return self.steps

    def _prefill(self, request: Request, most: int) -> Prefill:
        start, page_size = request.prefilled, self.blocks.page_size
        if request.params.prompt_logprobs is not None:
            most = min(most, page_size)  # the logits of the whole chunk are held at once
        size = max(
            size for size in self.chunk_sizes if size <= most and start % min(size, page_size) == 0
        )  # a chunk does not begin inside a page unless it ends in it
        end = len(request.prefill_ids)
        stop = min(start + size, end)
        return Prefill(request, start, stop, first=start == request.prefill_start, final=stop == end)

    def _reserve(self, decoding: list[Request], steps: int) -> tuple[list[Request], int]:
        """Gets every request the pages of its next steps: fewer steps, or fewer requests, if they run out."""

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
        self._wait(request)
        self.running.remove(request)
        self.publish(request)
        self._vacate(request)
        request.prefill_ids, request.prefilled = [], 0
        self.preemptions += 1

    def _wait(self, request: Request) -> None:
        """Queues a request where its rank has it: usually last, or first if it was preempted."""
        request.queued = True
        if self.waiting and request.rank < self.waiting[0].rank:
            self.waiting.appendleft(request)
            return
        at = len(self.waiting)
        while at and self.waiting[at - 1].rank > request.rank:
            at -= 1
        self.waiting.insert(at, request)

    def _vacate(self, request: Request) -> None:
        if request.slot is not None:
            self._slots.append(request.slot)
            request.slot = None
        self.blocks.release(request.pages)
