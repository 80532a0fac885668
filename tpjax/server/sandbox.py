"""A process of its own for what a request makes run: chat templates and the first look at a grammar.

A template is a checkpoint's code over a client's text, and a schema can make its compiler run long or
overflow its stack (llguidance 1.9 ends the process on a chain of some thousand ``$ref``). Neither may touch
the server: the worker has a memory limit, answers within a time limit, and is killed and replaced otherwise.

``python -m tpjax.server.sandbox`` is the worker: on stdin and stdout, JSON with its length before it. The
first message sets it up, each further one is a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
from typing import Any, BinaryIO

from tpjax.server.errors import ApiError, bad_request

START_LIMIT_S = 60.0
TIME_LIMIT_S = 5.0
MEMORY_LIMIT_BYTES = 2 << 30  # of address space
MAX_RENDERED_CHARS = 4 << 20
# A sixteenth of what the server's threads have: what compiles here compiles there.
_STACK_BYTES = 512 << 10
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "LD_LIBRARY_PATH", "LANG", "TZ")


class Sandbox:
    """Runs jobs one after the other in a process that may be killed.

    Args:
        templates: sources of the chat templates, by name.
        variables: what every template sees.
        time_limit_s: of a job.
    """

    def __init__(
        self, templates: dict[str, str], variables: dict[str, str], time_limit_s: float = TIME_LIMIT_S
    ) -> None:
        self._setup = {"templates": templates, "variables": variables}
        self._time_limit_s = time_limit_s
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def render(self, conversation: dict[str, Any]) -> str:
        """The prompt of a conversation: the arguments of ``ChatTemplates.render``.

        Raises:
            ApiError: 400; the template refuses it, or takes too long.
        """
        return await self._run({"render": conversation}, "the chat template", "messages")

    async def check_grammar(self, grammar: str, param: str) -> None:
        """Compiles a grammar and throws it away.

        Raises:
            ApiError: 400; it is not valid, or takes too long.
        """
        await self._run({"grammar": grammar}, "the schema", param)

    async def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            process, self._process = self._process, None
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _run(self, job: dict[str, Any], what: str, param: str) -> str:
        async with self._lock:
            done = False
            try:
                process = await self._started()
                async with asyncio.timeout(self._time_limit_s):
                    answer = await _ask(process, job)
                done = True
            except TimeoutError as error:
                raise bad_request(f"{what} took over {self._time_limit_s:g} s", param) from error
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                raise bad_request(f"{what} needs more memory than it may have", param) from error
            finally:
                if not done:  # an answer may still come: it would be taken for the next job's
                    await self.close()
        if "error" in answer:
            raise bad_request(answer["error"], param)
        text: str = answer["text"]
        return text

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tpjax.server.sandbox",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,  # Ctrl-C is for the server, which then ends the worker
            )
            try:
                async with asyncio.timeout(START_LIMIT_S):
                    await _ask(self._process, self._setup)
            except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as error:
                raise ApiError(503, "the worker for templates does not start", code="worker") from error
        return self._process


async def _ask(process: asyncio.subprocess.Process, message: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    data = json.dumps(message).encode()
    process.stdin.write(len(data).to_bytes(4, "big") + data)
    await process.stdin.drain()
    length = int.from_bytes(await process.stdout.readexactly(4), "big")
    answer: dict[str, Any] = json.loads(await process.stdout.readexactly(length))
    return answer


# --- the worker --------------------------------------------------------------------------------------------


def main() -> None:
    """Answers until stdin ends."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    worker = threading.Thread(target=_work, args=(sys.stdin.buffer, sys.stdout.buffer))
    worker.start()
    worker.join()


def _work(stdin: BinaryIO, stdout: BinaryIO) -> None:
    import llguidance

    from tpjax.chat_template import ChatTemplates
    from tpjax.errors import TpjaxError

    templates: ChatTemplates | None = None
    while header := stdin.read(4):
        message = json.loads(stdin.read(int.from_bytes(header, "big")))
        answer = {}
        try:
            if templates is None:
                templates = ChatTemplates(message["templates"], message["variables"])
            elif "render" in message:
                answer["text"] = text = templates.render(**message["render"])
                if len(text) > MAX_RENDERED_CHARS:
                    answer = {"error": f"the prompt has {len(text)} characters, over {MAX_RENDERED_CHARS}"}
            else:
                wrong = llguidance.LLMatcher.validate_grammar(message["grammar"])
                answer = {"error": f"the schema is not usable: {wrong[:500]}"} if wrong else {"text": ""}
        except TpjaxError as error:
            answer = {"error": str(error)[:500]}
        except (MemoryError, RecursionError):
            answer = {"error": "the chat template needs more memory than it may have"}
        data = json.dumps(answer).encode()
        stdout.write(len(data).to_bytes(4, "big") + data)
        stdout.flush()


if __name__ == "__main__":
    main()
