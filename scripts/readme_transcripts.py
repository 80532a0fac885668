#!/usr/bin/env python
"""Runs the commands that the README shows and writes what they print back into it.

    python scripts/readme_transcripts.py            # all blocks
    python scripts/readme_transcripts.py plan       # the blocks that contain "plan"
    python scripts/readme_transcripts.py --check    # only name what differs, with exit status 1

A block of the language ``console`` holds commands, ``$ ...``, and what they print. A last ``…``
leaves out the rest. ``<!-- needs: MODULE -->`` before a block: it runs if that Python module can be imported.
Figures of time and speed, and line numbers of sources, differ from run to run: see :func:`comparable`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
COLUMNS = 100
_BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>\w+) -->\n)?```console\n(?P<text>.*?)```\n", re.DOTALL)
_REST = "…"
_LOG = re.compile(r"WARNING: All log messages before absl|[IWE]\d{4} ")  # of compilers, for their developers


@dataclass(frozen=True)
class Block:
    """Commands of the README and what they print.

    Attributes:
        text: as it stands in the README.
        start: where it begins there.
        needs: a module that has to be importable; empty: none.
    """

    text: str
    start: int
    needs: str

    @property
    def runs_here(self) -> bool:
        """Whether what it needs is installed."""
        return not self.needs or importlib.util.find_spec(self.needs) is not None

    def commands(self) -> Iterator[tuple[str, str]]:
        """Yields each command with what it printed."""
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            command, _, printed = part.partition("\n")
            yield command, printed

    def run(self) -> str:
        """Runs the commands and returns the block as it should stand in the README."""
        return "".join(_shown(command, printed) for command, printed in self.commands())


def blocks(readme: str) -> list[Block]:
    """Returns the console blocks of a README."""
    return [Block(one["text"], one.start("text"), one["needs"] or "") for one in _BLOCK.finditer(readme)]


def comparable(text: str) -> str:
    """Replaces what differs from run to run: times, speeds, and line numbers of sources.

    The spaces that line times up in a column go too: 9.9 s and 10.1 s differ there.
    """
    text = re.sub(r"\b(\w+\.py):\d+", r"\1:…", text)
    text = re.sub(r" *\d+(\.\d+)?(?= (s|ms|tokens/s)\b)", " #", text)
    return re.sub(r"(?<=compiled in )[ \d.s]+", "#", text)


def _shown(command: str, printed: str) -> str:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "COLUMNS": str(COLUMNS), "NO_COLOR": "1"}
    environment.pop("XLA_FLAGS", None)  # whoever calls may have faked devices of its own
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["bash", "-c", f"exec 2>&1; {command}"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=900,
        )
    lines = [line.rstrip() for line in done.stdout.rstrip("\n").splitlines()]
    lines = [line for line in lines if not _LOG.match(line)]
    lines = [re.sub(r"\b(\w+\.py):\d+", r"\1:…", line) for line in lines]
    kept = printed.rstrip("\n").splitlines()
    if kept and kept[-1].strip() == _REST:
        lines = [*lines[: len(kept) - 1], kept[-1]]
    return "\n".join((f"$ {command}", *lines)) + "\n"


def main() -> int:
    """Rewrites the README, or compares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("contains", nargs="?", default="")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    readme, wrong = README.read_text(), 0
    for block in reversed(blocks(readme)):
        if not block.runs_here or options.contains not in block.text:
            continue
        now = block.run()
        if comparable(now) != comparable(block.text):
            wrong += 1
            print(f"differs now:\n{now}", file=sys.stderr)
        readme = readme[: block.start] + now + readme[block.start + len(block.text) :]
    if not options.check:
        README.write_text(readme)
    return 1 if options.check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
