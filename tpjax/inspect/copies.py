"""Finds arrays that a compiled program copies, transposes or rewrites: of weights or cache, wasted time."""

from __future__ import annotations

from tpjax.inspect.hlo import Array, Instruction, Module

_COPIES = ("copy", "copy-start", "transpose")
_ON_CHIP = (1, 3)  # memory spaces: vector memory, and on a v4 the common memory of both cores
# pass buffers on, or start what is counted at its end
_NO_WRITES = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")


def copied_arrays(module: Module) -> list[Array]:
    """Lists the arrays that a module copies or transposes, fused or not.

    Prefetches into the on-chip memory of a TPU are left out: that is how it reads. So are copies in place, by
    which a product reads a weight of 8 bits in other tiles.
    """
    in_place = {
        callee
        for body in module.computations.values()
        for one in body.values()
        if "output_to_operand_aliasing" in one.line
        for callee in one.callees
    }
    return [
        one.arrays[0]
        for name, body in module.computations.items()
        if name not in in_place
        for one in body.values()
        if one.opcode in _COPIES and not (one.opcode == "copy-start" and _on_chip(one))
    ]


def write_backs(module: Module) -> list[Array]:
    """Lists the arrays that a module writes in full, other than by a copy. In place it writes updates."""
    return [
        array
        for one in module.executed()
        for array, size in module.written(one.instruction)
        if not one.fused
        and array.space == 0
        and size == array.bytes
        and one.instruction.opcode not in _NO_WRITES
        and not _in_place(one.instruction)
        and (one.instruction.opcode not in _COPIES or _on_chip(one.instruction))
        and not any(
            inner.opcode in _COPIES
            for callee in one.instruction.callees
            for inner in module.computations[callee].values()
        )
    ]


def _in_place(one: Instruction) -> bool:
    """Whether a kernel writes to its operand."""
    return one.opcode == "custom-call" and "output_to_operand_aliasing" in one.line


def _on_chip(copy: Instruction) -> bool:
    """Whether an asynchronous copy has the on-chip memory of a TPU at one end."""
    return copy.opcode == "copy-start" and any(array.space in _ON_CHIP for array in copy.arrays[:2])
