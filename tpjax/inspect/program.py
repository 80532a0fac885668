"""What the compilers of chips that are not here make of the serving programs."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tpjax.checkpoints.hub import resolve
from tpjax.checkpoints.load import abstract_decoder, parameters, read_config
from tpjax.config import ExpertParallel, ModelConfig, SequenceParallel
from tpjax.errors import ConfigError
from tpjax.hardware import USABLE_MEMORY
from tpjax.inspect.budget import collective_budget
from tpjax.inspect.collectives import Collective, find_collectives, summarise
from tpjax.inspect.estimate import Estimate, estimate
from tpjax.inspect.hlo import Array, Instruction, Module, tpu_array
from tpjax.inspect.tables import as_html, collective_table
from tpjax.inspect.topology import Topology
from tpjax.old_spellings import accepts_old_spellings
from tpjax.planning.plain_table import plain_table
from tpjax.planning.published import is_published, published_config
from tpjax.planning.workload import DEFAULT_CONTEXT
from tpjax.runtime.limits import Limits, resolve_dtype
from tpjax.runtime.memory import DeviceMemory, human_bytes, plan_limits
from tpjax.runtime.programs import Kind
from tpjax.runtime.runner import Runner
from tpjax.sharding import SEQUENCE_PARALLEL

_ALIAS = re.compile(r"\{\d*\}: \((\d+), \{\}")
_COPIES = ("copy", "copy-start", "transpose")
# hand buffers on, or begin what is counted at its end
_NO_WRITES = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")


@dataclass(frozen=True)
class ProgramReport:
    """What a compiler made of one program of serving.

    Attributes:
        name: ``decode`` or ``prefill``.
        batch: rows.
        length: tokens of a row in one call.
        budget: what the design allows its collectives.
        compile_s: seconds.
        predicted_bytes: of weights, cache and state, by the sum of their shapes, as a TPU tiles them.
        cache_buffers: of the key-value cache.
        refused: what the compiler said instead of compiling, in a line; else empty. All that it would have
            found has then its default.
        fits: arguments and temporaries, the program itself, and results that replace no argument, are no more
            than the device has.
        needed_bytes: of all these.
        collectives: by the line that asked for them.
        argument_bytes: weights, cache and requests on each device, as the compiler lays them out.
        temporary_bytes: besides those.
        aliased_cache_buffers: the ones updated in place.
        cache_copies: times a whole buffer of the cache is copied or transposed.
        cache_write_backs: times one is written whole by anything else.
        weight_copies: times a whole weight is laid out anew.
        weight_copy_bytes: of those together.
        estimate: of its time, on a TPU.
    """

    name: Kind
    batch: int
    length: int
    budget: dict[str, Any]
    compile_s: float
    predicted_bytes: int
    cache_buffers: int
    refused: str = ""
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
    """What :func:`explain_topology` found. Rich renders it in a terminal, ``_repr_html_`` in a notebook.

    Attributes:
        model: its name.
        topology: as it was asked for.
        tp: devices.
        dtype: of weights and cache.
        memory_bytes: of one device.
        programs: decode, then prefill.
    """

    model: str
    topology: str
    tp: int
    dtype: str
    memory_bytes: int
    programs: list[ProgramReport]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<TopologyReport: {self.model} on {self.topology}>"

    def __rich__(self) -> RenderableType:
        title = f"{self.model} at tp={self.tp} on {self.topology}, {self.dtype}, compiled ahead of time"
        compiled = [one for one in self.programs if not one.refused]
        return Group(
            Text(title, style="bold"),
            *(Text(self._does_not_fit(one), style="red") for one in self.programs if not one.fits),
            self._memory(),
            *([_times(compiled)] if any(one.estimate for one in compiled) else []),
            *(collective_table(_heading(one), one.collectives, one.budget) for one in compiled),
        )

    def _repr_html_(self) -> str:
        return as_html(self)

    def _does_not_fit(self, program: ProgramReport) -> str:
        needed = max(program.needed_bytes, program.predicted_bytes)
        said = f"; the compiler: {program.refused}" if program.refused else ""
        return (
            f"{program.name} does not fit: it needs {human_bytes(needed)} on each device, of "
            f"{human_bytes(self.memory_bytes)}{said}"
        )

    def _memory(self) -> Table:
        table = plain_table(
            f"per device, of {human_bytes(self.memory_bytes)}",
            "what",
            numbers=list(map(_heading, self.programs)),
        )
        rows: dict[str, Callable[[ProgramReport], str]] = {
            "weights, cache and state": lambda p: human_bytes(p.argument_bytes),
            "  predicted": lambda p: f"{human_bytes(p.predicted_bytes)} ({_off(p):+.1%})",
            "temporaries": lambda p: human_bytes(p.temporary_bytes),
            "all of it": lambda p: f"{human_bytes(p.needed_bytes)}, {'fits' if p.fits else 'does not fit'}",
            "cache buffers updated in place": lambda p: f"{p.aliased_cache_buffers} of {p.cache_buffers}",
            "whole-cache copies": lambda p: str(p.cache_copies),
            "whole-cache write-backs": lambda p: str(p.cache_write_backs),
            "weight copies": lambda p: f"{p.weight_copies} ({human_bytes(p.weight_copy_bytes)})",
            "compiled in": lambda p: f"{p.compile_s:.1f} s",
        }
        refused: dict[str, Callable[[ProgramReport], str]] = {
            "  predicted": lambda p: human_bytes(p.predicted_bytes),
            "all of it": lambda p: "does not fit",
        }
        for name, show in rows.items():
            cells = (refused.get(name, lambda p: "") if one.refused else show for one in self.programs)
            table.add_row(name, *(cell(one) for cell, one in zip(cells, self.programs, strict=True)))
        return table


@accepts_old_spellings
def explain_topology(
    model: str,
    topology: Topology,
    tp: int | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    expert_parallel: ExpertParallel = "auto",
    context: int = DEFAULT_CONTEXT,
) -> TopologyReport:
    """Compiles a model's decode and prefill steps for chips that are not here, from shapes alone.

    A program that does not fit the chips is compiled all the same, if the compiler takes it.

    Args:
        model: the name of a built-in model, or as ``LLM`` takes it, or a ``config.json``.
        topology: the chips.
        tp: devices; ``None``: all of them.
        dtype: as ``LLM`` takes it; ``auto`` is bfloat16 here.
        max_model_len: longest sequence, tokens.
        expert_parallel: as ``LLM`` takes it.
        context: tokens in the cache of each sequence that is decoded, for the estimate of time; no more than
            ``max_model_len``.

    Raises:
        TpjaxError: the model is not supported, or its programs cannot be compiled here.
    """
    if context < 1:
        raise ConfigError(f"context={context} is less than 1")
    if is_published(model):
        config = published_config(model)
    else:
        config = read_config(resolve(model, configuration=True))
    runner = abstract_runner(
        config.with_expert_parallel(expert_parallel), topology, tp, dtype, max_model_len=max_model_len
    )
    limits = runner.limits
    chunk = runner.chunk_sizes[-1]
    return TopologyReport(
        model=model,
        topology=topology.name,
        tp=runner.mesh.size,
        dtype=str(runner.dtype),
        memory_bytes=topology.memory_bytes,
        programs=[
            compile_program(runner, topology, "decode", limits.max_slots, 1, context),
            compile_program(runner, topology, "prefill", 1, chunk),
        ],
    )


def abstract_runner(
    config: ModelConfig,
    topology: Topology,
    tp: int | None = None,
    dtype: str = "auto",
    *,
    max_model_len: int | None = None,
    max_slots: int = 8,
    sequence_parallel: SequenceParallel = "auto",
) -> Runner:
    """A runner whose programs can be lowered and compiled for a topology, not run.

    Where the model does not fit, its cache is as large as if it did.
    """
    mesh, kind = topology.mesh(tp), resolve_dtype("bfloat16" if dtype == "auto" else dtype)
    decoder = abstract_decoder(config, mesh, kind)

    def limits(memory: DeviceMemory | None, longest: int | None) -> Limits:
        return plan_limits(
            config,
            mesh.size,
            kind,
            weight_bytes=sum(p.bytes_per_device for p in parameters(decoder, mesh)),
            memory=memory,
            max_model_len=longest,
            max_slots=max_slots,
        )

    platform = mesh.devices.flat[0].platform
    memory = DeviceMemory(int(topology.memory_bytes * USABLE_MEMORY), platform=platform)
    try:
        sizes = limits(memory, max_model_len)
    except ConfigError:  # what else is wrong with the sizes is raised again
        sizes = limits(None, max_model_len or min(config.longest_context, DEFAULT_CONTEXT))
    return Runner(decoder, mesh, sizes, kind, sequence_parallel)


def compile_program(
    runner: Runner, topology: Topology, kind: Kind, batch: int, length: int, context: int = 0
) -> ProgramReport:
    """Compiles one of a runner's programs and reads what it does.

    Args:
        runner: of :func:`abstract_runner`.
        topology: that it was made for.
        kind: as in ``ProgramSpec``.
        batch: rows.
        length: tokens of a prefill chunk, or decode steps.
        context: tokens in the cache of each sequence, for the estimate of time.
    """
    state = runner.abstract_state()
    cache = jax.tree.leaves(state.cache)
    weights = [
        jax.ShapeDtypeStruct(p.layout.shape, p.dtype, sharding=p.format)
        for p in parameters(runner.abstract_model(), runner.mesh)
    ]
    predicted = sum(_bytes(leaf, topology.is_tpu) for leaf in (*weights, *jax.tree.leaves(state)))
    budget = collective_budget(
        runner.config,
        runner.mesh.size,
        tokens=batch * length,
        rows=batch,
        itemsize=runner.dtype.itemsize,
        cut=kind == "prefill" and runner.programs.residual_spec(length) == SEQUENCE_PARALLEL,
    )
    started = time.perf_counter()
    refused, compiled = "", None
    try:
        compiled = runner.program(kind, batch, length)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused = str(error).strip().splitlines()[0]
    program = ProgramReport(
        name=kind,
        batch=batch,
        length=length,
        budget=budget,
        compile_s=time.perf_counter() - started,
        predicted_bytes=predicted,
        cache_buffers=len(cache),
        refused=refused,
    )
    if compiled is None:
        return program
    memory, module = compiled.memory_analysis(), Module(compiled.as_text())
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    first = len(weights)  # arguments: the weights, then the state, the cache first
    aliased = {int(n) for n in _ALIAS.findall(module.text.split("entry_computation_layout", 1)[0])}
    copies, collectives = whole_copies(module), find_collectives(module)
    caches = {_shard(buffer) for buffer in cache}
    matrices = {_shard(weight) for weight in weights if weight.ndim > 1}
    moved = [array.bytes for array in copies if array.sizes in matrices]
    return replace(
        program,
        fits=needed <= topology.memory_bytes,
        needed_bytes=needed,
        collectives=summarise(collectives),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        aliased_cache_buffers=len(aliased & set(range(first, first + len(cache)))),
        cache_copies=sum(array.sizes in caches for array in copies),
        cache_write_backs=sum(array.sizes in caches for array in write_backs(module)),
        weight_copies=len(moved),
        weight_copy_bytes=sum(moved),
        estimate=estimate(
            module,
            collectives,
            runner.config,
            topology,
            tp=runner.mesh.size,
            dtype=str(runner.dtype),
            batch=batch,
            length=length,
            context=min(context, runner.limits.max_model_len),
            page_size=runner.limits.page_size,
            caches=caches,
        )
        if topology.is_tpu
        else None,
    )


def whole_copies(module: Module) -> list[Array]:
    """What a module copies or transposes, fused or not.

    Reading ahead into a TPU's own memory is no copy: that is how it reads.
    """
    return [
        one.arrays[0]
        for body in module.computations.values()
        for one in body.values()
        if one.opcode in _COPIES and not (one.opcode == "copy-start" and _on_chip(one))
    ]


def write_backs(module: Module) -> list[Array]:
    """What a module writes whole to the device's memory otherwise; in place, it would write the update."""
    return [
        array
        for one in module.executed()
        for array, size in module.written(one.instruction)
        if not one.fused
        and array.space == 0
        and size == array.bytes
        and one.instruction.opcode not in _NO_WRITES
        and (one.instruction.opcode not in _COPIES or _on_chip(one.instruction))
        and not any(
            inner.opcode in _COPIES
            for callee in one.instruction.callees
            for inner in module.computations[callee].values()
        )
    ]


