#!/usr/bin/env python
"""What a step costs that several processes run: encoding its host arguments, sending them, decoding them.

    python scripts/bench_replay.py           # 8 rows, and 256 rows of 1,024 blocks with grammars

Process 0 encodes and sends as it does while it serves; a second process on this machine receives, decodes,
and answers with a byte. Nothing runs on a device. "process 0" is what a step is longer there; "both" is until
the other process could dispatch it too, the answer included. Medians over many steps.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

BLOCKS, PAGE_SIZE, VOCAB, MASK_BATCH = 1024, 128, 49_152, 16
GOALS = {8: 0.3, 256: 1.5}  # milliseconds


def decode_arguments(rows: int, step: int, pages: np.ndarray) -> tuple[Any, ...]:
    """Returns the arguments of a decode step: those of ``PackedRows``, each row a token further."""
    position = 60_000 + step + 37 * np.arange(rows)
    known = position // PAGE_SIZE + 1
    tables = np.where(np.arange(BLOCKS) < known[:, None], pages, 0).astype(np.int32)
    ints = np.stack([np.arange(rows), position, 200_000 - position, np.full(rows, 131_072)], 1).astype(
        np.int32
    )
    floats = np.tile(np.float32([0.7, 0.95, 0.0, 1.0, 0.0, 0.0]), (rows, 1))
    sampling = np.tile(np.int32([40, 0, 7, -1, 0, 2**31 - 1]), (rows, 1))
    return (ints, np.full((rows, 8), -1, np.int32), tables, floats, sampling), np.int32(1)


def mask_arguments(slots: np.ndarray, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the arguments of an upload of masks."""
    return slots.astype(np.int32), states


def steps(rows: int, count: int, grammars: bool) -> Iterator[list[tuple[int, tuple[Any, ...]]]]:
    """Yields the dispatches of each step: masks, which all change, then the decode step."""
    random = np.random.default_rng(0)
    pages = random.integers(1, 300_000, (rows, BLOCKS), dtype=np.int32)
    words = VOCAB // 32
    # what a JSON schema allows: inside a string nearly everything, elsewhere a few tokens
    string = random.integers(0, 2**32, words, dtype=np.uint32)
    states = [string, *(np.zeros(words, np.uint32) for _ in range(31))]
    for state in states[1:]:
        state[random.integers(0, words, 40)] = random.integers(0, 2**32, 40, dtype=np.uint32)
    for step in range(count):
        dispatches = []
        if grammars:
            chosen = np.where(random.random(rows) < 0.5, 0, random.integers(1, 32, rows))
            for start in range(0, rows, MASK_BATCH):
                batch = np.stack([states[i] for i in chosen[start : start + MASK_BATCH]])
                dispatches.append((1, mask_arguments(np.arange(start, start + len(batch)), batch)))
        yield [*dispatches, (0, decode_arguments(rows, step, pages))]


def follow(port: int, rows: int) -> None:
    """Decodes what arrives, and answers when a decode step has."""
    from tpjax.runtime.channel import Kind, connect
    from tpjax.runtime.replay_codec import DispatchDecoder

    connection = connect("127.0.0.1", port, b"secret")
    examples = next(steps(rows, 1, True))
    decoders = {number: DispatchDecoder(arguments) for number, arguments in examples}
    while (frame := connection.receive()) is not None:
        number = int.from_bytes(frame.body[:4], "little")
        decoders[number].decode(frame.body[4:])
        if number == 0:
            connection.send(Kind.BEAT)


def measure(rows: int, count: int, grammars: bool) -> tuple[list[float], list[float], float]:
    """Returns times of process 0 and of both, milliseconds a step, and the bytes of a step."""
    from tpjax.runtime.channel import Kind, accept, listen
    from tpjax.runtime.replay_codec import DispatchEncoder

    own, both, sent = [], [], 0
    with listen("127.0.0.1") as sock:
        sock.settimeout(60)
        words = [sys.executable, __file__, "--follow", str(sock.getsockname()[1]), "--rows", str(rows)]
        with subprocess.Popen(words) as process:
            connection = accept(sock, b"secret")
            assert connection is not None
            encoders = {0: DispatchEncoder(), 1: DispatchEncoder()}
            for step in steps(rows, count, grammars):
                start = time.perf_counter()
                for number in (1, 0):  # as the runner does: the masks at once, then the decode step
                    if calls := [arguments for kind, arguments in step if kind == number]:
                        body = [number.to_bytes(4, "little"), *encoders[number].encode(calls)]
                        connection.send(Kind.DISPATCH, body)
                        sent += sum(map(len, body))
                own.append((time.perf_counter() - start) * 1e3)
                connection.receive()
                both.append((time.perf_counter() - start) * 1e3)
            connection.close()
            process.wait()
    return own[5:], both[5:], sent / count


def main() -> None:
    """Prints a line for each number of rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--follow", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.follow:
        return follow(given.follow, given.rows)
    for rows, grammars in ((8, False), (8, True), (256, False), (256, True)):
        own, both, size = measure(rows, given.steps, grammars)
        what = "with grammars" if grammars else "no grammars"
        print(
            f"{rows:3} rows of {BLOCKS} blocks, {what}: process 0 {statistics.median(own):.3f} ms, both "
            f"{statistics.median(both):.3f} ms (goal {GOALS[rows]}), {size / 1e3:.1f} kB a step"
        )


if __name__ == "__main__":
    main()
