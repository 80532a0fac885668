"""Scheduler and block manager by themselves: what is run, by hand. tests/test_engine.py tries every order."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest

from tpjax.engine.block_manager import BlockManager, page_key, root_key
from tpjax.engine.request import Request
from tpjax.engine.scheduler import Scheduler, Step
from tpjax.errors import RequestError
from tpjax.hardware import HARDWARE
from tpjax.planning.published import published_config
from tpjax.runtime.counts import Counts
from tpjax.runtime.limits import ChunkShape, chunk_shapes, mixed_chunk_shapes
from tpjax.sampling_params import SamplingParams
from tpjax.step_time import Itemsizes, StepTime

PAGE = 4
SHAPES = (ChunkShape(1, 2), ChunkShape(2, 2), ChunkShape(2, 4))


def request(prompt: int, tokens: int, first: int = 0, **extra: Any) -> Request:
    return Request(list(range(first, first + prompt)), SamplingParams(max_tokens=tokens), seed=0, **extra)


def scheduler(
    slots: int = 2,
    longest: int = 40,
    pages: int = 24,
    budget: int = 4,
    steps: int = 1,
    histories: int | None = None,
) -> Scheduler:
    """A scheduler whose steps run 8 prompt tokens alone, and beside others ``budget``, at least a page."""
    blocks = BlockManager(pages + 1, PAGE)
    return Scheduler(
        slots,
        longest,
        SHAPES,
        SHAPES[:2],
        ChunkShape(1, 4),
        None,
        lambda rows, context, tokens, before: 9.0 if rows and tokens > budget else 1.0,
        steps,
        blocks,
        history_rows=histories,
    )


def run(of: Scheduler, step: Step | None, token: int = 1) -> Any:
    """Does as the engine does, with nothing in between dispatch and read; tells what was run.

    Decoded requests, then parts of prompts as (request, start, stop).
    """
    assert step is not None
    of.dispatched(step)
    outputs = [*step.decode, *(chunk.request for chunk in step.chunks if chunk.final)]
    seen = [*step.decode, *((chunk.request, chunk.start, chunk.stop) for chunk in step.chunks)]
    for one in outputs:
        for _ in range(step.steps):
            if one.finish_reason is None:
                one.append(token)
        if one.finish_reason is not None:
            of.finish(one)
    return seen


def test_block_manager() -> None:
    blocks = BlockManager(6, PAGE)
    assert (blocks.capacity, blocks.free) == (5, 5)
    first, second = blocks.allocate(2), blocks.allocate(3)
    assert sorted(first + second) == [1, 2, 3, 4, 5]
    with pytest.raises(RequestError, match=r"^1 cache pages are needed, but 0 are free$"):
        blocks.allocate(1)
    blocks.release(first)
    assert blocks.free == 2
    with pytest.raises(RequestError, match=r"^3 cache pages are needed, but 2 are free$"):
        blocks.allocate(3)
    assert blocks.free == 2  # a refusal takes nothing
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
    for one in (request(39, 1), request(1, 39, first=99)):
        tight.add(one)
        while (work := tight.schedule()) is not None:
            run(tight, work)
        assert len(one.output_token_ids) == one.params.max_tokens
    assert tight.preemptions == 0


def test_prompts_run_beside_decode_rows() -> None:
    """The whole of a small schedule: alone, steps run up to 8 prompt tokens; beside others, a page."""
    of = scheduler()
    short, long = request(8, 6, first=50), request(19, 2)
    of.add(short)
    of.add(long)
    seen = []
    while (step := of.schedule()) is not None:
        seen.append(run(of, step))
    assert seen == [
        [(short, 0, 8)],  # it fills the step
        [short, (long, 0, 4)],
        [short, (long, 4, 8)],
        [short, (long, 8, 12)],
        [short, (long, 12, 16)],
        [short, (long, 16, 19)],  # its last
        [long],
    ]
    alone = request(19, 1, first=200)
    of.add(alone)
    assert [run(of, of.schedule()) for _ in range(3)] == [
        [(alone, 0, 8)],
        [(alone, 8, 16)],
        [(alone, 16, 19)],
    ]
    assert not of.busy and of.schedule() is None


def test_short_prompts_share_a_step() -> None:
    """Each takes chunks of its own: of two tokens here, since three prompts do not fit two larger ones."""
    of = scheduler(slots=4)
    asked = [request(n, 1, first=10 * n) for n in (2, 1, 3, 4)]
    for one in asked:
        of.add(one)
    a, b, c, d = asked
    assert run(of, of.schedule()) == [(a, 0, 2), (b, 0, 1)]
    assert run(of, of.schedule()) == [(c, 0, 3), (d, 0, 4)]  # two chunks of 4
    assert not of.busy


def test_a_chunk_that_begins_inside_a_page_ends_in_it() -> None:
    of = scheduler(slots=3)
    short, other, long = request(1, 4, first=50), request(2, 1, first=60), request(20, 1)
    of.add(short)
    assert run(of, of.schedule()) == [(short, 0, 1)]
    of.add(other)
    of.add(long)
    assert run(of, of.schedule()) == [short, (other, 0, 2), (long, 0, 2)]
    of.finish(short)
    assert run(of, of.schedule()) == [(long, 2, 4)]  # no larger chunk may begin here
    assert run(of, of.schedule()) == [(long, 4, 12)]


def test_the_step_that_runs_most_is_taken() -> None:
    """Of equals the smallest: 4 tokens are two chunks of 2, not one of 4 beside padding."""
    of = scheduler(slots=4)
    one = request(4, 1)
    of.add(one)
    step = of.schedule()
    assert step is not None and [(c.start, c.stop) for c in step.chunks] == [(0, 4)]
    assert of._fill(SHAPES[1], [one]) == step.chunks and not of._fill(SHAPES[0], [one])[0].final


@pytest.mark.parametrize(
    ("tokens", "spans"),
    [(1, [(0, 1)]), (3, [(0, 3)]), (5, [(0, 5)]), (9, [(0, 8), (8, 9)]), (20, [(0, 8), (8, 16), (16, 20)])],
)
def test_padding_costs_time_and_so_does_another_step(tokens: int, spans: list[tuple[int, int]]) -> None:
    """Time grows with the tokens, padding included: a shape that is less than half full is too large."""
    of = Scheduler(
        2, 40, SHAPES, SHAPES, SHAPES[0], None, lambda *sizes: float(sizes[2]), 1, BlockManager(25, PAGE)
    )
    assert of.prompt_spans(tokens) == spans
    one = request(tokens, 1)
    of.add(one)
    seen = []
    while of.busy:
        seen += [(start, stop) for _, start, stop in run(of, of.schedule())]
    assert seen == spans


def chip(slots: int, **options: Any) -> Scheduler:
    """A scheduler with the chunk shapes of a TPU."""
    shapes = chunk_shapes("tpu")
    sizes = {"max_num_batched_tokens": None, "seconds": by_hand, **options}
    return Scheduler(
        slots,
        8192,
        shapes,
        mixed_chunk_shapes("tpu"),
        shapes[0],
        sizes["max_num_batched_tokens"],
        sizes["seconds"],
        1,
        BlockManager(1000, 128),
    )


def by_hand(rows: int, context: int, prompt_tokens: int, before: int) -> float:
    return 10.0 + 0.001 * context + 0.02 * prompt_tokens


def beside(of: Scheduler, prompt: int) -> int:
    """Returns the prompt tokens of a step beside four rows with 1,024 keys each."""
    for at in range(4):
        of.add(request(1023, 99, first=2000 * at))
    while any(not one.output_token_ids for one in [*of.running, *of.waiting]):
        run(of, of.schedule())
    of.add(request(prompt, 1, first=50_000))
    step = of.schedule()
    assert step is not None and len(step.decode) == 4
    return sum(chunk.stop - chunk.start for chunk in step.chunks)


def test_a_step_with_prompts_takes_at_most_twice_as_long() -> None:
    """Alone 10 + 4.1 s; 512 prompt tokens take as long again at most, 2,048 more. A short prompt, a shape."""
    assert beside(chip(8), 4000) == 512
    assert beside(chip(8), 300) == 300
    # the smallest shape runs however long it takes
    assert beside(chip(8, seconds=lambda rows, _, tokens, __: 1.0 + 9.0 * bool(tokens)), 4000) == 128


def test_a_step_is_timed_by_the_prompts_that_run_in_it() -> None:
    """Not by one that has its place already, and starts after a long cached prefix."""

    def seconds(rows: int, context: int, prompt_tokens: int, before: int) -> float:
        return 10.0 + 0.015 * prompt_tokens + 0.01 * before

    for cached in (False, True):
        of = chip(8, seconds=seconds)
        if cached:
            finish_alone(of, request(6000, 1, first=90_000))
        of.add(request(1023, 99))
        run(of, of.schedule())
        of.add(request(4000, 1, first=50_000))
        of.add(request(6000, 1, first=90_000))
        step = of.schedule()
        assert step is not None and len(of.running) == 3
        assert [(chunk.start, chunk.stop) for chunk in step.chunks] == [(0, 512)]


def test_a_given_maximum_counts_decoded_tokens_too() -> None:
    assert beside(chip(8, max_num_batched_tokens=516), 4000) == 512
    assert beside(chip(8, max_num_batched_tokens=515), 4000) == 128
    assert beside(chip(8, max_num_batched_tokens=2), 4000) == 128  # a page in any case
    of = chip(8, max_num_batched_tokens=600)
    alone = request(4000, 1)
    of.add(alone)
    assert run(of, of.schedule()) == [(alone, 0, 512)]


@pytest.mark.parametrize(("name", "tokens"), [("v5e", 128), ("v6e", 512), ("h100-sxm", 128)])
def test_what_llama3_8b_takes_on_eight_chips(name: str, tokens: int) -> None:
    share = Counts("", published_config("llama-3-8b")).share(8)
    times = StepTime(share, HARDWARE[name].device, Itemsizes(2, 2, 2))
    of = chip(64, seconds=times.seconds)
    assert beside(of, 4000) == tokens


def steps_of(of: Scheduler) -> list[int]:
    """Runs until nothing is left; the steps of each decode dispatch."""
    steps = []
    while (work := of.schedule()) is not None:
        if work.decode:
            steps.append(work.steps)
        run(of, work)
    return steps


@pytest.mark.parametrize(
    ("tokens", "steps"),
    (
        (9, [4, 4]),  # the slot becomes free with the end of the second
        (11, [4, 4, 1, 1]),  # it becomes free in between, and is given away then
        (3, [1, 1]),
    ),
)
def test_several_steps_unless_a_place_could_be_given(tokens: int, steps: list[int]) -> None:
    """The first token comes with the prompt. The last one has nobody to wait for it."""
    of = scheduler(slots=1, steps=4)
    for at in range(3):
        of.add(request(2, tokens, first=50 * at))
    assert steps_of(of)[: 2 * len(steps)] == steps * 2


def test_several_steps_while_a_slot_is_free_but_no_page() -> None:
    """The second request does not fit beside the first, which ends with its last page."""
    of = scheduler(slots=2, pages=6, steps=4)
    of.add(request(8, 16))
    of.add(request(20, 4, first=90))
    assert steps_of(of)[:6] == [4, 4, 4, 1, 1, 1]


class Free:
    """A grammar that allows everything."""

    finished, error = False, None

    def mask(self) -> None: ...

    def advance(self, token: int) -> None: ...


def test_rows_with_a_grammar_go_on_while_prompts_end_at_every_step() -> None:
    """As the engine does: what a step samples is read after the next one has been dispatched."""
    of, flight = scheduler(slots=8, pages=40), []
    asked = [request(4, 6, first=10 * at, grammar=Free()) for at in range(8)]
    for one in asked:
        of.add(one)
    at_last: list[int] = []
    while of.busy:
        step = of.schedule()
        if step is not None:
            if not at_last and asked[-1].output_token_ids:
                at_last = [len(one.output_token_ids) for one in asked]
            assert not at_last or step.decode == of.running  # all in one step again
            of.dispatched(step)
            flight.append([*step.decode, *(chunk.request for chunk in step.chunks if chunk.final)])
        if step is None or len(flight) > 1:
            for one in flight.pop(0):
                one.append(1)
                if one.finished:
                    of.finish(one)
    assert at_last[:5] == [3, 3, 2, 2, 2]


def test_a_large_request_is_not_overtaken() -> None:
    """Small ones that would fit wait behind it, or a stream of them could starve it."""
    of = scheduler(slots=4, pages=10)
    first, large, small = request(24, 8), request(30, 8, first=100), request(2, 2, first=200)
    for one in (first, large, small):
        of.add(one)
    order = []
    while (work := of.schedule()) is not None:
        order += [chunk.request for chunk in work.chunks if chunk.first]
        run(of, work)
    assert order == [first, large, small]
    assert first.finish_reason == large.finish_reason == small.finish_reason == "length"


def test_the_youngest_is_preempted_and_runs_again_with_what_it_had() -> None:
    of = scheduler(slots=2, pages=6)
    old, young = request(8, 12), request(7, 8, first=50)
    of.add(old)
    of.add(young)
    while not of.preemptions:
        run(of, of.schedule())
    assert old.slot is not None and young.slot is None and list(of.waiting) == [young]
    had = list(young.output_token_ids)
    assert had and not young.pages
    while old.finish_reason is None:
        run(of, of.schedule())
    work = of.schedule()
    assert work is not None
    (chunk,) = work.chunks
    assert chunk.request is young and chunk.first
    assert young.prefill_token_ids == [*young.prompt_token_ids, *had]
    # its first page lay in the cache all the time, unless old's last steps needed the place
    assert chunk.start == young.prefill_start and chunk.start % PAGE == 0
    while (work := of.schedule()) is not None:
        run(of, work)
    assert len(young.output_token_ids) == 8 and len(old.output_token_ids) == 12
    assert of.preemptions == 1 and of.blocks.free == 6


# --- the prefix cache --------------------------------------------------------------------------------------


def test_the_lowest_priority_runs_first_and_is_preempted_last() -> None:
    of = scheduler(slots=1)
    asked = [request(3, 1, first=10 * i, priority=p) for i, p in enumerate((0, 5, -1, 5, 0, -(2**63)))]
    for one in asked:
        of.add(one)
    order: list[Request] = []
    while (work := of.schedule()) is not None:
        order += [chunk.request for chunk in work.chunks]
        run(of, work)
    assert [asked.index(one) for one in order] == [5, 2, 0, 4, 1, 3]  # of equals the first to come
    of = scheduler(slots=3, pages=5)
    late, early = request(8, 9, priority=1), request(8, 9, first=20)
    of.add(late)
    run(of, of.schedule())  # type: ignore[arg-type]
    of.add(early)
    while not early.finish_reason:
        run(of, of.schedule())  # type: ignore[arg-type]
    assert of.preemptions and not late.finish_reason  # though it came first, it gave its pages
    other = request(2, 1, first=30)
    of.add(other)
    assert list(of.waiting)[:1] == [other] or other in of.running


def finish_alone(of: Scheduler, one: Request) -> Request:
    of.add(one)
    while one.finish_reason is None:
        run(of, of.schedule())
    return one


def test_equal_beginnings_are_computed_once() -> None:
    of = scheduler()
    assert finish_alone(of, request(10, 1)).cached_tokens == 0
    assert of.blocks.free == 24  # nothing is held, and yet:
    again = finish_alone(of, request(14, 1))
    assert again.cached_tokens == 8  # two full pages; the third was not full
    assert finish_alone(of, request(12, 1)).cached_tokens == 8  # the last token is run in any case
    assert finish_alone(of, request(13, 1)).cached_tokens == 12
    assert finish_alone(of, request(13, 1, first=1)).cached_tokens == 0
    assert (of.prefix_hits, of.prefix_queries) == (8 + 8 + 12, 10 + 14 + 12 + 13 + 13)


def test_what_a_preempted_request_finds_again_counts_for_nothing() -> None:
    """Neither as its cached tokens nor in the cache's counters: it is its own, before its first token too."""
    of = scheduler()
    finish_alone(of, request(4, 1))
    one = request(20, 2)
    of.add(one)
    run(of, of.schedule())
    of._preempt(one)
    again = of.schedule()
    assert again is not None and again.chunks[0].start > 4 and not one.output_token_ids
    run(of, again)
    while not one.finished:
        run(of, of.schedule())
    assert one.cached_tokens == 4 and (of.prefix_hits, of.prefix_queries) == (4, 4 + 20)


