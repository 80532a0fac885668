"""Reduces a program's HLO to what tests of its collectives read: ``record_hlo.py IN.txt OUT.txt.gz``."""

from __future__ import annotations

import gzip
import re
import sys
from pathlib import Path

KEPT = re.compile(
    r"all-reduce|all-gather|reduce-scatter|collective-|all-to-all|windowed_dot"
    r"| while\(| conditional\(| call\("
    r"|[su]32\[\]\S* constant\(|\b(copy|copy-start|transpose)\("
)


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    lines = []
    for line in source.read_text().splitlines():
        if line.startswith("HloModule"):
            lines.append(line.split(", entry_computation_layout")[0])
        elif not line.startswith("  ") or KEPT.search(line):
            trips = re.search(r'"known_trip_count":\{"n":"\d+"\}', line)
            line = re.sub(r", backend_config=.*", f", backend_config={{{trips[0]}}}" if trips else "", line)
            lines.append(re.sub(r'^(\d+ ")/(?:.*(?=/tpjax/)|.*/)', r"\1", line))  # no one's own paths
    text = "\n".join(lines) + "\n"
    # computations that nothing kept is in
    while True:
        shorter = re.sub(r"^%?([\w.\-]+) \(.*\{\n\}\n", "", text, flags=re.MULTILINE)
        if shorter == text:
            break
        text = shorter
    target.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
