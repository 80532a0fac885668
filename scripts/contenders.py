"""What is compared: each in a process of its own, taking turns, so that all see the same drift."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class Contender:
    """A worker process, ``script --worker ARGUMENTS``, that stays loaded and works on demand."""

    def __init__(self, name: str, script: str, arguments: Sequence[str]) -> None:
        self.name = name
        command = [sys.executable, os.fspath(Path(script).resolve()), "--worker", *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def run(self, what: str) -> float:
        """One piece of work; the figure it answers with."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self._process.wait()}")
        return float(line)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def serve(work: dict[str, Callable[[], float]]) -> None:
    """The worker's side."""
    for line in sys.stdin:
        print(work[line.strip()](), flush=True)


@dataclass
class Served:
    """A `tpjax serve` that is ready.

    Attributes:
        url: of the server.
        pid: of its process.
        status: how it ended, once it has.
    """

    url: str
    pid: int
    status: int | None = None


@contextmanager
def served(model: str, tp: int, *options: str) -> Iterator[Served]:
    """Starts a server on a free port; SIGTERM ends it."""
    command = [sys.executable, "-m", "tpjax.cli", "serve", "--model", model, "--tp", str(tp), "--port", "0"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = iter(process.stderr)
        url = next((found[1] for line in said if (found := re.search(r"(http://\S+)", line))), None)
        if url is None or not any("is ready" in line for line in said):
            raise SystemExit(f"tpjax serve ended with status {process.wait()}")
        # its log goes on: somebody has to read it
        with subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL):
            server = Served(url, process.pid)
            try:
                yield server
            finally:
                process.terminate()
                server.status = process.wait(60)
