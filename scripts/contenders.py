"""Parts that the benchmarks share: contenders in processes of their own, servers, and targets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Contender:
    """A worker process, ``script --worker ARGUMENTS``, that stays loaded and works on demand.

    Args:
        name: what it is called if it fails.
        script: the script.
        arguments: of the worker.
        checkout: directory whose tpjax it imports; ``None``: the installed one.
    """

    def __init__(
        self, name: str, script: str, arguments: Sequence[str], checkout: Path | None = None
    ) -> None:
        self.name = name
        env = None if checkout is None else {**os.environ, "PYTHONPATH": os.fspath(checkout.resolve())}
        command = [sys.executable, os.fspath(Path(script).resolve()), "--worker", *arguments]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )

    def run(self, what: str) -> float:
        """Does one piece of work in the process and returns the figure it prints."""
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
    """Runs in the worker: does the work named by each line of stdin and prints its figure."""
    for line in sys.stdin:
        print(work[line.strip()](), flush=True)


def transformers_model(model: str) -> Any:
    """Loads an alias with transformers, in float32."""
    import torch
    import transformers

    from tpjax.checkpoints.hub import resolve

    path = resolve(model)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


@dataclass(frozen=True)
class Target:
    """A figure and what it should be.

    Attributes:
        name: what was measured.
        value: the measured figure.
        sign: ``>=`` or ``<=``.
        bound: the figure to reach.
    """

    name: str
    value: float
    sign: str
    bound: float

    @property
    def met(self) -> bool:
        """Whether the figure reaches the bound."""
        return self.value >= self.bound if self.sign == ">=" else self.value <= self.bound

    def __str__(self) -> str:
        verdict = "met" if self.met else "MISSED"
        return f"{self.name:44}{self.value:6.2f}   target {self.sign} {self.bound:<5} {verdict}"


@dataclass
class Served:
    """A `tpjax serve` that has compiled all its programs.

    Attributes:
        url: address of the server.
        pid: its process.
        status: its exit status, once it has ended.
    """

    url: str
    pid: int
    status: int | None = None


def _last_of_programs(line: str) -> bool:
    found = re.search(r"program (\d+) of (\d+): compiled", line)
    return found is not None and found[1] == found[2]


@contextmanager
def served(model: str, tp: int, *options: str) -> Iterator[Served]:
    """Starts a server on a free port; SIGTERM ends it."""
    command = [sys.executable, "-m", "tpjax", "serve", "--model", model, "--tp", str(tp), "--port", "0"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = iter(process.stderr)
        url = next((found[1] for line in said if (found := re.search(r"(http://\S+)", line))), None)
        if url is None or not any(_last_of_programs(line) for line in said):
            raise SystemExit(f"tpjax serve ended with status {process.wait()}")
        # its log goes on: somebody has to read it
        with subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL):
            server = Served(url, process.pid)
            try:
                yield server
            finally:
                process.terminate()
                server.status = process.wait(60)
