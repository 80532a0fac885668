"""Reads the collectives of a compiled program from its optimised HLO."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tpjax.inspect.hlo import DTYPE_BITS, Array, Executed, Instruction, Module

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "collective-broadcast",
)

_PACKAGE = "tpjax"
_STARTS = tuple(f"{kind}-start" for kind in KINDS)
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] *\{([^}]*)\})")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_SCATTER = "all-reduce-scatter"  # prefix of the computation that a fused reduce-scatter of a TPU calls
CONTINUED, ASYNC_DONE = "async_collective_fusion", "AsyncCollectiveDone"  # of a TPU: see placed_collectives
_VIEWS = ("bitcast", "reshape", "copy", "get-tuple-element", "all-reduce-done")


@dataclass(frozen=True)
class Collective:
    """A collective of a program.

    Attributes:
        kind: one of ``KINDS``.
        shapes: shapes of the result on one device, such as ``f32[1,576]``.
        bytes: bytes of the result on one device.
        group_size: number of devices that take part; 0 if the program does not say (all of them).
        count: number of times it runs in one call; loops of unknown length count once.
        conditional: whether it is in a branch, and runs only if some request asks for it.
        op_name: the operation of the traced program that it comes from.
        source: the source line that it comes from, such as ``model.py:60``: the line in ``model.py`` if there
            is one, else the innermost line of this package; empty if the program does not say.
    """

    kind: str
    shapes: str
    bytes: int
    group_size: int
    count: int
    conditional: bool
    op_name: str
    source: str = ""


def find_collectives(hlo: str | Module) -> list[Collective]:
    """Lists the collectives reachable from the entry computation.

    A reduce-scatter is recognised in each of its forms: the operation; on a TPU a fusion of an all-reduce and
    a slice; on a CPU an all-reduce of which every reader keeps the part of its own device only.

    Args:
        hlo: an optimised module, or its text as returned by ``Compiled.as_text()``.
    """
    module = Module(hlo) if isinstance(hlo, str) else hlo
    return [collective for _, collective in placed_collectives(module)]


def placed_collectives(module: Module) -> list[tuple[Executed, Collective]]:
    """Lists collectives with the instructions that start them, or are them.

    One that runs beside products on a TPU is spread over several fusions: it counts where it starts.
    """
    sources = source_lines(module.text)
    found = []
    for one in module.executed():
        instruction = one.instruction
        kind = instruction.opcode.removesuffix("-start")
        callee = instruction.callees[0] if instruction.opcode == "fusion" and instruction.callees else ""
        if kind not in KINDS or (instruction.opcode != kind and instruction.opcode not in _STARTS):
            if not callee.startswith(_SCATTER):
                continue
            kind = "reduce-scatter"
        elif one.computation.startswith(_SCATTER):
            continue  # counted as the fusion that calls it
        elif one.fused and _continues(module, one.computation):
            continue
        arrays = _results(instruction)
        size = _group_size(instruction.line)
        if callee:
            size = max((_group_size(inner.line) for inner in module.computations[callee].values()), default=0)
        if kind == "all-reduce" and (kept := _kept_part(module, one.computation, instruction, size)):
            kind, arrays = "reduce-scatter", kept
        name = _OP_NAME.search(instruction.line)
        collective = Collective(
            kind=kind,
            shapes=" ".join(f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in arrays),
            bytes=sum(a.elements * DTYPE_BITS[a.dtype] // 8 for a in arrays),
            group_size=size,
            count=one.times,
            conditional=one.conditional,
            op_name=name[1] if name else "",
            source=_source(instruction.line, sources),
        )
        found.append((one, collective))
    return found


def _continues(module: Module, fused: str) -> bool:
    """Whether a fused computation continues or ends a collective that another one started."""
    body = module.computations[fused].values()
    return fused.startswith(CONTINUED) or any(ASYNC_DONE in one.line for one in body)


def summarise(collectives: Iterable[Collective]) -> list[Collective]:
    """Merges equal collectives of one source line, whatever their operation; largest total first."""
    merged: dict[Collective, int] = defaultdict(int)
    for one in collectives:
        merged[replace(one, count=1, op_name="")] += one.count
    rows = [replace(one, count=count) for one, count in merged.items()]
    return sorted(rows, key=lambda one: (one.conditional, -one.count * one.bytes))


def source_lines(hlo: str) -> dict[int, str]:
    """Maps each stack frame of a module to its source line, in the form of :attr:`Collective.source`.

    A module lists file names, locations and frames by number. A frame has the number of its location and, one
    too high, that of its caller's frame.
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


def _results(instruction: Instruction) -> list[Array]:
    arrays = instruction.arrays
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        # an asynchronous start returns (operands, results) and, on some backends, counters
        arrays = [array for array in arrays if (array.dtype, array.dims) != ("u32", ())]
        arrays = arrays[len(arrays) // 2 :]
    return arrays


def _kept_part(module: Module, computation: str, reduced: Instruction, devices: int) -> list[Array]:
    """Returns the part of an all-reduce that a device keeps, if every reader reads no more; else nothing."""
    full, *others = _results(reduced)
    if others:
        return []
    kept: list[Array] = []
    readers = list(module.users(computation, reduced.name))
    while readers:
        reader, place = readers.pop()
        if reader.opcode in _VIEWS:
            readers += module.users(computation, reader.name)
            continue
        part = module.sliced(reader, place)
        if part is None or part.elements * devices != full.elements:
            return []
        if not module.depends(computation, reader, "partition-id", but=reduced.name):
            return []
        kept = [part]
    return kept


def _group_size(line: str) -> int:
    """Returns the devices per group: from a list of groups, an iota shape, or mesh axes; else 0."""
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