def test_output_is_found_too() -> None:
    """The next turn of a conversation begins with all of the last one, the last token excepted."""
    of = scheduler()
    first = finish_alone(of, request(6, 7))
    turn = Request(
        [*first.prompt_token_ids, *first.output_token_ids, 9, 9], SamplingParams(max_tokens=1), seed=0
    )
    assert finish_alone(of, turn).cached_tokens == 12  # 13 tokens, of which the last was never fed


def test_salts_share_nothing() -> None:
    of = scheduler()
    finish_alone(of, request(12, 1, cache_salt="a"))
    assert finish_alone(of, request(12, 1, cache_salt="b")).cached_tokens == 0
    assert finish_alone(of, request(12, 1, cache_salt="a")).cached_tokens == 8
    assert finish_alone(of, request(12, 1)).cached_tokens == 0


def test_twins_that_arrive_together_prefill_once() -> None:
    of = scheduler(slots=4)
    twins = [request(12, 3) for _ in range(4)]
    for one in twins:
        of.add(one)
    while (work := of.schedule()) is not None:
        run(of, work)
    assert [one.cached_tokens for one in twins] == [0, 8, 8, 8]


def test_a_page_in_use_is_shared_and_outlives_its_first_user() -> None:
    of = scheduler(pages=6)
    first, second = request(9, 6), request(9, 6)
    of.add(first)
    run(of, of.schedule())
    run(of, of.schedule())
    of.add(second)
    run(of, of.schedule())
    (of_first,), (own,) = first.pages, second.pages
    assert own[:2] == of_first[:2] and own[2] != of_first[2]
    shared = of_first[:2]
    of.finish(first)
    assert of.blocks.free == 3
    with pytest.raises(RequestError):
        of.blocks.allocate(4)
    assert not set(of.blocks.allocate(3)) & set(shared)


