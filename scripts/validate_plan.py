#!/usr/bin/env python
"""Holds `tpjax plan` to published measurements, and prints how far it is off.

    python scripts/validate_plan.py             # the points the project is held to
    python scripts/validate_plan.py --all       # also those found since, which nothing was promised about

Each point names its source. Errors are of tokens a second and sequence: predicted / published - 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from tpjax.hardware import parse_hardware
from tpjax.planning.plan import make_plan
from tpjax.planning.published import published_config
from tpjax.planning.workload import Workload
from tpjax.runtime.counts import Counts

DATA = Path(__file__).parent / "data"
MEDIAN_TARGET = 0.15
WORST_TARGET = 0.40


def points(name: str) -> list[dict[str, Any]]:
    """Returns the measurements in a file of `scripts/data`."""
    return json.loads((DATA / f"{name}.json").read_text())["points"]


def predict(point: dict[str, Any]) -> float:
    """Returns the predicted tokens a second of one sequence in the batch of a point."""
    hardware, chips = parse_hardware(f"{point['hardware']}:{point['chips']}")
    counts = Counts(point["model"], published_config(point["model"]))
    workload = Workload(point["batch"], point["context"], dtype=point["dtype"])
    plan = make_plan(counts, hardware, chips, point["tp"], workload)
    return 1 / plan.decode.total


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
        rows = points(name)
        print(f"{name}: tokens/s a sequence")
        print(f"  {'point':32}{'predicted':>10}{'published':>11}{'error':>8}  source")
        for point in rows:
            published = point["tokens_per_s_per_sequence"]
            figures = f"{predict(point):10.1f}{published:11.1f}{error(point):+8.1%}"
            print(f"  {point['id']:32}{figures}  {point['source']}")
        errors = [abs(error(point)) for point in rows]
        median, worst = statistics.median(errors), max(errors)
        print(f"  median error {median:.1%}, worst {worst:.1%}\n")
        if name == "published_points":
            missed = median > MEDIAN_TARGET or worst > WORST_TARGET
    print(f"targets: median {MEDIAN_TARGET:.0%}, worst {WORST_TARGET:.0%}: {'MISSED' if missed else 'met'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
