"""The server's workers: processes for templates, grammars and long texts, and threads for short ones.

Each pool has few places, and a job's clock starts when it has one. Whoever waits for a place counts towards
``max_queue`` (``Service.preparing``). A job ends with its client: one that waits is forgotten, the process of
one that runs is killed, and nobody else's is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tpjax.errors import CheckpointError, RequestError, TpjaxError
from tpjax.sandbox import MEMORY_LIMIT_BYTES, TIME_LIMIT_S, TimeLimitError, Worker
from tpjax.server.error_responses import ApiError, bad_request

T = TypeVar("T")


class WorkerPool:
    """Runs functions in processes, several at a time.

    Args:
        size: processes; each starts when there is something for it.
        what: names its jobs in errors.
        time_limit_s: processor time of a job.
        memory_limit_bytes: address space of each.
    """

    def __init__(
        self,
        size: int,
        what: str,
        time_limit_s: float = TIME_LIMIT_S,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    ) -> None:
        self._what = what
        self._time_limit_s = time_limit_s
        self._memory_limit_bytes = memory_limit_bytes
        self._places = asyncio.Semaphore(size)
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        # a killed worker's thread lives a little longer than its place is taken
        self._threads = ThreadPoolExecutor(2 * size, thread_name_prefix="tpjax-worker")

    @property
    def running(self) -> int:
        """Jobs that have a place."""
        return len(self._busy)

    async def run(self, function: str, arguments: Mapping[str, Any], param: str | None) -> Any:
        """Runs a function; cancelling it kills the process it runs in.

        Args:
            function: ``"package.module:name"``.
            arguments: by name.
            param: the request's parameter that errors name.

        Raises:
            ApiError: 400; it failed, or is over a limit; the cause says which. 503; there is no process.
        """
        async with self._places:
            worker = self._worker()
            self._busy.add(worker)
            try:
                return await asyncio.get_running_loop().run_in_executor(
                    self._threads, worker.ask, function, arguments, self._what, self._time_limit_s
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

    def _worker(self) -> Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.usable:
                return worker
            worker.kill()  # it has ended by itself; what is left of it goes too
        return Worker(self._memory_limit_bytes)


class TieredWorkerPool:
    """Runs functions with a short limit first, and those over it once more, elsewhere, with the whole limit.

    So what is slow keeps no place for long from what is quick.

    Args:
        quick: processes for what keeps the short limit.
        slow: processes for what does not.
        what: names the jobs in errors.
        quick_limit_s: processor time of a job at first.
    """

    def __init__(self, quick: int, slow: int, what: str, quick_limit_s: float) -> None:
        self._quick = WorkerPool(quick, what, quick_limit_s)
        self._slow = WorkerPool(slow, what)

    async def run(self, function: str, arguments: Mapping[str, Any], param: str | None) -> Any:
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
    """Runs functions that are short, or cannot leave this process, on a few threads of its own."""

    def __init__(self, size: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(size, thread_name_prefix=f"tpjax-{name}")

    async def run(self, function: Callable[..., T], *arguments: Any, limit_s: float | None = None) -> T:
        """Runs a function; cancelling it takes it out of the queue.

        Args:
            function: what to run.
            *arguments: its arguments.
            limit_s: how long to wait for it once it runs; the thread goes on until it ends.

        Raises:
            TimeoutError: it took longer.
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
        """Forgets what waits; what runs ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)
