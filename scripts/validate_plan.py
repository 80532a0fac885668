#!/usr/bin/env python
"""Holds `tpjax plan` to published measurements, and prints how far it is off.

    python scripts/validate_plan.py             # the points the project is held to
    python scripts/validate_plan.py --all       # also those found since, which nothing was promised about

Each point names its source. Errors are of tokens a second and sequence: predicted / published - 1. A point
with an engine was measured through its server: the mean time between two tokens of a response contains
prompts of others that ran in between, so the measurement is simulated, not a decode step alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from measured_engines import plan, points, simulate_point

MEDIAN_TARGET = 0.15
WORST_TARGET = 0.40


def predict(point: dict[str, Any]) -> float:
    """Returns the predicted tokens a second of one sequence in the batch of a point."""
    if "engine" in point:
        return 1e3 / simulate_point(point, waves=1).summary()["mean_tpot_ms"]
    return 1 / plan(point).decode.total


def error(point: dict[str, Any]) -> float:
    """Returns the relative error of the prediction; positive is too fast."""
    return predict(point) / point["tokens_per_s_per_sequence"] - 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="also the points of extra_points.json")
    arguments = parser.parse_args()
    missed = False
    for name in ("published_points", *(["extra_points"] if arguments.all else [])):
        print(f"{name}: tokens/s a sequence")
        print(f"  {'point':32}{'predicted':>10}{'published':>11}{'error':>8}  source")
        errors = []
        for point in points(name):
            published, predicted = point["tokens_per_s_per_sequence"], predict(point)
            errors.append(abs(predicted / published - 1))
            figures = f"{predicted:10.1f}{published:11.1f}{predicted / published - 1:+8.1%}"
            print(f"  {point['id']:32}{figures}  {point['source']}")
        median, worst = statistics.median(errors), max(errors)
        print(f"  median error {median:.1%}, worst {worst:.1%}\n")
        if name == "published_points":
            missed = median > MEDIAN_TARGET or worst > WORST_TARGET
    print(f"targets: median {MEDIAN_TARGET:.0%}, worst {WORST_TARGET:.0%}: {'MISSED' if missed else 'met'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
