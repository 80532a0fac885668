"""Reports of programs compiled for chips that are not here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tpjax.inspect.collectives import Collective
from tpjax.inspect.estimate import KERNEL_SHARES, LOW_KERNEL_SHARES, Estimate
from tpjax.inspect.tables import as_html, collective_table, described_dtype
from tpjax.mesh import describe_layout
from tpjax.planning.plain_table import plain_table
from tpjax.runtime.memory import human_bytes

FAR_ABOVE = 1.5  # times the bound: an estimate above it is explained
SHARE = 0.2  # of an estimate: a part above it is named as a cause


@dataclass(frozen=True)
class ProgramReport:
    """One compiled program. Bytes are those on one device.

    Attributes:
        name: ``decode`` or ``prefill``.
        batch: number of rows.
        length: tokens of each row in one call.
        budget: collectives that the design allows it.
        compile_s: seconds the compiler took.
        predicted_bytes: weights, cache and state, computed from their shapes, tiled on a TPU.
        cache_buffers: number of buffers of the key-value cache.
        compile_error: first line of the compiler's error, if it failed to compile for want of memory; the
            attributes below then have their defaults.
        fits: whether ``needed_bytes`` is no more than the device has.
        needed_bytes: arguments, temporaries, the code, and results that do not alias an argument.
        collectives: its collectives, merged by the source line they come from.
        argument_bytes: weights, cache and requests, as the compiler lays them out.
        temporary_bytes: temporaries.
        aliased_cache_buffers: number of cache buffers that are updated in place.
        cache_copies: number of copies and transposes of a full cache buffer.
        cache_write_backs: number of other instructions that write a full cache buffer.
        weight_copies: number of relayouts (copies and transposes) of a full weight.
        weight_copy_bytes: bytes of those together.
        estimate: estimated time, on a TPU.
    """

    name: str
    batch: int
    length: int
    budget: dict[str, Any]
    compile_s: float
    predicted_bytes: int
    cache_buffers: int
    compile_error: str = ""
    fits: bool = False
    needed_bytes: int = 0
    collectives: Sequence[Collective] = ()
    argument_bytes: int = 0
    temporary_bytes: int = 0
    aliased_cache_buffers: int = 0
    cache_copies: int = 0
    cache_write_backs: int = 0
    weight_copies: int = 0
    weight_copy_bytes: int = 0
    estimate: Estimate | None = None


@dataclass(frozen=True, repr=False)
class TopologyReport:
    """The programs of a model on a topology. Rich renders it in a terminal, ``_repr_html_`` in a notebook.

    Attributes:
        model: name of the model.
        topology: name of the topology, as it was asked for.
        tp: number of devices of a mesh; of pipeline stages that of each.
        dtype: dtype of activations, and of weights and cache that are not quantised.
        quantize: what quantised weights are kept in; ``None``: none are.
        kv_dtype: what keys and values are kept in; ``auto``: ``dtype``.
        attention: what computes attention, and why.
        memory_bytes: memory of one device.
        programs: decode, then prefill; of each pipeline stage.
        dp: number of replicas, which all have these programs.
        pp: number of pipeline stages of a replica.
        layers: first layer of each stage, and one past its last; empty if there is one stage.
    """

    model: str
    topology: str
    tp: int | list[int]
    dtype: str
    attention: str
    memory_bytes: int
    programs: list[ProgramReport]
    quantize: str | None = None
    dp: int = 1
    kv_dtype: str = "auto"
    pp: int = 1
    layers: Sequence[tuple[int, int]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, ready for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<TopologyReport: {self.model} on {self.topology}>"

    def __rich__(self) -> RenderableType:
        dtype = described_dtype(self.dtype, self.quantize, self.kv_dtype)
        layout = describe_layout(self.tp, self.dp, self.pp)
        title = f"{self.model} at {layout} on {self.topology}, {dtype}, compiled ahead of time"
        return Group(
            Text(title, style="bold"),
            Text(f"attention: {self.attention}"),
            *(part for number in range(self.pp) for part in self._stage(number)),
        )

    def _stage(self, number: int) -> Iterator[RenderableType]:
        """Yields the parts about the programs of a stage; there is one unless it is a pipeline."""
        a_stage = len(self.programs) // self.pp
        programs = self.programs[number * a_stage : (number + 1) * a_stage]
        compiled = [one for one in programs if not one.compile_error]
        if self.layers:
            first, stop = self.layers[number]
            yield Text(f"\nstage {number + 1} of {self.pp}, layers {first} to {stop - 1}", style="bold")
        for one in programs:
            if not one.fits:
                yield Text(self._does_not_fit(one), style="red")
        yield self._memory(programs)
        yield from _times(compiled)
        for one in compiled:
            yield collective_table(_heading(one), one.collectives, one.budget)

    def _repr_html_(self) -> str:
        return as_html(self)

    def _does_not_fit(self, program: ProgramReport) -> str:
        needed = max(program.needed_bytes, program.predicted_bytes)
        error = f"; failed to compile: {program.compile_error}" if program.compile_error else ""
        return (
            f"{program.name} does not fit: it needs {human_bytes(needed)} on each device, of "
            f"{human_bytes(self.memory_bytes)}{error}"
        )

    def _memory(self, programs: Sequence[ProgramReport]) -> Table:
        table = plain_table(
            f"per device, of {human_bytes(self.memory_bytes)}",
            "what",
            numbers=list(map(_heading, programs)),
        )
        rows: dict[str, Callable[[ProgramReport], str]] = {
            "weights, cache and state": lambda p: human_bytes(p.argument_bytes),
            "  predicted": lambda p: f"{human_bytes(p.predicted_bytes)} ({_off(p):+.1%})",
            "temporaries": lambda p: human_bytes(p.temporary_bytes),
            "all of it": lambda p: f"{human_bytes(p.needed_bytes)}, {'fits' if p.fits else 'does not fit'}",
            "cache buffers updated in place": lambda p: f"{p.aliased_cache_buffers} of {p.cache_buffers}",
            "full-cache copies": lambda p: str(p.cache_copies),
            "full-cache write-backs": lambda p: str(p.cache_write_backs),
            "weight copies": lambda p: f"{p.weight_copies} ({human_bytes(p.weight_copy_bytes)})",
            "compiled in": lambda p: f"{p.compile_s:.1f} s",
        }
        failed: dict[str, Callable[[ProgramReport], str]] = {
            "  predicted": lambda p: human_bytes(p.predicted_bytes),
            "all of it": lambda p: "does not fit",
        }
        for name, show in rows.items():
            cells = (failed.get(name, lambda p: "") if one.compile_error else show for one in programs)
            table.add_row(name, *(cell(one) for cell, one in zip(cells, programs, strict=True)))
        return table


def _off(program: ProgramReport) -> float:
    return round(program.predicted_bytes / program.argument_bytes - 1, 3) + 0.0  # never -0.0%


def _heading(program: ProgramReport) -> str:
    return f"{program.name} {program.batch}×{program.length}"


def _times(programs: list[ProgramReport]) -> list[RenderableType]:
    """Lists estimated times, and says what makes them longer than their bounds; else why there are none."""
    if not any(one.estimate for one in programs):
        return [Text("no estimated time: only the compiler for TPUs says how many cycles it expects\n")]
    reasons = [reason for one in programs if (reason := _above_bound(one))]
    return [_time_table(programs), *(Text(reason) for reason in reasons), Text()]


def _above_bound(program: ProgramReport) -> str:
    """Says why a program is estimated at far more than its bound; empty if it is not."""
    one = program.estimate
    if one is None or one.total_s < FAR_ABOVE * one.bound_s:
        return ""
    causes = []
    if one.pages_s > SHARE * one.total_s:
        causes.append(
            f"{one.pages_s * 1e3:.2f} ms are loops over pages of the cache, of whose many small instructions "
            "the compiler expects some 1,800 cycles each, more than it takes to read a page"
        )
    if one.kernels_s > SHARE * one.total_s:
        causes.append(
            f"{one.kernels_s * 1e3:.2f} ms are attention kernels, assumed to reach "
            f"{KERNEL_SHARES.bandwidth:.0%} of the bandwidth and {KERNEL_SHARES.flops:.0%} of the peak rate"
        )
    if one.exposed_s > SHARE * one.total_s:
        causes.append(
            f"{one.exposed_s * 1e3:.2f} ms are collectives with nothing to run beside, which the bound "
            "leaves out"
        )
    rest_s = one.compute_s - one.pages_s
    if rest_s > max(one.bound_s, SHARE * one.total_s):
        causes.append(f"outside of loops the compiler expects {rest_s / one.bound_s:.1f} times the bound")
    if one.traffic_s > one.compute_s and one.traffic_s > FAR_ABOVE * one.memory_bound_s:
        causes.append("the program moves more than weights and cache once")
    why = "; ".join(causes) or "the parts above add up to it"
    return (
        f"{_heading(program)} is above its bound, which is reading weights and cache once and multiplying at "
        f"the peak rate: {why}"
    )


def _time_table(programs: list[ProgramReport]) -> Table:
    estimates = [one.estimate for one in programs if one.estimate]
    kernels = any(one.kernel_bytes for one in estimates)
    parts = f"{'kernels, ' * kernels}and exposed collectives"
    title = f"estimated time, ms: the longer of compute and traffic, {parts}"
    table = plain_table(title, "what", numbers=list(map(_heading, programs)))
    rows: dict[str, Callable[[Estimate], str]] = {
        "tokens in the cache of each": lambda e: str(e.context),
        "compute, by the compiler's cycles": lambda e: f"{e.compute_s * 1e3:.2f}",
        "  of it in loops over pages": lambda e: f"{e.pages_s * 1e3:.2f}",
        "memory traffic": lambda e: f"{human_bytes(e.traffic_bytes)}, {e.traffic_s * 1e3:.2f}",
        "collectives": lambda e: f"{e.collectives_s * 1e3:.2f}",
        "  of it exposed: nothing runs beside": lambda e: f"{e.exposed_s * 1e3:.2f}",
        "estimate": lambda e: f"{e.total_s * 1e3:.2f}",
        "bound by memory": lambda e: f"{e.memory_bound_s * 1e3:.2f}",
        "bound by compute": lambda e: f"{e.compute_bound_s * 1e3:.2f}",
        "estimate / bound": lambda e: f"{e.total_s / e.bound_s:.2f}×",
    }
    if any(one.kernels for one in estimates):
        rows["kernels without cycles"] = lambda e: str(e.kernels)
    if kernels:
        share, low = (
            f"{shares.bandwidth:.0%} of bandwidth or {shares.flops:.0%} of peak"
            for shares in (KERNEL_SHARES, LOW_KERNEL_SHARES)
        )
        rows[f"attention kernels, at {share}, assumed"] = lambda e: (
            f"{human_bytes(e.kernel_bytes)}, {e.kernels_s * 1e3:.2f}"
        )
        rows[f"estimate / bound with kernels at {low}"] = lambda e: f"{e.low_total_s / e.bound_s:.2f}×"
    for name, show in rows.items():
        table.add_row(name, *(show(one) for one in estimates))
    return table
