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
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from typing import IO, Any

from tpjax.server.errors import ApiError, bad_request

START_LIMIT_S = 60.0
TIME_LIMIT_S = 5.0
MEMORY_LIMIT_BYTES = 2 << 30  # of address space
MAX_RENDERED_CHARS = 4 << 20
# A sixteenth of what the server's threads have: what compiles here compiles there.
_STACK_BYTES = 512 << 10
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
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
        self._process: subprocess.Popen[bytes] | None = None

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

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):  # whoever still reads has met the end by now
                with contextlib.suppress(OSError):
                    pipe and pipe.close()

    async def _run(self, job: dict[str, Any], what: str, param: str) -> str:
        async with self._lock:
            answer = None
            try:
                process = await self._started()
                async with asyncio.timeout(self._time_limit_s):
                    answer = await asyncio.to_thread(_ask, process, job)
            except TimeoutError as error:
                raise bad_request(f"{what} took over {self._time_limit_s:g} s", param) from error
            except (EOFError, OSError) as error:
                raise bad_request(f"{what} needs more memory than it may have", param) from error
            finally:
                if answer is None:  # one may still come: it would be taken for the next job's
                    self.close()
        if "error" in answer:
            raise bad_request(answer["error"], param)
        text: str = answer["text"]
        return text

    async def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # Popen and not asyncio's: uvloop would fork, and JAX's threads do not survive that
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tpjax.server.sandbox"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,  # Ctrl-C is for the server, which then ends the worker
            )
            try:
                async with asyncio.timeout(START_LIMIT_S):
                    await asyncio.to_thread(_ask, self._process, self._setup)
            except (TimeoutError, EOFError, OSError) as error:
                raise ApiError(503, "the worker for templates does not start", code="worker") from error
        return self._process


def _ask(process: subprocess.Popen[bytes], message: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    _send(process.stdin, message)
    answer = _receive(process.stdout)
    if answer is None:
        raise EOFError
    return answer


def _send(pipe: IO[bytes], message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    pipe.write(len(data).to_bytes(4, "big") + data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> dict[str, Any] | None:
    """A message, or ``None`` at the end."""
    header = pipe.read(4)
    data = pipe.read(int.from_bytes(header, "big"))
    message: dict[str, Any] | None = json.loads(data) if data else None
    return message


# --- the worker --------------------------------------------------------------------------------------------


def main() -> None:
    """Answers until stdin ends."""
    import resource

    if sys.platform == "linux":  # a template that hangs must not outlive a server that was killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    worker = threading.Thread(target=_work, args=(sys.stdin.buffer, sys.stdout.buffer))
    worker.start()
    worker.join()


def _work(stdin: IO[bytes], stdout: IO[bytes]) -> None:
    import llguidance

    from tpjax.errors import TpjaxError
    from tpjax.text.chat_template import ChatTemplates

    templates: ChatTemplates | None = None
    while (message := _receive(stdin)) is not None:
        answer = {"text": ""}
        try:
            if templates is None:
                templates = ChatTemplates(message["templates"], message["variables"])
            elif "render" in message:
                answer["text"] = text = templates.render(**message["render"])
                if len(text) > MAX_RENDERED_CHARS:
                    answer = {"error": f"the prompt has {len(text)} characters, over {MAX_RENDERED_CHARS}"}
            else:
                wrong = llguidance.LLMatcher.validate_grammar(message["grammar"])
                if wrong:
                    answer = {"error": f"the schema is not usable: {wrong[:500]}"}
        except TpjaxError as error:
            answer = {"error": str(error)[:500]}
        except MemoryError:
            answer = {"error": "the chat template needs more memory than it may have"}
        except Exception as error:  # a template is code, and its options are the client's
            answer = {"error": f"the chat template failed: {type(error).__name__}: {error}"[:500]}
        _send(stdout, answer)


if __name__ == "__main__":
    main()
