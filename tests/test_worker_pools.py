"""Processes with limits (``tpjax.sandbox``), and the server's pools of them: templates, grammars, threads."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from serving import LOOP

from tpjax.errors import CheckpointError, RequestError
from tpjax.sandbox import NICENESS, Worker, sandbox
from tpjax.server.error_responses import ApiError
from tpjax.server.grammars.checker import GrammarChecker
from tpjax.server.worker_pools import ThreadPool, WorkerPool
from tpjax.text.chat_template import RENDER, ChatTemplates


def job(template: str, content: str = "hi") -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return ChatTemplates({"default": template}, {}).job({"messages": messages})


def render(template: str, **more: Any) -> str:
    return ChatTemplates({"default": template}, {}).render([{"role": "user", "content": "é\n"}], **more)


@pytest.mark.parametrize(
    ("template", "message"),
    (
        ("{{ 'a' * 10**9 }}", "needs more memory"),
        ("{{ '%999999999d' % 3 }}", "needs more memory"),
        ("{{ 'a'.center(10**9) }}", "needs more memory"),
        ("{{ [0] * 10**9 }}", "needs more memory"),
        (
            "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "memory",
        ),
        ("{{ 'a' * 2**23 }}", "has 8388608 characters, over 4194304"),
    ),
)
def test_a_template_has_limits_in_python_too(template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render(template)
    assert render("{{ messages[0].content }}") == "é\n"  # and the next one has a worker


def test_a_worker_ends_at_its_time_limit() -> None:
    worker = Worker()
    with pytest.raises(RequestError, match=r"the chat template took over 0\.3 s"):
        worker.ask(RENDER, job(LOOP), "the chat template", 0.3)
    assert not worker.usable


def test_the_clock_of_a_first_job_starts_after_its_imports() -> None:
    """Importing Jinja takes 0.07 s of processor time."""
    worker = Worker()
    assert worker.ask(RENDER, job("{{ messages[0].content }}"), "the chat template", 0.05) == "hi"
    worker.kill()


def test_what_a_worker_cannot_take_or_give() -> None:
    with pytest.raises(RequestError, match="JSON only: set is not JSON"):
        render("{{ x }}", x={1})
    assert render("{{ x[1] }}{{ x }}", x=(1, 2)) == "2[1, 2]"
    with pytest.raises(CheckpointError, match="line 1"):
        render("{% for %}")
    with pytest.raises(RequestError, match="refused the messages: no"):
        render("{{ raise_exception('no') }}")


def test_workers_let_the_model_go_first() -> None:
    """A worker has a session of its own; Linux may share the cores among sessions, whatever the niceness."""
    render("{{ 1 }}")
    assert sandbox._worker is not None and sandbox._worker._process is not None
    pid = sandbox._worker._process.pid
    assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0) + NICENESS
    group = Path(f"/proc/{pid}/autogroup")
    if group.exists() and os.geteuid() == 0:  # others may have to wait for their turn to set it
        assert group.read_text().endswith(f"nice {NICENESS}\n")


def test_a_worker_that_died_is_replaced_and_a_fork_has_its_own() -> None:
    assert render("{{ messages[0].content }}") == "é\n"
    assert sandbox._worker is not None and sandbox._worker._process is not None
    process = sandbox._worker._process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert render("{{ messages[0].content }}") == "é\n"
    assert sandbox._worker._process is not process
    sandbox._owner = -1  # as it is in a child of this process
    mine = sandbox._worker
    try:
        assert render("{{ messages[0].content }}") == "é\n"
        assert sandbox._worker is not mine and mine.usable
    finally:
        mine.kill()


def test_a_pool_forgets_what_was_cancelled_and_kills_no_other() -> None:
    async def play() -> None:
        pool = WorkerPool(2, "the chat template", time_limit_s=60)
        try:
            slow = [asyncio.ensure_future(pool.run(RENDER, job(LOOP), "messages")) for _ in range(4)]
            fast = asyncio.ensure_future(pool.run(RENDER, job("x"), "messages"))
            while len(pool._busy) < 2:
                await asyncio.sleep(0.01)
            slow[3].cancel()  # it waits: nothing of it ever runs
            first, second = pool._busy
            slow[0].cancel()
            await asyncio.gather(slow[0], slow[3], return_exceptions=True)
            assert first.usable != second.usable  # one worker ended, the other goes on
            assert not slow[1].done()
            slow[1].cancel()
            slow[2].cancel()
            assert await fast == "x"
            assert not pool._busy
        finally:
            pool.close()

    asyncio.run(play())


def test_where_many_wait_slow_jobs_end_sooner() -> None:
    async def play() -> None:
        pool = WorkerPool(1, "the chat template", time_limit_s=60, crowded_limit_s=0.1)
        try:
            slow = [asyncio.ensure_future(pool.run(RENDER, job(LOOP), "messages")) for _ in range(5)]
            while not pool._busy:
                await asyncio.sleep(0.01)
            slow[0].cancel()  # it began alone, with the full limit; the next has three behind it
            with pytest.raises(ApiError, match=r"took over 0\.1 s"):
                await slow[1]
            while not pool._busy:
                await asyncio.sleep(0.01)
            assert not any(one.done() for one in slow[2:])  # two wait for one process: that is no crowd
            for one in slow[2:]:
                one.cancel()
        finally:
            pool.close()

    asyncio.run(play())


def test_a_pool_may_limit_how_many_wait() -> None:
    async def play() -> None:
        pool = WorkerPool(1, "rendering", time_limit_s=60, max_waiting=2)
        try:
            slow = [asyncio.ensure_future(pool.run(RENDER, job(LOOP), "text")) for _ in range(4)]
            with pytest.raises(ApiError, match="2 jobs wait") as caught:
                await slow[3]
            assert caught.value.status == 429 and not any(one.done() for one in slow[:3])
            for one in slow:
                one.cancel()
        finally:
            pool.close()

    asyncio.run(play())


def test_a_slow_job_holds_one_place_of_a_pool() -> None:
    async def play() -> None:
        pool = WorkerPool(2, "the chat template", time_limit_s=60)
        try:
            slow = asyncio.ensure_future(pool.run(RENDER, job(LOOP), "messages"))
            for text in ("a", "b", "c"):
                assert await pool.run(RENDER, job("{{ messages[0].content }}", text), "messages") == text
            assert not slow.done()
            slow.cancel()
        finally:
            pool.close()

    asyncio.run(play())


def test_the_clock_of_a_thread_starts_when_it_runs() -> None:
    async def play() -> None:
        pool, go = ThreadPool(1, "test"), threading.Event()
        try:
            first = asyncio.ensure_future(pool.run(go.wait, 60))
            second = asyncio.ensure_future(pool.run(lambda: 7, limit_s=2))
            gone = asyncio.ensure_future(pool.run(pytest.fail, "it was cancelled"))
            await asyncio.sleep(2.5)  # longer than the limit, in the queue
            gone.cancel()
            go.set()
            assert await first and await second == 7
            go.clear()
            with pytest.raises(TimeoutError):
                await pool.run(go.wait, 60, limit_s=0.05)
            go.set()
        finally:
            pool.close()

    asyncio.run(play())


def test_a_grammar_that_ends_its_process() -> None:
    import llguidance

    async def play() -> None:
        checker = GrammarChecker()
        try:
            crash = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(20_000)}
            text = json.dumps({"$ref": "#/$defs/a0", "$defs": crash})
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text)
            with pytest.raises(ApiError, match="the schema"):
                await checker.check_grammar(grammar, "response_format")
            await checker.check_grammar(llguidance.LLMatcher.grammar_from_regex("a+"), "response_format")
        finally:
            checker.close()

    asyncio.run(play())


def test_a_short_schema_of_a_large_automaton() -> None:
    """Multiples of a prime have as many states as it: minutes and gigabytes, on a thread that never ends."""
    import llguidance

    def grammar(multiple: int, before: str = "") -> str:
        schema = json.dumps({"type": "integer", "multipleOf": multiple})
        return llguidance.LLMatcher.grammar_from_lark(f"start: {before} %json {schema}")

    async def play() -> None:
        checker = GrammarChecker(time_limit_s=0.3)
        try:
            for before in ("", "<[49000]>", "<[3-5,200000]>"):
                with pytest.raises(ApiError, match=r"the schema took over 0\.3 s"):
                    await checker.check_grammar(grammar(9_999_991, before), "response_format")
                await checker.check_grammar(grammar(97, before), "response_format")
        finally:
            checker.close()

    asyncio.run(play())
