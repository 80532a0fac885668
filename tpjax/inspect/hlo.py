"""Parses the text of an optimised HLO module: instructions, how often each runs, what it reads and writes."""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

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
_INSTRUCTION = re.compile(
    r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)"
)
_OPERAND = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLS = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_BOUND = re.compile(r" [su]32\[\]\S* constant\((\d+)\)")
# opcodes that pass buffers on and move nothing
_VIEWS = ("bitcast", "reshape", "get-tuple-element", "optimization-barrier")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")
_UPDATE_OPERAND = {"dynamic-update-slice": 1, "scatter": 2}


@dataclass(frozen=True)
class Array:
    """One array of the result of an instruction.

    Attributes:
        dtype: name of its dtype in HLO.
        dims: dimensions on one device.
        order: dimensions from the fastest running to the slowest.
        tile: tile in which a TPU lays out the fastest dimensions; empty if there is none.
        space: memory space; 0 is main memory.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def elements(self) -> int:
        """Number of elements, without padding."""
        return math.prod(self.dims)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Dimensions above 1, sorted: equal for an array and its transpose."""
        return tuple(sorted(size for size in self.dims if size > 1))

    @property
    def bytes(self) -> int:
        """Bytes in memory, with padding to full tiles."""
        order = self.order or tuple(reversed(range(len(self.dims))))
        sizes = [self.dims[dim] for dim in order] or [1]
        for place, block in enumerate(reversed(self.tile)):
            if place < len(sizes):
                sizes[place] = -(-sizes[place] // block) * block
        return math.prod(sizes) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: name of its result.
        type: type of its result, as printed.
        opcode: its operation.
        arguments: the text in its parentheses.
        root: whether its result is the result of its computation.
        line: the full line.
    """

    name: str
    type: str
    opcode: str
    arguments: str
    root: bool
    line: str

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return _OPERAND.findall(self.arguments)

    @functools.cached_property
    def arrays(self) -> list[Array]:
        """Arrays of its result."""
        return read_arrays(self.type)

    @functools.cached_property
    def callees(self) -> list[str]:
        """Names of the computations that it calls, branches excepted."""
        return _CALLS.findall(self.line)


@dataclass(frozen=True)
class Executed:
    """An instruction, and how it is run.

    Attributes:
        computation: name of the computation that holds it.
        instruction: the instruction.
        times: number of times it runs in one call of the program.
        conditional: whether it is in a branch.
        fused: whether it is part of a fusion.
        page_loop: whether it is in a loop over pages of the cache.
    """

    computation: str
    instruction: Instruction
    times: int
    conditional: bool
    fused: bool
    page_loop: bool


class Module:
    """A parsed module.

    Args:
        text: text of an optimised module, as returned by ``Compiled.as_text()``.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = current = ""
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = match[2]
                self.computations[current] = {}
                self.entry = current if match[1] else self.entry
            elif line.startswith("}"):
                current = ""
            elif current and (match := _INSTRUCTION.match(line)):
                root, name, kind, opcode, arguments = match.groups()
                self.computations[current][name] = Instruction(
                    name, kind, opcode, arguments, bool(root), line
                )

    def executed(
        self, pages: Sequence[int] = (), caches: Collection[tuple[int, ...]] = ()
    ) -> Iterator[Executed]:
        """Yields what a call of the program runs, in order; the body of a loop once, its trips in ``times``.

        Args:
            pages: trips of the loop over the cache in each layer; further loops of unknown length run once.
            caches: dimensions of the cache buffers, in the form of :attr:`Array.sizes`: loops over the cache
                carry them.
        """
        layers = iter(pages)

        def run(name: str, times: int, conditional: bool, fused: bool, page_loop: bool) -> Iterator[Executed]:
            for one in self.computations.get(name, {}).values():
                yield Executed(name, one, times, conditional, fused, page_loop)
                if one.opcode in ("async-done", "async-update"):
                    continue  # may name the computation that its start ran
                trips, part, paged = 1, fused or one.opcode == "fusion", page_loop
                if one.opcode == "while" and (known := self._trips(one)):
                    trips = known
                elif one.opcode == "while" and any(array.sizes in caches for array in one.arrays):
                    trips, paged = next(layers, 1), True
                for callee in one.callees:
                    yield from run(callee, times * trips, conditional, part, paged)
                for several, single in _BRANCHES.findall(one.line):
                    for callee in (several or single).split(","):
                        yield from run(callee.strip().lstrip("%"), times, True, part, paged)

        yield from run(self.entry, 1, False, False, False)

    def users(self, computation: str, name: str) -> list[tuple[Instruction, int]]:
        """Lists the instructions that read a result, each with the index of the operand."""
        return self._users.get(computation, {}).get(name, [])

    def sliced(self, reader: Instruction, place: int) -> Array | None:
        """Returns the part of operand ``place`` that an instruction reads; ``None`` if all or several."""
        if reader.opcode in _SLICES:
            return reader.arrays[0] if place == 0 else None
        if reader.opcode != "fusion":
            return None
        name = reader.callees[0]
        readers = self.users(name, self._parameters.get(name, {}).get(place, ""))
        while len(readers) == 1 and readers[0][0].opcode in _VIEWS:
            readers = self.users(name, readers[0][0].name)
        return self.sliced(*readers[0]) if len(readers) == 1 else None

    def depends(self, computation: str, instruction: Instruction, opcode: str, but: str) -> bool:
        """Whether an instruction depends on one with that opcode, by a path other than through ``but``."""
        body, seen, ahead = self.computations[computation], {but}, list(instruction.operands)
        while ahead:
            name = ahead.pop()
            if name in seen or name not in body:
                continue
            if body[name].opcode == opcode:
                return True
            seen.add(name)
            ahead += body[name].operands
        return False

    def read(self, computation: str, name: str, instruction: Instruction) -> int:
        """Returns the bytes of an operand that an instruction reads: only the slices, if it slices it."""
        operand = self.computations[computation][name]
        full = sum(array.bytes for array in operand.arrays)
        places = [place for place, one in enumerate(instruction.operands) if one == name]
        return min(full, sum(self._read(instruction, place, full) for place in places))

    def written(self, instruction: Instruction) -> list[tuple[Array, int]]:
        """Lists the arrays of a result with the bytes written: only the update, if updated in place."""
        # the result of copy-start includes its source; other starts are counted at their end
        starts = {"copy-start": 1, "slice-start": 0}
        arrays = instruction.arrays[: starts.get(instruction.opcode)]
        return [(array, self._written(instruction, index, array.bytes)) for index, array in enumerate(arrays)]

    def _trips(self, loop: Instruction) -> int | None:
        if match := _TRIPS.search(loop.line):
            return int(match[1])
        match = _CONDITION.search(loop.line)
        # loops count from 0 in steps of 1 to a constant, or to a bound known at run time only
        body = self.computations.get(match[1] if match else "", {})
        bounds = [int(bound) for one in body.values() for bound in _BOUND.findall(one.line)]
        return max(bounds, default=None)

    def _read(self, instruction: Instruction, place: int, full: int) -> int:
        opcode = instruction.opcode
        if opcode in _SLICES:
            return sum(array.bytes for array in instruction.arrays) if place == 0 else full
        if opcode in _UPDATES:
            return 0 if place == 0 else full
        if opcode != "fusion":
            return full
        name = instruction.callees[0]
        parameter = self._parameters.get(name, {}).get(place)
        return full if parameter is None else self._read_inside(name, parameter, full)

    def _read_inside(self, computation: str, name: str, full: int) -> int:
        if self.computations[computation][name].root:
            return full
        return sum(
            self._read_inside(computation, user.name, full)
            if user.opcode in _VIEWS
            else self._read(user, place, full)
            for user, place in self.users(computation, name)
        )

    def _written(self, instruction: Instruction, index: int, full: int) -> int:
        if instruction.opcode != "fusion":
            return full if instruction.opcode not in _UPDATES else min(full, self._update(instruction, ""))
        name = instruction.callees[0]
        body = self.computations.get(name, {})
        result = next((one for one in body.values() if one.root), None)
        while result is not None and result.opcode == "tuple":
            result, index = _part(body, result, index)
        while result is not None and result.opcode in _VIEWS and result.operands:
            result = body.get(result.operands[0])
        if result is None:
            return full
        if result.opcode in _UPDATES:
            return min(full, self._update(result, name))
        return self._written(result, 0, full) if result.opcode == "fusion" else full

    def _update(self, update: Instruction, computation: str) -> int:
        computation = computation or next(
            name for name, body in self.computations.items() if body.get(update.name) is update
        )
        source = update.operands[_UPDATE_OPERAND[update.opcode]]
        return sum(array.bytes for array in self.computations[computation][source].arrays)

    @functools.cached_property
    def _users(self) -> dict[str, dict[str, list[tuple[Instruction, int]]]]:
        found: dict[str, dict[str, list[tuple[Instruction, int]]]] = {}
        for computation, body in self.computations.items():
            users = found[computation] = defaultdict(list)
            for one in body.values():
                for place, operand in enumerate(one.operands):
                    users[operand].append((one, place))
        return found

    @functools.cached_property
    def _parameters(self) -> dict[str, dict[int, str]]:
        return {
            name: {int(one.arguments): one.name for one in body.values() if one.opcode == "parameter"}
            for name, body in self.computations.items()
        }


def read_arrays(text: str) -> list[Array]:
    """Reads the arrays in the text of a type; tokens and the like are left out."""
    found = []
    for dtype, dims, order, layout in _ARRAY.findall(text):
        if dtype in DTYPE_BITS:
            tile, space = _TILE.search(layout), _SPACE.search(layout)
            found.append(
                Array(
                    dtype,
                    _numbers(dims),
                    _numbers(order),
                    _numbers(tile[1]) if tile else (),
                    int(space[1]) if space else 0,
                )
            )
    return found


def tpu_array(dtype: str, dims: tuple[int, ...], *, fixed: bool = False) -> Array:
    """Predicts how a TPU lays out an argument: in tiles of 8×128.

    The last two dimensions are transposed if that takes less padding, unless their order is ``fixed``. Few
    rows take a lower tile; vectors have tiles of 1024.
    """
    packed = max(1, 32 // DTYPE_BITS[dtype])
    order = tuple(reversed(range(len(dims))))
    if len(dims) < 2:
        blocks = -(-dims[0] // (128 * packed)) if dims else 1
        return Array(dtype, dims, order, (min(1024, 128 * packed * _power(blocks)),))
    transposed = (order[1], order[0], *order[2:])
    layouts = [
        Array(dtype, dims, layout, (min(8, _power(rows)), 128))
        for rows, layout in ((dims[-2], order), (dims[-1], transposed))
    ]
    return layouts[0] if fixed else min(layouts, key=lambda array: array.bytes)


def _part(body: Mapping[str, Instruction], result: Instruction, index: int) -> tuple[Instruction | None, int]:
    """Returns what makes an array of a tuple, which may be one of several in a tuple, and its index there."""
    for name in result.operands:
        one = body.get(name)
        count = 1 if one is None else len(one.arrays)
        if index < count:
            return one, index
        index -= count
    return None, 0


def _power(number: int) -> int:
    """Returns the smallest power of two that is not less than ``number``."""
    return 1 << (number - 1).bit_length()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