def test_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    of = scheduler(pages=6)
    finish_alone(of, request(9, 1, first=0))
    finish_alone(of, request(9, 1, first=50))
    finish_alone(of, request(9, 1, first=0))  # used again: now the younger
    finish_alone(of, request(16, 1, first=90))  # 4 pages: 2 blank, 2 taken from those of 50...
    assert finish_alone(of, request(9, 1, first=0)).cached_tokens == 8
    assert finish_alone(of, request(9, 1, first=50)).cached_tokens == 0


def test_prompt_logprobs_need_every_logit() -> None:
    of = scheduler()
    finish_alone(of, request(12, 1))
    asks = Request(list(range(12)), SamplingParams(max_tokens=1, prompt_logprobs=0), seed=0)
    of.add(asks)
    assert run(of, of.schedule()) == [(asks, 0, 4)]  # a page at a time: a chunk's logits are held at once
    assert asks.cached_tokens == 0


def test_keys_depend_on_everything_before() -> None:
    a, b = root_key(""), root_key("x")
    assert page_key(a, [1, 2]) != page_key(b, [1, 2])
    assert page_key(page_key(a, [1, 2]), [3, 4]) != page_key(page_key(a, [2, 1]), [3, 4])
    assert page_key(a, [1, 2]) == page_key(a, (1, 2))
    assert len(a) == 32  # SHA-256
    assert page_key(a, [1, 2]).hex().startswith(hashlib.sha256(a + struct.pack("<2q", 1, 2)).hexdigest())


