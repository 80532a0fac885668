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

_PACKAGE = "tpjax"
DTYPE_BITS = {
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
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_SCATTER = re.compile(r" = (.+?) (fusion)\(.*calls=%?(all-reduce-scatter[\w.\-]*)")
_WINDOWED = re.compile(r"condition=%?([\w.\-]+), body=%?[\w.\-]*windowed_dot_general_body")
_BOUND = re.compile(r" [su]32\[\]\S* constant\((\d+)\)")


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
        source: the line that asked for it, such as ``model.py:60``: the model's, or else the innermost of
            this package; empty where the program does not say.
    """

    kind: str
    shapes: str
    bytes: int
    group_size: int
    count: int
    conditional: bool
    op_name: str
    source: str = ""


def find_collectives(hlo: str) -> list[Collective]:
    """Lists the collectives reachable from the entry computation.

    Args:
        hlo: text of an optimised module, as ``Compiled.as_text()`` gives it.
    """
    bodies, entry = _computations(hlo)
    sources = source_lines(hlo)
    found: list[Collective] = []

    def walk(name: str, times: int, conditional: bool) -> None:
        for line in bodies.get(name, ()):
            if match := _COLLECTIVE.search(line):
                one = _parse(line, match, match[2], times, conditional)
                found.append(replace(one, source=_source(line, sources)))
                continue  # to_apply of a reduction holds no collective
            if match := _SCATTER.search(line):
                # a TPU's reduce-scatter: a fusion of an all-reduce and the slice that a device keeps of it
                one = _parse(line, match, "reduce-scatter", times, conditional)
                size = max((_group_size(inner) for inner in bodies.get(match[3], ())), default=0)
                found.append(replace(one, group_size=size, source=_source(line, sources)))
                continue
            if " async-done(" in line or " async-update(" in line:
                continue  # may name the computation that its start has run
            trips = int(match[1]) if (match := _TRIPS.search(line)) else _windows(line, bodies)
            for callee in _CALLS.findall(line):
                walk(callee, times * trips, conditional)
            for several, one in _BRANCHES.findall(line):
                for callee in (several or one).split(","):
                    walk(callee.strip().lstrip("%"), times, True)

    walk(entry, 1, False)
    return found


def summarise(collectives: Iterable[Collective]) -> list[Collective]:
    """Merges collectives that one line asked for, alike but for their operation; the largest total first."""
    merged: dict[Collective, int] = defaultdict(int)
    for one in collectives:
        merged[replace(one, count=1, op_name="")] += one.count
    rows = [replace(one, count=count) for one, count in merged.items()]
    return sorted(rows, key=lambda one: (one.conditional, -one.count * one.bytes))


def source_lines(hlo: str) -> dict[int, str]:
    """The line each stack frame of a module stands for, as :attr:`Collective.source` gives it.

    A module lists file names, locations and frames by number; a frame names its location and, one too high,
    its caller's frame.
    """
    files = {int(n): name for n, name in re.findall(r'^(\d+) "([^"]+\.py)"$', hlo, re.MULTILINE)}
    locations = {
        int(n): (files.get(int(file), ""), line)
        for n, file, line in re.findall(r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", hlo, re.MULTILINE)
    }
    frames = {
        int(n): (int(location), int(parent or 1) - 1)
        for n, location, parent in re.findall(
            r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", hlo, re.MULTILINE
        )
    }

    def line_of(frame: int) -> str:
        innermost = ""
        while frame in frames:
            location, frame = frames[frame]
            file, line = locations.get(location, ("", ""))
            if f"/{_PACKAGE}/" not in file:
                continue
            name = f"{file.rsplit(f'/{_PACKAGE}/', 1)[1]}:{line}"
            if name.startswith("model.py:"):
                return name
            innermost = innermost or name
        return innermost

    return {frame: line_of(frame) for frame in frames}


def _source(line: str, sources: dict[int, str]) -> str:
    match = _FRAME.search(line)
    return sources.get(int(match[1]), "") if match else ""


def _windows(line: str, bodies: dict[str, list[str]]) -> int:
    """Trips of a windowed product's loop, whose condition compares with a constant; other loops: 1."""
    match = _WINDOWED.search(line)
    bounds = [
        int(bound) for inner in bodies.get(match[1] if match else "", ()) for bound in _BOUND.findall(inner)
    ]
    return max(bounds, default=1)


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


def _parse(line: str, match: re.Match[str], kind: str, times: int, conditional: bool) -> Collective:
    shapes = [(dtype, dims) for dtype, dims in _SHAPE.findall(match[1]) if dtype in DTYPE_BITS]
    if match[3] == "-start" and kind != "all-reduce":
        # an asynchronous start gives (operands, results) and, on some backends, counters
        shapes = [(dtype, dims) for dtype, dims in shapes if (dtype, dims) != ("u32", "")]
        shapes = shapes[len(shapes) // 2 :]
    size = sum(
        math.prod(int(n) for n in dims.split(",") if n) * DTYPE_BITS[dtype] // 8 for dtype, dims in shapes
    )
    name = _OP_NAME.search(line)
    return Collective(
        kind=kind,
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
