"""Worker pools: processes (``tpjax.sandbox``) for templates, grammars and long texts; threads for short jobs.

A pool runs a few jobs at a time; the time limit of a job starts when it runs. A request whose job waits
counts towards ``max_queue`` (``Service.preparing``), or the pool limits how many wait. A job ends with its
client: a waiting one is dropped, the process of a running one is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tpjax.errors import CheckpointError, RequestError, TpjaxError
from tpjax.sandbox import MEMORY_LIMIT_BYTES, TIME_LIMIT_S, TimeLimitError, Worker
from tpjax.server.error_responses import ApiError, bad_request
from tpjax.server.json_types import Json
from tpjax.server.pace import Pace

T = TypeVar("T")


_CROWD = 2  # waiting jobs of a process above which the crowded limit holds


class WorkerPool:
    """Runs functions in sandboxed processes, several at a time.

    Args:
        size: number of processes; each starts with its first job.
        what: name of the jobs in errors.
        time_limit_s: processor time of a job, seconds.
        memory_limit_bytes: address space of each process.
        crowded_limit_s: time limit while more than two jobs per process wait; ``None``: as otherwise.
        max_waiting: most jobs that wait; ``None``: what the queue of requests admits.
    """

    def __init__(
        self,
        size: int,
        what: str,
        time_limit_s: float = TIME_LIMIT_S,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        crowded_limit_s: float | None = None,
        max_waiting: int | None = None,
    ) -> None:
        self._what = what
        self._max_waiting = max_waiting
        self._time_limit_s = time_limit_s
        self._crowded_limit_s = crowded_limit_s
        self._memory_limit_bytes = memory_limit_bytes
        self._size = size
        self._waiting = 0
        self._pace = Pace()  # of jobs
        self._places = asyncio.Semaphore(size)
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        # the thread of a killed worker ends a little after its place is free
        self._threads = ThreadPoolExecutor(2 * size, thread_name_prefix="tpjax-worker")

    async def run(self, function: str, arguments: Mapping[str, Json], param: str | None) -> Json:
        """Runs a function; cancelling it kills the process it runs in.

        Args:
            function: ``"package.module:name"``.
            arguments: JSON arguments by name.
            param: parameter of the request, for errors.

        Raises:
            ApiError: 400, the function failed or exceeded a limit (the cause says which); 429, too many
                wait; 503, the process does not start.
        """
        async with self._place():
            worker = self._worker()
            self._busy.add(worker)
            try:
                return await asyncio.get_running_loop().run_in_executor(
                    self._threads, worker.ask, function, arguments, self._what, self._limit_s()
                )
            except asyncio.CancelledError:
                worker.kill()
                raise
            except (RequestError, CheckpointError) as error:
                raise bad_request(str(error), param) from error
            except TpjaxError as error:
                raise ApiError(503, str(error), code="worker") from error
            finally:
                self._busy.discard(worker)
                if worker.usable:
                    self._idle.append(worker)

    def close(self) -> None:
        """Ends the processes."""
        for worker in (*self._idle, *self._busy):
            worker.kill()
        self._threads.shutdown()

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        if self._max_waiting is not None and self._waiting >= self._max_waiting:
            message = f"{self._what}: {self._waiting} jobs wait, the most that may"
            wait_s = self._pace.retry_after_s(1, 1, time.perf_counter())
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(wait_s)})
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        if not self._busy:
            self._pace.begin(time.perf_counter())
        try:
            yield
        finally:
            self._pace.end(1, time.perf_counter())
            self._places.release()

    def _limit_s(self) -> float:
        if self._crowded_limit_s is not None and self._waiting > _CROWD * self._size:
            return self._crowded_limit_s
        return self._time_limit_s

    def _worker(self) -> Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.usable:
                return worker
            worker.kill()  # the process has ended by itself; this closes its pipes
        return Worker(self._memory_limit_bytes)


class TieredWorkerPool:
    """Runs functions with a short time limit first, and those that exceed it again with the full limit.

    The second run is in other processes, so slow jobs delay quick ones by at most the short limit each, and
    by the crowded limit where many wait.

    Args:
        quick: number of processes with the short limit.
        slow: number of processes with the full limit.
        what: name of the jobs in errors.
        quick_limit_s: the short limit, seconds of processor time.
        crowded_limit_s: the short limit while more than two jobs per process wait.
    """

    def __init__(
        self, quick: int, slow: int, what: str, quick_limit_s: float, crowded_limit_s: float
    ) -> None:
        self._quick = WorkerPool(quick, what, quick_limit_s, crowded_limit_s=crowded_limit_s)
        self._slow = WorkerPool(slow, what)

    async def run(self, function: str, arguments: Mapping[str, Json], param: str | None) -> Json:
        """Runs a function; see :meth:`WorkerPool.run`."""
        try:
            return await self._quick.run(function, arguments, param)
        except ApiError as error:
            if not isinstance(error.__cause__, TimeLimitError):
                raise
        return await self._slow.run(function, arguments, param)

    def close(self) -> None:
        """Ends the processes."""
        self._quick.close()
        self._slow.close()


class ThreadPool:
    """Runs functions that are short, or have to run in this process, on a few threads."""

    def __init__(self, size: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(size, thread_name_prefix=f"tpjax-{name}")

    async def run(self, function: Callable[..., T], *arguments: Json, limit_s: float | None = None) -> T:
        """Runs a function; cancelling removes it from the queue.

        Args:
            function: function to run.
            *arguments: its arguments.
            limit_s: seconds to wait once it runs; the thread continues until the function returns.

        Raises:
            TimeoutError: the function took longer.
        """
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def begin() -> T:
            if limit_s is not None:
                loop.call_soon_threadsafe(begun.set)
            return function(*arguments)

        future = loop.run_in_executor(self._threads, begin)
        try:
            if limit_s is not None:
                await begun.wait()
            async with asyncio.timeout(limit_s):
                return await future
        finally:
            future.cancel()

    def close(self) -> None:
        """Drops waiting jobs; running ones end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)
