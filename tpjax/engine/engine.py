"""The step loop: asks the scheduler what to run, runs it, and hands the tokens to their requests."""

from __future__ import annotations

import numpy as np

from tpjax.engine.block_manager import BlockManager
from tpjax.engine.request import Request, TokenLogprobs
from tpjax.engine.scheduler import Decode, Prefill, Scheduler
from tpjax.runner import NO_TOKEN, Row, Runner
from tpjax.sampling import Sampled
from tpjax.sampling_params import SamplingParams


class Engine:
    """Continues many prompts at once on one runner.

    Args:
        runner: the compiled model.
    """

    def __init__(self, runner: Runner) -> None:
        limits = runner.limits
        self.runner = runner
        self.scheduler = Scheduler(
            limits.max_slots,
            limits.max_model_len,
            runner.chunk_sizes[-1],
            BlockManager(limits.num_pages, limits.page_size),
        )

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
            RequestError: it can never run.
        """
        self.scheduler.add(request)

    def cancel(self, request: Request) -> None:
        """Ends a request early and frees what it holds."""
        self.scheduler.finish(request)

    def step(self) -> list[tuple[Request, list[int]]]:
        """Runs one dispatch.

        Returns:
            The requests that got tokens, and those tokens; an ended request has its ``finish_reason`` set.
        """
        work = self.scheduler.schedule()
        if work is None:
            return []
        grown = self._prefill(work) if isinstance(work, Prefill) else self._decode(work)
        for request, _ in grown:
            if request.finish_reason is not None:
                self.scheduler.finish(request)
        return grown

    def _prefill(self, work: Prefill) -> list[tuple[Request, list[int]]]:
        request = work.request
        final = work.stop == len(request.prompt_ids)
        if not work.start and request.params.needs_history:
            assert request.slot is not None
            self.runner.set_history(request.slot, request.prompt_ids, request.params)
        # what follows an inner chunk is known: nothing is drawn that counts
        params = request.params if final else _GREEDY
        row = _row(request, work.start, params)
        drawn = self.runner.prefill(row, request.prompt_ids[work.start : work.stop])
        request.prefilled = work.stop
        return _collect([request], drawn) if final else []

    def _decode(self, work: Decode) -> list[tuple[Request, list[int]]]:
        rows = [_row(request, request.next_position, request.params) for request in work.requests]
        steps = self.runner.limits.steps if max(row.remaining for row in rows) > 1 else 1
        return _collect(work.requests, self.runner.decode(rows, steps))


_GREEDY = SamplingParams(temperature=0)


def _row(request: Request, position: int, params: SamplingParams) -> Row:
    assert request.slot is not None
    return Row(
        slot=request.slot,
        position=position,
        pages=request.pages,
        params=params,
        seed=request.seed,
        remaining=request.remaining,
        stop_ids=request.stop_ids,
        reach=request.most_tokens,
    )


def _collect(requests: list[Request], drawn: Sampled) -> list[tuple[Request, list[int]]]:
    """Waits for the tokens and gives each request its own, up to the one that ends it."""
    tokens = np.asarray(drawn.tokens)  # [steps, B]
    reported = None
    if any(request.params.logprobs is not None for request in requests):
        reported = [np.asarray(x) for x in (drawn.logprobs, drawn.top_tokens, drawn.top_logprobs)]
    grown = []
    for row, request in enumerate(requests):
        before = len(request.output_ids)
        for step, token in enumerate(tokens[:, row].tolist()):
            if token == NO_TOKEN or request.finish_reason is not None:
                break
            request.append(token)
            if reported is not None and request.params.logprobs is not None:
                own, ids, values = (x[step, row].tolist() for x in reported)
                top = dict(
                    zip(ids[: request.params.logprobs], values[: request.params.logprobs], strict=True)
                )
                request.logprobs.append(TokenLogprobs(token, own, top))
        grown.append((request, request.output_ids[before:]))
    return grown
