#!/usr/bin/env python
"""Compiles all programs of a server for chips that are not here, and says how long each took.

    pip install -e ".[aot-tpu]"
    python scripts/bench_warm_up.py llama-3-8b v5e:2x4 --max-slots 256

The programs are those that the runner compiles at its start, in the same order and on as many threads.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import time
from concurrent.futures import ThreadPoolExecutor

from tpjax.inspect.program import abstract_runner
from tpjax.inspect.topology import parse_topology
from tpjax.planning.published import published_config
from tpjax.planning.timing import seconds
from tpjax.runtime.programs import ProgramSpec


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="name of a published model")
    parser.add_argument("topology", help="TYPE:CHIPS, such as v5e:2x4")
    parser.add_argument("--max-slots", type=int, default=256, help="sequences decoded at once (256)")
    arguments = parser.parse_args()
    runner = abstract_runner(
        published_config(arguments.model), parse_topology(arguments.topology), max_slots=arguments.max_slots
    )
    programs, first = runner.programs, set(runner.programs.first())

    def compiled(spec: ProgramSpec) -> float:
        took = seconds(lambda: programs.get(spec))
        print(f"{took:7.1f} s  {'before the first request  ' if spec in first else ''}{spec}", flush=True)
        return took

    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for specs in (programs.first(), [spec for spec in programs.serving() if spec not in first]):
            list(pool.map(compiled, specs))
            print(f"{time.perf_counter() - start:7.1f} s after the start: {len(programs.compiled)} programs")


if __name__ == "__main__":
    main()
