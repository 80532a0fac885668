"""Estimates the time of a TPU program from the cycles that its compiler predicts.

    time = max(cycles / clock, memory traffic / bandwidth) + attention kernels + exposed collectives

The compiler annotates fusions with estimated cycles (about 1,800 on the smallest), but neither collectives
nor the copies that prefetch most weights, and the body of a loop once. Memory traffic is what those copies
move and what everything else reads and writes in main memory. A kernel has no cycles: its time is the longer
of the bytes that its grid moves from and to main memory over an assumed share of the bandwidth, and of its
products over an assumed share of the peak rate. A collective is exposed for as long as it has nothing to run
beside: the instructions scheduled between its start and its end take their cycles. Nothing here was measured
on a chip.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tpjax.attention.tpu import KERNEL_NAME, Work
from tpjax.attention.tpu_write import KERNEL_NAME as WRITER_NAME
from tpjax.config import ExpertAxis, ModelConfig
from tpjax.hardware import Efficiency, Hardware
from tpjax.inspect.collectives import ASYNC_DONE, Collective, placed_collectives
from tpjax.inspect.hlo import Executed, Instruction, Module
from tpjax.inspect.topology import Topology
from tpjax.interconnect import Interconnect
from tpjax.layers import quantized_tpu
from tpjax.runtime.counts import Counts
from tpjax.step_time import Cost, Itemsizes, StepTime, StepTokens

# Multiply-adds of a chip in one cycle: its matrix units, 128 or 256 square (How to Scale Your Model, chapter
# 2, and Google Cloud's pages). Half the peak rate over these is the clock: 1.50 GHz on a v5e, 1.75 on a v6e.
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


class Shares(NamedTuple):
    """What kernels are assumed to reach, as shares of bandwidth and peak rate."""

    bandwidth: float
    flops: float


KERNEL_SHARES, LOW_KERNEL_SHARES = Shares(0.8, 0.5), Shares(0.6, 0.3)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**62  # and above: what the compiler writes if it has no estimate
_CHAIN, _ASYNC_START = re.compile(r'chain_id="\d+"'), "AsyncCollectiveStart"
_GROUPED = "ragged-dot"  # a grouped product, which XLA has as a kernel of its own
_DONE = ("slice-done", "copy-done")
# no memory traffic: bookkeeping, starts whose end is counted, and collectives, which are timed separately
_FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|reshape|optimization-barrier|after-all|iota|partition-id"
    r"|replica-id|while|conditional|call|.*-start|(all|collective|reduce-scatter|async)(-.*)?"
)


@dataclass(frozen=True)
class Estimate:
    """Time of one call by cause, in seconds; branches that only some requests need are left out.

    Attributes:
        context: tokens in the cache of each sequence.
        compute_s: estimated cycles over the clock.
        pages_s: the part of ``compute_s`` in loops over pages of the cache.
        traffic_bytes: bytes read and written in main memory, but for kernels.
        traffic_s: those over the bandwidth.
        collectives_s: collectives, by the interconnect model of ``plan``.
        exposed_s: the part of ``collectives_s`` that nothing runs beside.
        total_s: the longer of compute and memory traffic, plus kernels and exposed collectives.
        memory_bound_s: reading weights and cache once.
        compute_bound_s: products at the peak rate.
        bound_s: the longer of both bounds, summed over blocks: no program is faster.
        kernels: number of kernel calls without cycles.
        kernel_bytes: bytes that kernels read and write in main memory.
        kernels_s: time of kernels if they reach ``KERNEL_SHARES``: assumed.
        low_kernels_s: that if they reach ``LOW_KERNEL_SHARES`` only.
    """

    context: int
    compute_s: float
    pages_s: float
    traffic_bytes: int
    traffic_s: float
    collectives_s: float
    exposed_s: float
    total_s: float
    memory_bound_s: float
    compute_bound_s: float
    bound_s: float
    kernels: int
    kernel_bytes: int = 0
    kernels_s: float = 0.0
    low_kernels_s: float = 0.0

    @property
    def low_total_s(self) -> float:
        """The time if kernels reach ``LOW_KERNEL_SHARES`` only."""
        return self.total_s + self.low_kernels_s - self.kernels_s


def estimate(
    module: Module,
    config: ModelConfig,
    topology: Topology,
    *,
    tp: int,
    batch: int,
    length: int,
    context: int,
    page_size: int,
    caches: Collection[tuple[int, ...]],
    itemsizes: Itemsizes,
    pages_at_once: int = 1,
    kernel_work: Sequence[Work] = (),
    samples: bool = True,
) -> Estimate:
    """Estimates one call of a TPU program.

    Args:
        module: the program.
        config: the architecture.
        topology: the chips.
        tp: number of devices.
        batch: number of sequences.
        length: tokens of each sequence in one call.
        context: tokens in the cache of each sequence before a chunk, or up to the token that is decoded.
        page_size: tokens of a page.
        caches: dimensions of the cache buffers, in the form of :attr:`Array.sizes`.
        itemsizes: bytes of an element of weights, activations and cache.
        pages_at_once: pages of a sequence that one trip of a loop over the cache reads.
        kernel_work: what its attention kernels do, call by call, which its text does not show.
        samples: whether the program samples, or is of a pipeline's stage before the last.
    """
    chip, device = topology.hardware, topology.hardware.device
    bandwidth = device.bandwidth_bytes_s
    clock = clock_hz(chip)
    pages = [
        -(-_pages(context, config.attention.window_of(kind), page_size) // pages_at_once)
        for kind in config.attention.layer_types
    ]

    def step_time(rate: float) -> StepTime:
        perfect = replace(device, bandwidth_bytes_s=rate, efficiency=_IDEAL)
        expert_axis: ExpertAxis = config.moe.sharded_axis(tp) if config.moe else "width"
        return StepTime(Counts("", config).share(tp, expert_axis), perfect, itemsizes)

    experts_read = step_time(bandwidth).experts_read(batch * length)
    cycles, page_cycles, traffic, kernels = counted(module, pages, caches, experts_read)
    products = [
        _product(module, one)
        for one in module.executed(pages, caches)
        if not one.conditional and _is_product(one.instruction)
        for _ in range(one.times)
    ]
    clocks = _follow(module, chip.interconnect, tp, clock)
    compute_s, traffic_s = cycles / clock, traffic / bandwidth
    calls = [
        (call.bytes - min(call.activations, on_chip), call.flops, 0)
        for call, on_chip in zip(kernel_work, _on_chip(module, len(kernel_work)), strict=True)
    ]
    calls += products
    kernels_s, low_kernels_s = (
        sum(
            max(moved / (share.bandwidth * bandwidth), flops / (share.flops * device.flops), least / clock)
            for moved, flops, least in calls
        )
        for share in (KERNEL_SHARES, LOW_KERNEL_SHARES)
    )

    def ideal(rate: float) -> Cost:
        model = step_time(rate)
        tokens = StepTokens(batch, context) if length == 1 else StepTokens(chunks=((0, length),))
        return model.step(tokens) if samples else model.layers(tokens)

    best = ideal(bandwidth)
    return Estimate(
        context=context,
        compute_s=compute_s,
        pages_s=page_cycles / clock,
        traffic_bytes=traffic,
        traffic_s=traffic_s,
        collectives_s=clocks.moved,
        exposed_s=clocks.exposed,
        total_s=max(compute_s, traffic_s) + kernels_s + clocks.exposed,
        memory_bound_s=best.weights + best.cache,
        compute_bound_s=ideal(math.inf).compute,
        bound_s=best.weights + best.cache + best.compute,
        kernels=kernels,
        kernel_bytes=sum(moved for moved, _, _ in calls),
        kernels_s=kernels_s,
        low_kernels_s=low_kernels_s,
    )


class Counted(NamedTuple):
    """What the compiler expects of one call of a program, but for what it does not say.

    Attributes:
        cycles: estimated cycles.
        page_cycles: those in loops over pages of the cache.
        traffic: bytes read and written in main memory, but for attention kernels.
        kernels: number of kernel calls without cycles.
    """

    cycles: int
    page_cycles: int
    traffic: int
    kernels: int


def counted(
    module: Module,
    pages: Sequence[int] = (),
    caches: Collection[tuple[int, ...]] = (),
    experts_read: float = math.inf,
) -> Counted:
    """Adds up cycles and memory traffic of one call of a TPU program.

    Args:
        module: the program.
        pages: trips of the loop over the cache in each layer.
        caches: dimensions of the cache buffers, in the form of :attr:`Array.sizes`.
        experts_read: experts of a stack that a grouped product reads.
    """
    cycles, page_cycles, traffic, kernels = 0, 0, 0, 0
    for one in module.executed(pages, caches):
        if one.conditional or one.fused:
            continue
        one_cycles = _cycles(one.instruction)
        if one_cycles is not None:
            cycles += one_cycles * one.times
            page_cycles += one_cycles * one.times * one.page_loop
        elif _CYCLES.search(one.instruction.line) or "tpu_custom_call" in one.instruction.line:
            kernels += one.times
        traffic += _traffic(module, one, experts_read) * one.times
    return Counted(cycles, page_cycles, traffic, kernels)


def clock_hz(chip: Hardware) -> float:
    """Returns the clock of a TPU, from its peak rate and its matrix units."""
    return chip.flops / (2 * _MACS_A_CYCLE[chip.name])


def _cycles(instruction: Instruction) -> int | None:
    """Returns the cycles that the compiler expects an instruction to take; ``None``: it does not say."""
    match = _CYCLES.search(instruction.line)
    return int(match[1]) if match and int(match[1]) < _NO_ESTIMATE else None


@dataclass
class _Clocks:
    """Follows a schedule: when computation is, and when the links, which carry one collective at a time.

    Attributes:
        now: seconds that computation took so far, waiting included.
        links_free: when the links have carried what was started.
        moved: seconds of all collectives.
        exposed: seconds that computation waited for them.
    """

    now: float = 0.0
    links_free: float = 0.0
    moved: float = 0.0
    exposed: float = 0.0

    def send(self, seconds: float, times: int) -> float:
        """Starts a collective; returns when it ends."""
        self.moved += seconds * times
        self.links_free = max(self.links_free, self.now) + seconds
        return self.links_free

    def wait(self, until: float, times: int) -> None:
        """Lets computation wait."""
        pause = max(0.0, until - self.now)
        self.now += pause
        self.exposed += pause * times


def _follow(module: Module, links: Interconnect, tp: int, clock: float) -> _Clocks:
    """Returns the clocks at the end of a program."""
    placed = {(one.computation, one.instruction.name): found for one, found in placed_collectives(module)}
    clocks, ends = _Clocks(), dict[str, float]()
    for one in module.executed():
        if one.conditional:
            continue
        if not one.fused:
            clocks.now += (_cycles(one.instruction) or 0) / clock
        starts, ended = _asynchronous(module, one)
        if ended in ends:
            clocks.wait(ends[ended], one.times)
        found = placed.get((one.computation, one.instruction.name))
        if found is None:
            continue
        end = clocks.send(_seconds(replace(found, count=1), links, tp), one.times)
        if starts:
            ends[starts] = end
        else:
            clocks.wait(end, one.times)
    return clocks


def _asynchronous(module: Module, one: Executed) -> tuple[str, str]:
    """Returns the name of the collective that an instruction starts, and of that which it ends, or ``""``."""
    instruction = one.instruction
    if not one.fused:
        starts = instruction.name if instruction.opcode.endswith("-start") else ""
        return starts, instruction.operands[0] if instruction.opcode.endswith("-done") else ""
    chain = _CHAIN.search(instruction.line)
    if chain is None:
        return "", ""
    lines = [inner.line for inner in module.computations[one.computation].values()]
    starts, ended = (chain[0] * any(mark in line for line in lines) for mark in (_ASYNC_START, ASYNC_DONE))
    return starts, ended


def _pages(context: int, window: int | None, page_size: int) -> int:
    """Returns the number of pages that attention in a layer reads."""
    first = 0 if window is None else max(context - window, 0) // page_size
    return -(-context // page_size) - first


def _traffic(module: Module, one: Executed, experts_read: float) -> int:
    """Returns the bytes that an instruction reads and writes in main memory each time it runs.

    Of a grouped product's stack of experts it reads ``experts_read``: its grid has no others.
    """
    instruction, body = one.instruction, module.computations[one.computation]
    if instruction.opcode in _DONE:
        start = body[instruction.operands[0]].arrays
        # copy-start returns the target, then the source; slice-start the source, then the slice
        size = start[0 if instruction.opcode == "copy-done" else 1].bytes
        return size * sum(array.space == 0 for array in start[:2])
    if _FREE.fullmatch(instruction.opcode):
        return 0
    if "tpu_custom_call" in instruction.line and KERNEL_NAME in instruction.line:
        return 0  # its operand is the whole cache; what it reads is counted by itself
    if _is_product(instruction):
        return 0  # counted by itself too: it reads activations once for each tile of outputs
    if "tpu_custom_call" in instruction.line and WRITER_NAME in instruction.line:
        content = body[instruction.operands[-1]].arrays[0]
        return content.bytes * (1 if content.space else 2)
    total = sum(size for array, size in module.written(instruction) if array.space == 0)
    for name in dict.fromkeys(instruction.operands):
        operand = body.get(name)
        if operand is not None and [array.space for array in operand.arrays] == [0]:
            read = module.read(one.computation, name, instruction)
            stack = operand.arrays[0].dims if instruction.name.startswith(_GROUPED) else ()
            total += int(read * min(1.0, experts_read / stack[0])) if len(stack) == 3 else read
    return total


def _on_chip(module: Module, calls: int) -> list[int]:
    """Returns the bytes of queries and outputs of each attention kernel that are not in main memory.

    They have the same first dimensions: sequences, KV heads, rows. Where the kernels are not as many as
    ``calls``, nothing is known of them.
    """
    found = []
    for one in module.executed():
        if one.conditional or "tpu_custom_call" not in one.instruction.line:
            continue
        if KERNEL_NAME in one.instruction.line:
            output, body = one.instruction.arrays[0], module.computations[one.computation]
            arrays = [output, *(array for name in one.instruction.operands for array in body[name].arrays)]
            found.append(sum(x.bytes for x in arrays if x.space and x.dims[:3] == output.dims[:3]))
    return found if len(found) == calls else [0] * calls


def _is_product(instruction: Instruction) -> bool:
    """Returns whether an instruction is the kernel of quantised products."""
    return "tpu_custom_call" in instruction.line and quantized_tpu.KERNEL_NAME in instruction.line


def _product(module: Module, one: Executed) -> quantized_tpu.ProductWork:
    """Returns what a product with a quantised weight does."""
    body = module.computations[one.computation]
    _, x, values, *per_group = (body[name].arrays[0] for name in one.instruction.operands)
    tokens, inputs = x.dims
    stack, groups = values.dims[0], math.prod(per_group[0].dims[1:3])
    weight_bytes = sum(array.bytes for array in (values, *per_group)) // stack
    bits = 16 if values.dtype.startswith("f8") else 8 * values.bytes // math.prod(values.dims)
    return quantized_tpu.work((tokens, inputs), values.dims[2], weight_bytes, groups, bits)


def _seconds(one: Collective, links: Interconnect, tp: int) -> float:
    """Returns the time of a collective. All but an all-reduce count as half of one (the book, chapter 3)."""
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
