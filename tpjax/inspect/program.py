"""What the compilers of chips that are not here make of the serving programs."""

from __future__ import annotations

import io
import math
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tpjax.checkpoints.hub import resolve
from tpjax.checkpoints.load import abstract_decoder, parameters, read_config
from tpjax.config import ExpertSharding, ModelConfig
from tpjax.inspect.collectives import DTYPE_BITS, Collective, find_collectives, summarise
from tpjax.inspect.explain import collective_budget
from tpjax.inspect.hardware import USABLE_MEMORY
from tpjax.inspect.topology import Topology
from tpjax.memory import Memory, human_bytes, plan_limits
from tpjax.runner import Residual, Runner, resolve_dtype

_ALIAS = re.compile(r"\{\d*\}: \((\d+), \{\}")
_COPY = re.compile(
    r"^  (?:ROOT )?%\S+ = \(?(\w+)\[([\d,]*)\](\{[^}]*\})?(?:, .*\))? (copy|copy-start|transpose)\("
)
_ON_CHIP = re.compile(r"S\(1\)")  # a TPU's vector memory, where weights are read to


@dataclass(frozen=True)
class Program:
    """One compiled program.

    Attributes:
        name: ``decode`` or ``prefill``.
        batch: rows.
        length: tokens of a row in one call.
        compile_s: seconds.
        collectives: by the line that asked for them.
        argument_bytes: weights, cache and requests on each device, as the compiler lays them out.
        temporary_bytes: besides those.
        predicted_bytes: of the arguments, by the sum of their shapes.
        cache_buffers: of the key-value cache.
        aliased_cache_buffers: of those, the ones updated in place.
        cache_copies: times a whole buffer of the cache is written anew.
        weight_copies: times a whole weight is laid out anew.
        weight_copy_bytes: of those together.
    """

    name: str
    batch: int
    length: int
    compile_s: float
    collectives: list[Collective]
    argument_bytes: int
    temporary_bytes: int
    predicted_bytes: int
    cache_buffers: int
    aliased_cache_buffers: int
    cache_copies: int
    weight_copies: int
    weight_copy_bytes: int


@dataclass(frozen=True, repr=False)
class TopologyReport:
    """What :func:`explain_topology` found. Rich renders it in a terminal, ``_repr_html_`` in a notebook.

    Attributes:
        model: its name.
        topology: as it was asked for.
        tp: devices.
        dtype: of weights and cache.
        memory_bytes: of one device.
        budget: what the design allows per decode step.
        programs: decode, then prefill.
    """

    model: str
    topology: str
    tp: int
    dtype: str
    memory_bytes: int
    budget: dict[str, Any]
    programs: list[Program]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<TopologyReport: {self.model} on {self.topology}>"

    def __rich__(self) -> RenderableType:
        title = f"{self.model} at tp={self.tp} on {self.topology}, {self.dtype}, compiled ahead of time"
        tables = [_collectives(one, self.budget) for one in self.programs]
        return Group(Text(title, style="bold"), self._memory(), *tables)

    def _repr_html_(self) -> str:
        console = Console(record=True, file=io.StringIO(), width=100, force_jupyter=False)
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    def _memory(self) -> Table:
        table = _table(f"per device, of {human_bytes(self.memory_bytes)}")
        table.add_column("what")
        for one in self.programs:
            table.add_column(f"{one.name} {one.batch}×{one.length}", justify="right")
        rows = {
            "weights, cache and state": lambda p: human_bytes(p.argument_bytes),
            "  predicted": lambda p: f"{human_bytes(p.predicted_bytes)} ({_off(p):+.1%})",
            "temporaries": lambda p: human_bytes(p.temporary_bytes),
            "cache buffers updated in place": lambda p: f"{p.aliased_cache_buffers} of {p.cache_buffers}",
            "whole-cache copies": lambda p: str(p.cache_copies),
            "weight copies": lambda p: f"{p.weight_copies} ({human_bytes(p.weight_copy_bytes)})",
            "compiled in": lambda p: f"{p.compile_s:.1f} s",
        }
        for name, show in rows.items():
            table.add_row(name, *(show(one) for one in self.programs))
        return table


