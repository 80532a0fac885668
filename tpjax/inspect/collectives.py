"""The collectives of a compiled program, read from its optimised HLO."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "collective-broadcast",
)

_DTYPE_BITS = {
    "pred": 8,
    "f64": 64,
    "f32": 32,
    "bf16": 16,
    "f16": 16,
    "c64": 64,
    **{f"{sign}{bits}": bits for sign in "su" for bits in (64, 32, 16, 8, 4, 2)},
    **{
        f"f8{kind}": 8
        for kind in ("e4m3", "e4m3fn", "e5m2", "e4m3b11fnuz", "e4m3fnuz", "e5m2fnuz", "e3m4", "e8m0fnu")
    },
    "f4e2m1fn": 4,
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")  # instructions are indented, headers are not
_COLLECTIVE = re.compile(rf" = (.+?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLS = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] *\{([^}]*)\})")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Collective:
    """A collective of a program.

    Attributes:
        kind: one of ``KINDS``.
        shapes: of the result on one device, such as ``f32[1,576]``.
        bytes: of that result.
        group_size: devices that take part; 0 where the program does not say (all of them).
        count: times it runs in one call; loops of unknown length count once.
        conditional: it runs only if some request asks for it (it is in a branch).
        op_name: the operation of the traced program it comes from.
    """

    kind: str
    shapes: str
    bytes: int
    group_size: int
    count: int
    conditional: bool
    op_name: str


def find_collectives(hlo: str) -> list[Collective]:
    """Lists the collectives reachable from the entry computation.

    Args:
        hlo: text of an optimised module, as ``Compiled.as_text()`` gives it.
    """
    bodies, entry = _computations(hlo)
    found: list[Collective] = []

    def walk(name: str, times: int, conditional: bool) -> None:
        for line in bodies.get(name, ()):
            if match := _COLLECTIVE.search(line):
                found.append(_parse(line, match, times, conditional))
                continue  # to_apply of a reduction holds no collective
            if " async-done(" in line or " async-update(" in line:
                continue  # may name the computation that its start has run
            trips = int(match[1]) if (match := _TRIPS.search(line)) else 1
            for callee in _CALLS.findall(line):
                walk(callee, times * trips, conditional)
            for several, one in _BRANCHES.findall(line):
                for callee in (several or one).split(","):
                    walk(callee.strip().lstrip("%"), times, True)

    walk(entry, 1, False)
    return found


def summarise(collectives: Iterable[Collective]) -> list[Collective]:
    """Merges collectives that differ in their operation only; counts add up, the largest total first."""
    merged: dict[Collective, int] = defaultdict(int)
    for one in collectives:
        merged[replace(one, count=1, op_name="")] += one.count
    rows = [replace(one, count=count) for one, count in merged.items()]
    return sorted(rows, key=lambda one: (one.conditional, -one.count * one.bytes))


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, current = "", ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            current = match[2]
            bodies[current] = []
            entry = current if match[1] else entry
        elif line.startswith("}"):
            current = ""
        elif current:
            bodies[current].append(line)
    return bodies, entry


def _parse(line: str, match: re.Match[str], times: int, conditional: bool) -> Collective:
    shapes = [(dtype, dims) for dtype, dims in _SHAPE.findall(match[1]) if dtype in _DTYPE_BITS]
    if match[3] and match[2] != "all-reduce":
        # an asynchronous start gives (operands, results) and, on some backends, counters
        shapes = [(dtype, dims) for dtype, dims in shapes if (dtype, dims) != ("u32", "")]
        shapes = shapes[len(shapes) // 2 :]
    size = sum(
        math.prod(int(n) for n in dims.split(",") if n) * _DTYPE_BITS[dtype] // 8 for dtype, dims in shapes
    )
    name = _OP_NAME.search(line)
    return Collective(
        kind=match[2],
        shapes=" ".join(f"{dtype}[{dims}]" for dtype, dims in shapes),
        bytes=size,
        group_size=_group_size(line),
        count=times,
        conditional=conditional,
        op_name=name[1] if name else "",
    )


def _group_size(line: str) -> int:
    """Devices per group, from a list of groups, an iota shape, or axes of a mesh; 0 if the line has none."""
    match = _GROUPS.search(line)
    if match is None:
        return 0
    members, iota, mesh, axes = match.groups()
    if iota:
        return int(iota)
    if mesh is not None:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", axes))
    return len([device for device in members.split(",") if device])
