#!/usr/bin/env python
"""Holds `tpjax plan --serve` to published measurements of servers, or to `tpjax bench serve` on this machine.

    python scripts/validate_serving.py                 # the points of served_points.json
    python scripts/validate_serving.py --points FILE   # other points in its format
    python scripts/validate_serving.py --local         # SmolLM2 here: minutes, with nothing else running

A published point is simulated as it was measured: a closed loop of so many requests in flight. What a step of
an engine takes beyond the planner's formulas is one constant for each engine, seconds that the devices wait
for the host: the median of what its other points ask for, never the point's own. The local run measures how
many requests a second the server completes at most, then offers 0.3, 0.6 and 0.9 of that.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contenders import served
from measured_engines import DATA, simulate_point

from tpjax.cli import serving_benchmark
from tpjax.planning.cost_model import CostModel
from tpjax.planning.measure import measured_hardware
from tpjax.planning.published import find_config
from tpjax.planning.serving import plan_server, simulate
from tpjax.planning.workload import Workload
from tpjax.runtime.counts import Counts

MEDIAN_TARGET = 0.20
# Figures of a point, and what they are called in a summary. The mean time to the first token would contain
# the first wave, in which all requests come at once: how many followed is not published.
FIGURES = {"tpot_ms": "mean_tpot_ms", "ttft_ms": "median_ttft_ms", "output_tokens_per_s": "output_throughput"}
MOST_OVERHEAD_S = 0.1

LOCAL_TARGETS = {"output_throughput": 0.20, "median_tpot_ms": 0.20, "median_ttft_ms": 0.30}
FRACTIONS = (0.3, 0.6, 0.9)
LOAD: dict[str, Any] = {"num_prompts": 48, "input_len": 128, "output_len": 64, "range_ratio": 0.5}


# --- published points --------------------------------------------------------------------------------------


def wanted_overhead_s(point: dict[str, Any]) -> float:
    """Returns the overhead of a dispatch at which a point's speed is met; 0 if it is faster without any."""
    name = "tpot_ms" if "tpot_ms" in point else "output_tokens_per_s"

    def too_fast(overhead_s: float) -> bool:
        ratio = simulate_point(point, overhead_s).summary()[FIGURES[name]] / point[name]
        return ratio < 1 if name == "tpot_ms" else ratio > 1

    low, high = 0.0, 1e-3
    if not too_fast(low):
        return 0.0
    while high < MOST_OVERHEAD_S and too_fast(high):
        low, high = high, 2 * high
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if too_fast(middle) else (low, middle)
    return low


def compare(points: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float, str, float, float]]:
    """Yields point, overhead, figure, simulated and published value for each figure of each point."""
    wanted = {point["id"]: wanted_overhead_s(point) for point in points}
    for point in points:
        others = [
            wanted[other["id"]]
            for other in points
            if other["engine"] == point["engine"] and other["id"] != point["id"]
        ]
        overhead_s = statistics.median(others) if others else 0.0
        summary = simulate_point(point, overhead_s).summary()
        for figure, name in FIGURES.items():
            if figure in point:
                yield point, overhead_s, figure, summary[name], point[figure]


def validate_published(file: Path) -> bool:
    """Prints each figure, its error and the median; returns whether that is within the target."""
    print(f"{file.name}: simulated with the overhead that the engine's other points ask for")
    print(f"  {'point':32}{'figure':22}{'simulated':>10}{'published':>11}{'error':>8}  overhead, ms")
    errors = []
    for point, overhead_s, figure, simulated, published in compare(json.loads(file.read_text())["points"]):
        errors.append(abs(simulated / published - 1))
        values = f"{simulated:10.1f}{published:11.1f}{simulated / published - 1:+8.1%}"
        print(f"  {point['id']:32}{figure:22}{values}  {overhead_s * 1e3:.2f}", flush=True)
    median = statistics.median(errors)
    met = median <= MEDIAN_TARGET
    print(f"  median error {median:.1%}, worst {max(errors):.1%}; target: median {MEDIAN_TARGET:.0%}")
    print("met" if met else "MISSED")
    return met


# --- this machine ------------------------------------------------------------------------------------------


def validate_local(model: str, rounds: int | None) -> bool:
    """Measures this machine's server and simulates it; returns whether all targets are met."""
    machine = measured_hardware(1, rounds=rounds)
    server = plan_server(CostModel(Counts(*find_config(model)), machine, 1, Workload(dtype="float32")))
    with served(model, 1, "--max-slots", str(server.limits.max_slots)) as process:
        profile = serving_benchmark.LoadProfile(process.url, **LOAD)
        serving_benchmark.sweep(profile, [math.inf], {})  # warms up
        (full,) = serving_benchmark.sweep(profile, [math.inf], {})
        figures = full.summary()
        saturation = figures["request_throughput"]
        print(f"saturation: {saturation:.2f} requests/s, {figures['output_throughput']:.1f} tokens/s out")
        rates = [math.inf, *(fraction * saturation for fraction in FRACTIONS)]
        measured = [full, *serving_benchmark.sweep(profile, rates[1:], {})]
    rows, met = [], True
    print(f"  {'rate':>12}  {'figure':20}{'simulated':>10}{'measured':>10}{'error':>8}")
    for rate, result in zip(rates, measured, strict=True):
        simulated = simulate(server, profile.arrivals(rate, random.Random(profile.seed)), rate=rate).summary()
        for name, target in LOCAL_TARGETS.items():
            value, figure = simulated[name], result.summary()[name]
            error = value / figure - 1
            held = math.isfinite(rate)
            met &= not held or abs(error) <= target
            mark = "" if not held or abs(error) <= target else f"  over {target:.0%}"
            rows.append(f"  {rate:12.2f}  {name:20}{value:10.1f}{figure:10.1f}{error:+8.1%}{mark}")
    print("\n".join(rows))
    print("met" if met else "MISSED")
    return met


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=Path, default=DATA / "served_points.json", help="published points")
    parser.add_argument("--local", action="store_true", help="this machine's own server instead")
    parser.add_argument("--model", default="smollm2-135m", help="the model of --local")
    parser.add_argument("--rounds", type=int, help="rounds of measuring this machine (15)")
    arguments = parser.parse_args()
    if arguments.local:
        return 0 if validate_local(arguments.model, arguments.rounds) else 1
    return 0 if validate_published(arguments.points) else 1


if __name__ == "__main__":
    sys.exit(main())
