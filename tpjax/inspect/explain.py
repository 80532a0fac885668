"""What is where, how much memory it takes, and what a decode step moves between devices."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tpjax.cache import cache_layout, page_bytes_per_device
from tpjax.checkpoints.hub import resolve
from tpjax.checkpoints.load import (
    abstract_decoder,
    check_tensors,
    open_checkpoint,
    parameters,
    read_config,
)
from tpjax.config import ExpertSharding, ModelConfig, MoEConfig
from tpjax.inspect.collectives import Collective, find_collectives, summarise
from tpjax.inspect.published import is_published, published_config
from tpjax.memory import device_memory, human_bytes, plan_limits
from tpjax.mesh import make_mesh
from tpjax.runner import Runner, resolve_dtype
from tpjax.sharding import HeadPlan, pad_to_multiple


@dataclass(frozen=True)
class TensorRow:
    """A parameter, or the same parameter of every layer.

    Attributes:
        name: dotted path; ``*`` stands for each layer.
        count: how many tensors the row stands for.
        spec: how it is cut.
        shape: stored, over all devices.
        shard_shape: on one device.
        bytes_per_device: all of the row's tensors together.
        padding: stored elements that are zeros or replicas made for this tp, as a fraction of the
            checkpoint's.
        replicated: every device holds all of it.
    """

    name: str
    count: int
    spec: str
    shape: tuple[int, ...]
    shard_shape: tuple[int, ...]
    bytes_per_device: int
    padding: float
    replicated: bool


@dataclass(frozen=True, repr=False)
class Report:
    """What :func:`explain` found. Rich renders it in a terminal, ``_repr_html_`` in a notebook.

    Attributes:
        model: its name.
        model_type: its family.
        tp: devices.
        platform: of the devices.
        dtype: of weights and cache.
        heads: the head plan in words.
        experts: how a mixture of experts is cut, and why; ``None``: the model has none.
        tensors: parameters.
        weight_bytes_per_device: all parameters.
        cache: shape, spec and bytes of the key-value cache.
        collectives: of one compiled decode step, batch 1, by the line that asked for them.
        collective_budget: what the design allows per decode step.
    """

    model: str
    model_type: str
    tp: int
    platform: str
    dtype: str
    heads: dict[str, Any]
    experts: dict[str, Any] | None
    tensors: list[TensorRow]
    weight_bytes_per_device: int
    cache: dict[str, Any]
    collectives: list[Collective]
    collective_budget: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<Report: {self.model} at tp={self.tp}>"  # the tables are for print (rich) and notebooks

    def __rich__(self) -> RenderableType:
        return Group(
            Text(
                f"{self.model} ({self.model_type}) at tp={self.tp} on {self.platform}, {self.dtype}",
                style="bold",
            ),
            Text(self.heads["summary"]),
            *([Text(self.experts["summary"])] if self.experts else []),
            self._tensor_table(),
            self._memory_table(),
            self._collective_table(),
        )

    def _repr_html_(self) -> str:
        console = Console(record=True, file=io.StringIO(), width=100, force_jupyter=False)
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    def _tensor_table(self) -> Table:
        table = _table("weights")
        for column in ("tensor", "spec"):
            table.add_column(column, overflow="fold")
        for column in ("shape", "per device", "bytes/dev", "padding"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.tensors:
            times = f" ×{row.count}" if row.count > 1 else ""
            table.add_row(
                row.name.removeprefix("layers.*.").removesuffix(".weight") + times,
                row.spec,
                _dims(row.shape),
                _dims(row.shard_shape),
                human_bytes(row.bytes_per_device),
                f"{row.padding:.1%}" if row.padding else "",
            )
        return table

    def _memory_table(self) -> Table:
        table = _table("memory per device")
        table.add_column("what")
        table.add_column("size", justify="right")
        table.add_row("weights", human_bytes(self.weight_bytes_per_device))
        cache = self.cache
        table.add_row(
            f"KV cache: {cache['num_pages']} pages of {cache['page_size']} positions\n"
            f"  {cache['buffers']} buffers of {_dims(cache['shard_shape'])}, cut by {cache['spec']}",
            human_bytes(cache["bytes_per_device"]),
        )
        table.add_row("  per token", human_bytes(cache["bytes_per_token_per_device"]))
        return table

    def _collective_table(self) -> Table:
        table = _table(f"collectives of a decode step; {self.collective_budget['rule']}")
        for column in ("kind", "result", "asked for by", "when"):
            table.add_column(column, overflow="fold")
        for column in ("times", "bytes each", "bytes"):
            table.add_column(column, justify="right", no_wrap=True)
        for one in self.collectives:
            table.add_row(
                one.kind,
                one.shapes,
                one.source,
                "if asked for" if one.conditional else "always",
                str(one.count),
                human_bytes(one.bytes),
                human_bytes(one.bytes * one.count),
            )
        if not self.collectives:
            table.add_row("none", "", "", "", "0", "", "")
        return table


def explain(runner: Runner, name: str) -> Report:
    """Describes a runner; it needs no weights, and compiles the decode step if that has not happened yet."""
    config, mesh, limits = runner.config, runner.mesh, runner.limits
    rows = _tensor_rows(runner)
    cache = cache_layout(config, mesh.size, limits.num_pages, limits.page_size)
    page_bytes = page_bytes_per_device(config, mesh.size, limits.page_size, runner.dtype)
    program = runner.program("decode", 1, 1)
    return Report(
        model=name,
        model_type=config.model_type,
        tp=mesh.size,
        platform=mesh.devices.flat[0].device_kind,
        dtype=str(jnp.dtype(runner.dtype)),
        heads=_heads(config, mesh.size),
        experts=None if config.moe is None else _experts(config.moe, mesh.size),
        tensors=rows,
        weight_bytes_per_device=sum(row.bytes_per_device for row in rows),
        cache={
            "spec": _spec(cache.spec),
            "shape": cache.shape,
            "shard_shape": NamedSharding(mesh, cache.spec).shard_shape(cache.shape),
            "buffers": cache.count * config.num_layers,
            "num_pages": limits.num_pages,
            "page_size": limits.page_size,
            "bytes_per_device": page_bytes * limits.num_pages,
            "bytes_per_token_per_device": page_bytes // limits.page_size,
        },
        collectives=summarise(find_collectives(program.as_text())),
        collective_budget=collective_budget(config, mesh.size),
    )


def explain_model(
    model: str,
    tp: int | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    expert_sharding: ExpertSharding = "auto",
) -> Report:
    """Describes a checkpoint cut over ``tp`` devices without reading a weight.

    Args:
        model: as ``LLM`` takes it; or the name of a published model, a ``config.json``, or a directory that
            holds one and no weights.
        tp: devices; ``None``: all of them.
        dtype: as ``LLM`` takes it.
        max_model_len: longest sequence, tokens.
        expert_sharding: as ``LLM`` takes it.

    Raises:
        TpjaxError: the checkpoint is not supported, or its configuration and tensors disagree.
    """
    checkpoint = None
    if is_published(model):
        config = published_config(model)
    else:
        path = resolve(model, configuration=True)
        bare = path.name == "config.json" or (path.is_dir() and not any(path.glob("*.safetensors*")))
        checkpoint = None if bare else open_checkpoint(path)
        config = read_config(path) if checkpoint is None else checkpoint.config
    config = config.with_expert_sharding(expert_sharding)
    mesh, kind = make_mesh(tp), resolve_dtype(dtype)
    decoder = abstract_decoder(config, mesh, kind)
    declared = parameters(decoder, mesh)
    if checkpoint is not None:
        check_tensors(checkpoint, declared)
    weight_bytes, memory = sum(p.bytes_per_device for p in declared), device_memory(mesh.size)
    if memory is not None and memory.free < 2 * weight_bytes:
        memory = None  # what is too large for this machine can be looked at all the same
    limits = plan_limits(
        config,
        mesh.size,
        kind,
        weight_bytes=weight_bytes,
        memory=memory,
        max_model_len=max_model_len,
        max_slots=8,
    )
    return explain(Runner(decoder, mesh, limits, kind), name=model)


def collective_budget(config: ModelConfig, tp: int) -> dict[str, Any]:
    """What one decode step may move: two all-reduces a layer, one for the embedding, one gather to sample.

    A layer whose attention and MLP stand side by side needs one; a norm over all heads one more, of two
    numbers a token.
    """
    if tp == 1:
        return {"all_reduces": 0, "rule": "tp=1: none"}
    a_layer = (1 if config.parallel else 2) + (config.qk_norm == "projection")
    layers = config.num_layers
    count = a_layer * layers + 1
    return {
        "all_reduces": count,
        "rule": f"budget: {a_layer} × {layers} layers + 1 embedding = {count} all-reduces, and sampling",
    }


def _dims(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _spec(spec: PartitionSpec) -> str:
    return (
        "(" + ", ".join("-" if part is None else str(part) for part in spec) + ")" if spec else "replicated"
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def _tensor_rows(runner: Runner) -> list[TensorRow]:
    grouped: dict[tuple[Any, ...], int] = {}
    for parameter in parameters(runner.abstract_model(), runner.mesh):
        layout, sharding = parameter.layout, parameter.sharding
        shard = sharding.shard_shape(layout.shape)
        stored = math.prod(layout.shape)
        key = (
            re.sub(r"^layers\.\d+\.", "layers.*.", parameter.name),
            _spec(sharding.spec),
            layout.shape,
            shard,
            math.prod(shard) * np.dtype(parameter.dtype).itemsize,
            layout.padding / (stored - layout.padding),
            sharding.is_fully_replicated,
        )
        grouped[key] = grouped.get(key, 0) + 1
    return [
        TensorRow(name, count, spec, shape, shard, size * count, padding, replicated)
        for (name, spec, shape, shard, size, padding, replicated), count in grouped.items()
    ]


def _heads(config: ModelConfig, tp: int) -> dict[str, Any]:
    plan = HeadPlan(config.num_heads, config.num_kv_heads, tp)
    if config.latent is None:
        cache_padding = plan.kv_padding
        summary = (
            f"heads: {plan.num_heads} query and {plan.num_kv_heads} KV heads of the checkpoint are computed "
            f"as {plan.num_padded_heads} and {plan.num_slots} "
            f"({plan.query_padding:+.0%} attention FLOPs, {cache_padding:+.0%} cache over all devices); "
            f"each device has {plan.slots_per_device} KV heads with {plan.group_size} query heads each"
        )
    else:
        cache_padding = tp - 1.0
        summary = (
            f"heads: {plan.num_heads} of the checkpoint are computed as {plan.num_padded_heads} "
            f"({plan.query_padding:+.0%} attention FLOPs), {plan.slots_per_device} on each device; all read "
            f"one latent per token, which every device has whole ({cache_padding:+.0%} cache over all)"
        )
    return {
        "num_heads": plan.num_heads,
        "num_kv_heads": plan.num_kv_heads,
        "padded_heads": plan.num_padded_heads,
        "kv_slots": plan.num_slots,
        "group_size": plan.group_size,
        "query_padding": plan.query_padding,
        "kv_padding": cache_padding,
        "summary": summary,
    }


def _experts(moe: MoEConfig, tp: int) -> dict[str, Any]:
    count, width, cut = moe.num_experts, moe.expert_width, moe.cut(tp)
    divides = count % tp == 0
    if cut == "experts":
        what = f"each device has {count // tp} whole ones"
    else:
        padded = pad_to_multiple(width, tp)
        what = f"each device has {padded // tp} of every expert's {width} features" + (
            f" (padded to {padded})" if padded > width else ""
        )
    if moe.expert_sharding == "auto":
        why = f"tp={tp} {'divides' if divides else 'does not divide'} {count} experts"
    else:
        why = f"expert_sharding={moe.expert_sharding!r} asks for it"
    return {
        "num_experts": count,
        "experts_per_token": moe.experts_per_token,
        "sparse_layers": sum(moe.sparse_layers),
        "cut": cut,
        "summary": f"experts: {moe.experts_per_token} of {count} compute a token; {what}, as {why}",
    }