def explain_topology(
    model: str,
    topology: Topology,
    tp: int | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    expert_sharding: ExpertSharding = "auto",
) -> TopologyReport:
    """Compiles a model's decode and prefill steps for chips that are not here, from shapes alone.

    Args:
        model: as ``LLM`` takes it, or a ``config.json``.
        topology: the chips.
        tp: devices; ``None``: all of them.
        dtype: as ``LLM`` takes it; ``auto`` is bfloat16 here.
        max_model_len: longest sequence, tokens.
        expert_sharding: as ``LLM`` takes it.

    Raises:
        TpjaxError: the model is not supported or does not fit, or its programs cannot be compiled here.
    """
    path = Path(model).expanduser()
    config = read_config(path if path.suffix == ".json" else resolve(model))
    runner = abstract_runner(
        config.with_expert_sharding(expert_sharding), topology, tp, dtype, max_model_len=max_model_len
    )
    limits = runner.limits
    chunk = runner.chunk_sizes[-1]
    return TopologyReport(
        model=model,
        topology=topology.name,
        tp=runner.mesh.size,
        dtype=str(runner.dtype),
        memory_bytes=topology.memory_bytes,
        budget=collective_budget(config, runner.mesh.size),
        programs=[
            compile_program(runner, "decode", limits.max_slots, 1),
            compile_program(runner, "prefill", 1, chunk),
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
    residual: Residual = "auto",
) -> Runner:
    """A runner whose programs can be lowered and compiled for a topology, not run."""
    mesh, kind = topology.mesh(tp), resolve_dtype("bfloat16" if dtype == "auto" else dtype)
    decoder = abstract_decoder(config, mesh, kind)
    limits = plan_limits(
        config,
        mesh.size,
        kind,
        weight_bytes=sum(p.bytes_per_device for p in parameters(decoder, mesh)),
        memory=Memory(int(topology.memory_bytes * USABLE_MEMORY)),
        max_model_len=max_model_len,
        max_slots=max_slots,
    )
    return Runner(decoder, mesh, limits, kind, residual)


def compile_program(runner: Runner, kind: str, batch: int, length: int) -> Program:
    """Compiles one of a runner's programs and reads what it does."""
    started = time.perf_counter()
    compiled = runner.program(kind, batch, length)
    seconds = time.perf_counter() - started
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    state = runner.abstract_state()
    cache = jax.tree.leaves(state.cache)
    weights = [
        jax.ShapeDtypeStruct(p.layout.shape, p.dtype, sharding=p.sharding)
        for p in parameters(runner.abstract_model(), runner.mesh)
    ]
    first = len(weights)  # arguments: the weights, then the state, the cache first
    aliased = {int(n) for n in _ALIAS.findall(hlo.split("entry_computation_layout", 1)[0])}
    copies = whole_copies(hlo)
    cache_shapes = {_shard(buffer) for buffer in cache}
    matrices = {_shard(weight) for weight in weights if weight.ndim > 1}
    moved = [size for shape, size in copies if shape in matrices]
    return Program(
        name=kind,
        batch=batch,
        length=length,
        compile_s=seconds,
        collectives=summarise(find_collectives(hlo)),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        predicted_bytes=sum(_bytes(leaf) for leaf in (*weights, *jax.tree.leaves(state))),
        cache_buffers=len(cache),
        aliased_cache_buffers=len(aliased & set(range(first, first + len(cache)))),
        cache_copies=sum(shape in cache_shapes for shape, _ in copies),
        weight_copies=len(moved),
        weight_copy_bytes=sum(moved),
    )


def whole_copies(hlo: str) -> list[tuple[tuple[int, ...], int]]:
    """Copies and transposes of a module, as sorted dimensions and bytes.

    Reading ahead into a TPU's own memory is no copy: that is how it reads.
    """
    found = []
    for line in hlo.splitlines():
        if (match := _COPY.match(line)) is None:
            continue
        dtype, dims, layout, kind = match.groups()
        if kind == "copy-start" and _ON_CHIP.search(layout or ""):
            continue
        shape = tuple(sorted(int(n) for n in dims.split(",") if n))
        found.append((shape, math.prod(shape) * DTYPE_BITS[dtype] // 8))
    return found


def _shard(array: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Dimensions on one device, sorted: a transposed copy is a copy."""
    return tuple(sorted(array.sharding.shard_shape(array.shape)))


def _bytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.sharding.shard_shape(array.shape)) * np.dtype(array.dtype).itemsize


def _off(program: Program) -> float:
    return program.predicted_bytes / program.argument_bytes - 1


def _collectives(program: Program, budget: dict[str, Any]) -> Table:
    rule = f"; {budget['rule']}" if program.name == "decode" else ""
    table = _table(f"collectives of {program.name}{rule}")
    for column in ("kind", "result", "asked for by", "when"):
        table.add_column(column, overflow="fold")
    for column in ("times", "bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in program.collectives:
        when = "if asked for" if one.conditional else "always"
        total = human_bytes(one.bytes * one.count)
        table.add_row(one.kind, one.shapes, one.source, when, str(one.count), total)
    if not program.collectives:
        table.add_row("none", "", "", "", "0", "")
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