def test_cancel_in_every_state() -> None:
    of = scheduler(slots=1)
    waiting, prefilling, decoding = request(3, 3, 90), request(20, 3), request(2, 9, 70)
    of.add(prefilling)
    run(of, of.schedule())
    assert prefilling.prefilled == 8
    of.finish(prefilling)
    assert of.blocks.free == 24 and not of.busy
    of.add(decoding)
    of.add(waiting)
    run(of, of.schedule())
    run(of, of.schedule())
    assert len(decoding.output_token_ids) == 2
    of.finish(waiting)
    assert list(of.waiting) == []
    of.finish(decoding)
    of.finish(decoding)  # again: nothing to free
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
    assert (one.max_length, one.remaining) == (6, 3)
    one.dispatched_tokens = 1
    one.append(1)
    assert (one.remaining, one.next_position, one.finish_reason) == (2, 3, None)
    one.append(5)
    assert (one.output_token_ids, one.finish_reason) == ([1, 5], "stop")
    two = request(3, 2, stop_ids=(5,))
    two.append(1)
    two.append(5)
    assert two.finish_reason == "stop"  # both at once: it did stop by itself
    three = request(3, 1)
    three.append(9)
    assert three.finish_reason == "length"


def test_requests_wait_for_a_history_as_for_a_slot() -> None:
    """One history for three slots: the second request that needs one waits for the first to end."""
    of = scheduler(slots=3, histories=1)
    penalised = SamplingParams(max_tokens=2, presence_penalty=1.0)
    first, plain, second = Request([1], penalised, seed=0), request(1, 8), Request([2], penalised, seed=0)
    for one in (first, plain, second):
        of.add(one)
    assert run(of, of.schedule()) == [(first, 0, 1), (plain, 0, 1)]
    assert (first.history_row, plain.history_row, second.slot) == (0, None, None)
    assert run(of, of.schedule()) == [first, plain]
    assert first.finished and first.history_row is None
    assert run(of, of.schedule()) == [plain, (second, 0, 1)]
    assert second.history_row == 0
    of._preempt(second)
    assert (second.slot, second.history_row) == (None, None)
    step = of.schedule()
    assert step is not None and [chunk.request for chunk in step.chunks] == [second]
    assert second.history_row == 0
    of.reset()
    assert second.history_row is None and of._free_history_rows == [0]