def _on_chip(copy: Instruction) -> bool:
    """Whether an asynchronous copy goes to, or comes from, a TPU's own memory."""
    return copy.opcode == "copy-start" and any(array.space == 1 for array in copy.arrays[:2])


def _shard(array: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Dimensions on one device, as :attr:`Array.sizes` gives them."""
    return tuple(sorted(size for size in array.sharding.shard_shape(array.shape) if size > 1))


def _bytes(array: jax.ShapeDtypeStruct, tiled: bool) -> int:
    dims: tuple[int, ...] = array.sharding.shard_shape(array.shape)
    itemsize: int = np.dtype(array.dtype).itemsize
    if not tiled:
        return math.prod(dims) * itemsize
    layout = array.format.layout
    if layout is not None:
        dims = tuple(dims[axis] for axis in layout.major_to_minor)
    return tpu_array(f"u{8 * itemsize}", dims, fixed=layout is not None).bytes


def _off(program: ProgramReport) -> float:
    return program.predicted_bytes / program.argument_bytes - 1


def _heading(program: ProgramReport) -> str:
    return f"{program.name} {program.batch}×{program.length}"


def _times(programs: list[ProgramReport]) -> Table:
    title = "estimated time, ms: the longer of compute and traffic, and the collectives"
    table = plain_table(title, "what", numbers=list(map(_heading, programs)))
    rows: dict[str, Callable[[Estimate], str]] = {
        "tokens in the cache of each": lambda e: str(e.context),
        "compute, by the compiler's cycles": lambda e: f"{e.compute_s * 1e3:.2f}",
        "  of it walking over pages": lambda e: f"{e.pages_s * 1e3:.2f}",
        "memory traffic": lambda e: f"{human_bytes(e.traffic_bytes)}, {e.traffic_s * 1e3:.2f}",
        "collectives": lambda e: f"{e.collectives_s * 1e3:.2f}",
        "estimate": lambda e: f"{e.total_s * 1e3:.2f}",
        "bound by memory": lambda e: f"{e.memory_bound_s * 1e3:.2f}",
        "bound by compute": lambda e: f"{e.compute_bound_s * 1e3:.2f}",
        "estimate / bound": lambda e: f"{e.total_s / e.bound_s:.2f}×",
    }
    estimates = [one.estimate for one in programs if one.estimate]
    if any(one.kernels for one in estimates):
        rows["kernels without cycles"] = lambda e: str(e.kernels)
    for name, show in rows.items():
        table.add_row(name, *(show(one) for one in estimates))
    return table
