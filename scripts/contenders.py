"""What is compared: each in a process of its own, taking turns, so that all see the same drift."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
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
