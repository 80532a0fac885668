"""Scheduler and block manager by themselves, driven by a loop that stands in for the model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpjax.engine.block_manager import BlockManager
from tpjax.engine.request import Request
from tpjax.engine.scheduler import Decode, Prefill, Scheduler
from tpjax.errors import RequestError
from tpjax.sampling_params import SamplingParams

PAGE, CHUNK = 4, 8


def request(prompt: int, tokens: int, **extra: Any) -> Request:
    return Request(list(range(prompt)), SamplingParams(max_tokens=tokens), seed=0, **extra)


def scheduler(slots: int = 2, longest: int = 40, pages: int = 24) -> Scheduler:
    return Scheduler(slots, longest, CHUNK, BlockManager(pages + 1, PAGE))


class Loop:
    """Runs a scheduler as the engine does, and checks at every dispatch what must always hold."""

    def __init__(self, of: Scheduler, pages: int, slots: int, steps: int = 1) -> None:
        self.scheduler, self.pages, self.slots, self.steps = of, pages, slots, steps
        self.ended: list[int] = []  # ids of requests, in order
        self.started: list[int] = []
        self.order: list[int] = []  # as added
        self.cancelled: set[int] = set()

    def add(self, one: Request) -> None:
        self.scheduler.add(one)
        self.order.append(id(one))

    def cancel(self, one: Request) -> None:
        self.cancelled.add(id(one))
        self.scheduler.finish(one)
        assert one.slot is None and one.pages == []

    def step(self, stop: random.Random | None = None) -> bool:
        work = self.scheduler.schedule()
        self.check()
        if work is None:
            return False
        if isinstance(work, Prefill):
            one = work.request
            if not work.start:
                self.started.append(id(one))
            assert work.start == one.prefilled and work.start % PAGE == 0
            assert 0 < work.stop - work.start <= CHUNK
            assert not one.output_ids
            one.prefilled = work.stop
            grown = [one] if work.stop == len(one.prompt_ids) else []
            count = 1
        else:
            assert isinstance(work, Decode)
            assert all(r.prefilled == len(r.prompt_ids) and r.output_ids for r in work.requests)
            grown, count = work.requests, self.steps
        for one in grown:
            for _ in range(count):
                one.append(stop.choice((7, 8, 9)) if stop else 8)
                if one.finish_reason is not None:
                    break
            assert len(one.prompt_ids) + len(one.output_ids) <= len(one.pages) * PAGE  # room for all of it
            if one.finish_reason is not None:
                self.ended.append(id(one))
                self.scheduler.finish(one)
        self.check()
        return True

    def check(self) -> None:
        running = self.scheduler.running
        slots = [one.slot for one in running]
        assert len(running) <= self.slots
        assert len(set(slots)) == len(slots) and all(slot in range(self.slots) for slot in slots)
        held = [page for one in running for page in one.pages]
        assert len(set(held)) == len(held) and 0 not in held  # nobody shares a page; page 0 is nobody's
        assert all(1 <= page <= self.pages for page in held)
        assert len(held) + self.scheduler.blocks.free == self.pages
        assert all(one.slot is None and not one.pages for one in self.scheduler.waiting)
        assert self.scheduler.busy == bool(running or self.scheduler.waiting)


def test_block_manager() -> None:
    blocks = BlockManager(6, PAGE)
    assert (blocks.capacity, blocks.free) == (5, 5)
    first, second = blocks.allocate(2), blocks.allocate(3)
    assert sorted(first + second) == [1, 2, 3, 4, 5]
    with pytest.raises(RequestError, match=r"^1 cache pages are needed, but 0 are free$"):
        blocks.allocate(1)
    blocks.release(first)
    assert first == [] and blocks.free == 2
    with pytest.raises(RequestError, match=r"^3 cache pages are needed, but 2 are free$"):
        blocks.allocate(3)
    assert blocks.free == 2  # a refusal takes nothing
    blocks.release(first)  # empty by now: gives nothing back twice
    assert blocks.free == 2
    assert blocks.allocate(0) == []


@pytest.mark.parametrize(("tokens", "pages"), ((0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)))
def test_pages_for(tokens: int, pages: int) -> None:
    assert BlockManager(6, PAGE).pages_for(tokens) == pages


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    (
        (0, 5, "the prompt is empty: it has 0 tokens, and at least 1 is needed"),
        (40, 1, "the prompt has 40 tokens, but max_model_len=40 leaves no room to answer"),
        (55, 1, "the prompt has 55 tokens, but max_model_len=40 leaves no room to answer"),
        (30, 11, "the prompt has 30 tokens and max_tokens=11: together 41, over max_model_len=40"),
        (20, 13, "the request needs 9 cache pages, but there are 8"),
    ),
)
def test_refuses_what_can_never_run(prompt: int, tokens: int, message: str) -> None:
    tight = scheduler(pages=8)
    with pytest.raises(RequestError) as error:
        tight.add(request(prompt, tokens))
    assert str(error.value) == message
    assert not tight.busy


def test_takes_what_just_fits() -> None:
    tight = scheduler(slots=1, pages=10)
    tight.add(request(39, 1))
    tight.add(request(1, 39))
    loop = Loop(tight, 10, 1)
    while loop.step():
        pass
    assert len(loop.ended) == 2


def test_chunks_then_decode_together() -> None:
    """The whole of a small schedule, by hand: 19 tokens are chunks of 8, 8 and 3."""
    both = scheduler()
    long, short = request(19, 2), request(3, 3)
    both.add(long)
    both.add(short)
    seen: list[Any] = []
    while (work := both.schedule()) is not None:
        if isinstance(work, Prefill):
            seen.append((work.request is long, work.start, work.stop))
            work.request.prefilled = work.stop
            grown = [work.request] if work.stop == len(work.request.prompt_ids) else []
        else:
            seen.append([one is long for one in work.requests])
            grown = work.requests
        for one in list(grown):
            one.append(1)
            if one.finish_reason:
                both.finish(one)
    assert seen == [(True, 0, 8), (True, 8, 16), (True, 16, 19), (False, 0, 3), [True, False], [False]]
    assert (long.output_ids, short.output_ids) == ([1, 1], [1, 1, 1])
    assert (long.finish_reason, short.finish_reason) == ("length", "length")
    assert not both.busy and both.schedule() is None


def test_a_large_request_is_not_overtaken() -> None:
    """Small ones that would fit wait behind it, or a stream of them could starve it."""
    pages = 10
    tight = scheduler(slots=4, pages=pages)
    loop = Loop(tight, pages, 4)
    first, large, small = request(4, 20), request(30, 8), request(2, 2)
    for one in (first, large, small):
        loop.add(one)
    loop.step()
    assert list(tight.waiting) == [large, small]  # 6 pages run, 10 are needed: small's 1 page stays free
    while loop.step():
        pass
    assert loop.started == loop.order
    assert first.finish_reason == large.finish_reason == small.finish_reason == "length"


def test_cancel_in_every_state() -> None:
    of = scheduler(slots=1)
    loop = Loop(of, 24, 1)
    waiting, prefilling, decoding = request(3, 3), request(20, 3), request(2, 9)
    loop.add(prefilling)
    loop.step()
    assert prefilling.prefilled == 8
    loop.cancel(prefilling)
    assert of.blocks.free == 24 and not of.busy
    loop.add(decoding)
    loop.add(waiting)
    loop.step()
    loop.step()
    assert len(decoding.output_ids) == 2
    loop.cancel(waiting)
    assert list(of.waiting) == []
    loop.cancel(decoding)
    loop.cancel(decoding)  # again: nothing to free
    assert of.blocks.free == 24 and not of.busy and of.schedule() is None


def test_cancel_takes_the_request_itself_not_its_twin() -> None:
    """Two clients may send the same prompt with the same seed: they are two requests all the same."""
    of = scheduler(slots=1)
    running, first, second = request(5, 5), request(3, 3), request(3, 3)
    for one in (running, first, second):
        of.add(one)
    of.schedule()
    of.finish(second)
    assert len(of.waiting) == 1
    assert of.waiting[0] is first


def test_finishing_a_stranger_does_nothing() -> None:
    of = scheduler()
    mine, stranger = request(3, 3), request(3, 3)
    of.add(mine)
    of.finish(stranger)
    assert len(of.waiting) == 1 and of.waiting[0] is mine


def test_request_ends_at_a_stop_token_or_at_its_length() -> None:
    one = request(3, 3, stop_ids=(5,))
    assert (one.most_tokens, one.remaining) == (6, 3)
    one.append(1)
    assert (one.remaining, one.next_position, one.finish_reason) == (2, 3, None)
    one.append(5)
    assert (one.output_ids, one.finish_reason) == ([1, 5], "stop")
    two = request(3, 2, stop_ids=(5,))
    two.append(1)
    two.append(5)
    assert two.finish_reason == "stop"  # both at once: it did stop by itself
    three = request(3, 1)
    three.append(9)
    assert three.finish_reason == "length"


shapes = st.tuples(st.integers(1, 30), st.integers(1, 12), st.sampled_from(((), (7,))))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    shapes=st.lists(shapes, min_size=1, max_size=12),
    slots=st.integers(1, 5),
    pages=st.integers(11, 40),
    steps=st.sampled_from((1, 4)),
    seed=st.integers(0, 2**16),
)
def test_any_schedule(
    shapes: Sequence[tuple[int, int, tuple[int, ...]]], slots: int, pages: int, steps: int, seed: int
) -> None:
    """Arrivals and cancellations at random: every request ends exactly once, first come, first served."""
    rng = random.Random(seed)
    of = scheduler(slots=slots, longest=44, pages=pages)
    loop = Loop(of, pages, slots, steps)
    every = [request(p, t, stop_ids=s) for p, t, s in shapes]
    for number, one in enumerate(every):
        one.seed = number
    coming = list(every)
    for _ in range(5000):
        if coming and rng.random() < 0.4:
            loop.add(coming.pop(0))
        active = [one for one in (*of.running, *of.waiting) if one.finish_reason is None]
        if active and rng.random() < 0.08:
            loop.cancel(rng.choice(active))
        if not loop.step(rng) and not coming:
            break
    else:
        raise AssertionError("the loop does not end")

    assert of.blocks.free == pages and not of.busy
    assert sorted(of._slots) == list(range(slots))
    assert len(loop.ended) == len(set(loop.ended))
    assert {id(one) for one in every} == set(loop.ended) | loop.cancelled
    assert not set(loop.ended) & loop.cancelled
    assert loop.started == [one for one in loop.order if one in set(loop.started)]
    for one in every:
        if id(one) in loop.ended:
            stopped = bool(one.stop_ids) and one.output_ids[-1] in one.stop_ids
            assert one.finish_reason == ("stop" if stopped else "length")
            assert stopped or len(one.output_ids) == one.params.max_tokens
            assert not set(one.output_ids[:-1]) & set(one.stop_ids)
