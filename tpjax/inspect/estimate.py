"""How long a TPU program takes, estimated from what its compiler says of it.

    time = max(cycles / clock, traffic / bandwidth) + collectives

The compiler writes estimated cycles on its fusions (about 1,800 on the smallest), but not on the copies that
fetch most weights ahead, nor on collectives, and on a loop's body once. Traffic is what those copies move and
what all else reads and writes in main memory. Nothing here was measured on a chip.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from tpjax.config import ExpertAxis, ModelConfig
from tpjax.hardware import Efficiency
from tpjax.inspect.collectives import Collective
from tpjax.inspect.hlo import Executed, Module
from tpjax.inspect.topology import Topology
from tpjax.interconnect import Interconnect
from tpjax.planning.cost_model import Cost, CostModel
from tpjax.planning.counts import Counts
from tpjax.planning.workload import Workload

# Multiply-adds a chip does in a cycle: its matrix units, 128 or 256 square (How to Scale Your Model, chapter
# 2, and Google Cloud's pages). Half the peak rate over these is the clock: 1.50 GHz of a v5e, 1.75 of a v6e.
_MACS_A_CYCLE = {
    "v4": 8 * 128**2,
    "v5e": 4 * 128**2,
    "v5p": 8 * 128**2,
    "v6e": 4 * 256**2,
    "tpu7x": 8 * 256**2,
}
_IDEAL = Efficiency(
    weights=1.0,
    low_precision_weights=1.0,
    cache=1.0,
    compute=1.0,
    low_precision_compute=1.0,
    layer_us=0.0,
    expert_us=0.0,
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**62  # and more: the compiler's largest number, where it has none
_DONE = ("slice-done", "copy-done")
# no traffic of their own: names and bookkeeping, starts whose end is counted, and collectives, timed apart
_FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|reshape|optimization-barrier|after-all|iota|partition-id"
    r"|replica-id|while|conditional|call|.*-start|(all|collective|reduce-scatter|async)(-.*)?"
)


@dataclass(frozen=True)
class Estimate:
    """Where the time of one call goes, seconds; what only some requests ask for is left out.

    Attributes:
        context: tokens in the cache of each sequence.
        compute_s: estimated cycles over the clock.
        pages_s: of those, in loops over pages of the cache.
        traffic_bytes: read and written in main memory.
        traffic_s: those over the bandwidth.
        collectives_s: by the model of the links that ``plan`` has.
        total_s: the longer of compute and traffic, and the collectives.
        memory_bound_s: weights and cache, read once.
        compute_bound_s: products at the peak rate.
        bound_s: block by block the longer of the two: no program is faster.
        kernels: calls of kernels for which there are no cycles.
    """

    context: int
    compute_s: float
    pages_s: float
    traffic_bytes: int
    traffic_s: float
    collectives_s: float
    total_s: float
    memory_bound_s: float
    compute_bound_s: float
    bound_s: float
    kernels: int


def estimate(
    module: Module,
    collectives: Iterable[Collective],
    config: ModelConfig,
    topology: Topology,
    *,
    tp: int,
    dtype: str,
    batch: int,
    length: int,
    context: int,
    page_size: int,
    caches: Collection[tuple[int, ...]],
) -> Estimate:
    """Estimates one call of a TPU program.

    Args:
        module: the program.
        collectives: of it.
        config: of the model.
        topology: its chips.
        tp: devices.
        dtype: of weights and cache.
        batch: sequences.
        length: tokens of each in one call.
        context: tokens in the cache of each sequence before a chunk, or up to the token that is decoded.
        page_size: tokens of a page.
        caches: dimensions of the cache's buffers, as :attr:`Array.sizes` gives them.
    """
    chip = topology.hardware
    share = topology.devices_per_chip
    bandwidth = chip.bandwidth_bytes_s / share
    clock = chip.flops / (2 * _MACS_A_CYCLE[chip.name])
    pages = [_pages(context, config.window_of(kind), page_size) for kind in config.layer_types]
    cycles, walked, traffic, kernels = 0, 0, 0, 0
    for one in module.executed(pages, caches):
        if one.conditional or one.fused:
            continue
        match = _CYCLES.search(one.instruction.line)
        if match and int(match[1]) < _NO_ESTIMATE:
            cycles += int(match[1]) * one.times
            walked += int(match[1]) * one.times * one.walking
        elif match or "tpu_custom_call" in one.instruction.line:
            kernels += one.times
        traffic += _traffic(module, one) * one.times
    moved = sum(_seconds(one, chip.interconnect, tp) for one in collectives if not one.conditional)
    compute_s, traffic_s = cycles / clock, traffic / bandwidth

    def ideal(rate: float) -> Cost:
        perfect = replace(chip, bandwidth_bytes_s=rate, flops=chip.flops / share, efficiency=_IDEAL)
        kind = Workload(dtype="float32" if dtype == "float32" else "bf16")
        expert_axis: ExpertAxis = config.moe.sharded_axis(tp) if config.moe else "width"
        model = CostModel(Counts("", config), perfect, tp, kind, expert_axis)
        return model.decode(batch, context) if length == 1 else model.prefill(length)

    best = ideal(bandwidth)
    return Estimate(
        context=context,
        compute_s=compute_s,
        pages_s=walked / clock,
        traffic_bytes=traffic,
        traffic_s=traffic_s,
        collectives_s=moved,
        total_s=max(compute_s, traffic_s) + moved,
        memory_bound_s=best.weights + best.cache,
        compute_bound_s=ideal(math.inf).compute,
        bound_s=best.weights + best.cache + best.compute,
        kernels=kernels,
    )


def _pages(context: int, window: int | None, page_size: int) -> int:
    """Pages of the cache that a layer's attention walks over."""
    first = 0 if window is None else max(context - window, 0) // page_size
    return -(-context // page_size) - first


def _traffic(module: Module, one: Executed) -> int:
    """Bytes that an instruction reads and writes in main memory, each time it runs."""
    instruction, body = one.instruction, module.computations[one.computation]
    if instruction.opcode in _DONE:
        start = body[instruction.operands[0]].arrays
        # a copy's start gives what is written, then what is read; a slice's the whole first, then the slice
        size = start[0 if instruction.opcode == "copy-done" else 1].bytes
        return size * sum(array.space == 0 for array in start[:2])
    if _FREE.fullmatch(instruction.opcode):
        return 0
    total = sum(size for array, size in module.written(instruction) if array.space == 0)
    for name in dict.fromkeys(instruction.operands):
        operand = body.get(name)
        if operand is not None and [array.space for array in operand.arrays] == [0]:
            total += module.read(one.computation, name, instruction)
    return total


def _seconds(one: Collective, links: Interconnect, tp: int) -> float:
    """A collective by the model of an all-reduce, of which the others are halves (the book, chapter 3)."""
    devices = one.group_size or tp
    match one.kind:
        case "all-reduce":
            return one.count * links.all_reduce_s(devices, one.bytes)
        case "reduce-scatter":
            return one.count * links.all_reduce_s(devices, one.bytes * devices) / 2
        case "collective-permute":
            return one.count * links.transfer_s(one.bytes)
        case _:
            return one.count * links.all_reduce_s(devices, one.bytes) / 2
