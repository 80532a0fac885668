"""What to run next. Plain Python, no jax: it is tested by itself."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tpjax.engine.block_manager import BlockManager
from tpjax.engine.request import Request
from tpjax.errors import RequestError


@dataclass(frozen=True)
class Prefill:
    """Run prompt tokens ``start`` to ``stop`` of a request."""

    request: Request
    start: int
    stop: int


@dataclass(frozen=True)
class Decode:
    """Run decode steps of these requests."""

    requests: list[Request]


class Scheduler:
    """First come, first served, over slots and cache pages.

    A request is admitted when a slot and the pages of its longest possible length are free, so that nothing
    that runs can run out. Prompts go first, in chunks; then all running requests decode together.

    Args:
        max_slots: requests that run at once.
        max_model_len: longest sequence, tokens.
        chunk: prompt tokens per prefill; a multiple of the page size.
        blocks: the cache pages.
    """

    def __init__(self, max_slots: int, max_model_len: int, chunk: int, blocks: BlockManager) -> None:
        self.max_model_len = max_model_len
        self.chunk = chunk
        self.blocks = blocks
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._slots = list(range(max_slots - 1, -1, -1))

    def check(self, request: Request) -> None:
        """Refuses what can never run.

        Raises:
            RequestError: the prompt is empty, or prompt and output do not fit the context or the cache.
        """
        prompt, limit = len(request.prompt_ids), self.max_model_len
        if not prompt:
            raise RequestError("the prompt is empty: it has 0 tokens, and at least 1 is needed")
        if prompt >= limit:
            raise RequestError(
                f"the prompt has {prompt} tokens, but max_model_len={limit} leaves no room to answer"
            )
        if request.most_tokens > limit:
            raise RequestError(
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
        self.waiting.append(request)

    def schedule(self) -> Prefill | Decode | None:
        """The next thing to run, or ``None`` when nothing is left."""
        while self.waiting and self._slots and self._admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        for request in self.running:
            prompt = len(request.prompt_ids)
            if request.prefilled < prompt:
                return Prefill(request, request.prefilled, min(request.prefilled + self.chunk, prompt))
        return Decode(list(self.running)) if self.running else None

    def finish(self, request: Request) -> None:
        """Frees what an ended or cancelled request holds; does nothing for one that holds nothing."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        if request.slot is not None:
            self._slots.append(request.slot)
            request.slot = None
        self.blocks.release(request.pages)

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    def _admit(self, request: Request) -> bool:
        needed = self.blocks.pages_for(request.most_tokens)
        if needed > self.blocks.free:
            return False
        request.pages = self.blocks.allocate(needed)
        request.slot = self._slots.pop()
        return True
