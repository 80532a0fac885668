"""Explains a sharded model: specs, memory, and the collectives of its compiled steps."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tpjax.attention import Backend, KernelShape, choose_backend
from tpjax.cache import cache_layout, layer_places, num_entries, page_bytes_per_device
from tpjax.cache_quantization import vector_bytes
from tpjax.checkpoints.load import check_tensors
from tpjax.checkpoints.opening import check_quantize, open_checkpoint
from tpjax.checkpoints.parameters import Parameter, parameters
from tpjax.config import (
    AttentionBackend,
    ExpertParallel,
    KVDtype,
    ModelConfig,
    MoEConfig,
    Quantize,
    check_choice,
)
from tpjax.inspect.budget import collective_budget
from tpjax.inspect.collectives import find_collectives, summarise
from tpjax.inspect.explain_report import Report, Step, TensorRow
from tpjax.inspect.pipeline_report import PipelineReport
from tpjax.inspect.reasons import cache_reason, experts_reason, reason
from tpjax.layers.weights import dtype_bits
from tpjax.mesh import describe_tp, is_local, make_stage_meshes
from tpjax.old_spellings import accepts_old_spellings
from tpjax.planning.published import find_model, is_published, resolve_configuration
from tpjax.runtime.abstract_stages import AbstractStages
from tpjax.runtime.device_speed import split_layers
from tpjax.runtime.limits import PAGE_SIZE, resolve_dtype
from tpjax.runtime.memory import device_memory, workspace_bytes
from tpjax.runtime.programs import ProgramSpec
from tpjax.runtime.role import together
from tpjax.runtime.runner import Runner
from tpjax.runtime.stage import Stage
from tpjax.sharding import Content, Layout, Segment, WeightLayout, head_plan, tensor_layout, width_per_device


def explain(runner: Runner, name: str, dp: int = 1) -> Report | PipelineReport:
    """Describes a runner, one of ``dp`` replicas; of a pipeline each stage, and what moves between them.

    It needs no weights; a decode and a prefill step are compiled unless they are. Stages of other processes
    are described by these, which follow process 0 with :func:`explain_own_stages`; they know their own alone.

    Raises:
        LostProcessError: another process could not tell, or is lost.
    """
    if len(runner.stages) == 1:
        return explain_stage(runner, name, dp)
    reports = _own_reports(runner)
    if len(reports) < len(runner.stages) and runner.leader is not None:
        for stages in runner.leader.explained():
            reports |= {int(number): Report.from_dict(report) for number, report in stages.items()}
    stages = [runner.stages[number] for number in sorted(reports)]
    return PipelineReport(
        model=name,
        tp=[stage.mesh.size for stage in stages],
        pp=len(runner.stages),
        dp=dp,
        layers=[(stage.layers.start, stage.layers.stop) for stage in stages],
        stages=[
            replace(reports[number], model=f"{name}, stage {number + 1} of {len(runner.stages)}")
            for number in sorted(reports)
        ],
        rows=runner.limits.max_rows,
        chunk_tokens=runner.limits.usable_chunk_shapes[-1].tokens,
        hidden_bytes=runner.config.hidden_size * runner.dtype.itemsize,
        token_bytes=4 * (runner.limits.max_slots + 1),
    )


def explain_own_stages(runner: Runner) -> dict[str, Any]:
    """Describes the stages of this process, by their numbers: plain data, for process 0."""
    return {str(number): report.to_dict() for number, report in _own_reports(runner).items()}


def _own_reports(runner: Runner) -> dict[int, Report]:
    stages = enumerate(runner.stages)
    return {number: explain_stage(stage, "") for number, stage in stages if is_local(stage.mesh)}


def explain_stage(stage: Stage, name: str, dp: int = 1) -> Report:
    """Describes a stage of a pipeline, or a model in one piece, as :func:`explain` does."""
    config, mesh, limits = stage.own_config, stage.mesh, stage.limits
    tensors = _tensor_rows(stage)
    weight_bytes = sum(row.bytes_per_device for row in tensors)
    cache = _cache(stage)
    with ThreadPoolExecutor() as pool:  # XLA compiles outside Python's lock
        specs = (
            ProgramSpec.decode(stage.decode_shapes_for([1])[0], greedy=True),
            ProgramSpec("step", 0, limits.usable_chunk_shapes[-1], greedy=True),
        )
        steps = list(pool.map(partial(_step, stage), ("decode", "prefill"), specs))
    state = jax.tree.leaves(stage.abstract_state())
    state_bytes = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in state)
    return Report(
        model=name,
        model_type=config.model_type,
        tp=mesh.size,
        dp=dp,
        platform=mesh.devices.flat[0].device_kind,
        dtype=str(jnp.dtype(stage.dtype)),
        quantize=stage.abstract_model().quantize,
        kv_dtype=stage.kv_dtype,
        attention=str(stage.backend),
        heads=_heads(config, mesh.size),
        experts=None if config.moe is None else _experts(config.moe, mesh.size),
        tensors=tensors,
        weight_bytes=weight_bytes * mesh.size,
        weight_bytes_per_device=weight_bytes,
        cache=cache,
        state_bytes_per_device=state_bytes - cache["bytes_per_device"],
        workspace_bytes=workspace_bytes(
            config, mesh.size, stage.dtype, limits.max_slots, limits.largest_chunks.tokens
        ),
        steps=steps,
    )


@accepts_old_spellings
def explain_model(
    model: str,
    tp: int | Sequence[int] | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    expert_parallel: ExpertParallel = "auto",
    quantize: Quantize | None = None,
    attention: AttentionBackend = "auto",
    dp: int = 1,
    kv_dtype: KVDtype = "auto",
    pp: int = 1,
    quantize_head: bool = False,
) -> Report | PipelineReport:
    """Describes a checkpoint sharded over ``tp`` devices without reading a weight.

    Each of several processes calls it, and compiles the steps; of a pipeline, those of its own stages.
    Process 0 returns the report of all.

    Args:
        model: a name or path that ``LLM`` accepts, the name of a published model, a ``config.json``, or a
            directory that holds one and no weights. From Hugging Face, only ``config.json`` is downloaded.
        tp: number of devices of a mesh, or of each stage, as for ``LLM``; ``None``: all are shared out.
        dtype: a dtype that ``LLM`` accepts.
        max_model_len: longest sequence, tokens.
        expert_parallel: whether experts are sharded, as for ``LLM``.
        quantize: what weights are kept in, as for ``LLM``.
        attention: what computes attention, as for ``LLM``.
        dp: number of replicas.
        kv_dtype: what keys and values are kept in, as for ``LLM``.
        pp: number of pipeline stages of a replica.
        quantize_head: whether embedding and head are kept so too, as for ``LLM``.

    Raises:
        TpjaxError: the checkpoint is not supported, or its configuration and tensors disagree.
    """
    check_quantize(quantize)
    check_choice("kv_dtype", kv_dtype, KVDtype)
    checkpoint = None
    if not is_published(model):
        path = resolve_configuration(model)
        bare = path.suffix == ".json" or (path.is_dir() and not any(path.glob("*.safetensors*")))
        checkpoint = None if bare else open_checkpoint(path)
    if checkpoint is None:
        known = find_model(model)
        known.check_quantize(quantize, quantize_head)
        config, format_of = known.config, known.format_of
    else:
        config, format_of = checkpoint.config, checkpoint.source.format_of
        checkpoint.check_quantize(quantize, quantize_head)
    config = config.with_expert_parallel(expert_parallel)
    meshes, kind = make_stage_meshes(tp, dp, pp)[0], resolve_dtype(dtype)
    tps, layers = [mesh.size for mesh in meshes], split_layers(config, meshes, kind, quantize, kv_dtype)

    def chosen() -> list[Backend]:
        shapes = (KernelShape.of(config, tp, kind, PAGE_SIZE, kv_dtype) for tp in tps)
        return [choose_backend(attention, meshes[0].local_devices[0], shape) for shape in shapes]

    flags = {
        "dtype": dtype,
        "max_model_len": max_model_len,
        "expert_parallel": expert_parallel,
        "quantize": quantize,
        "quantize_head": quantize_head,
        "attention": attention,
        "kv_dtype": kv_dtype,
    }
    architecture = sha256(repr(config).encode()).hexdigest()[:16]
    same = {"work": "explain", "model": Path(model).name, "architecture": architecture, "pp": pp}
    same["tp"] = describe_tp(tps)
    with together(same | flags, device_memory(sum(tps) * dp)) as role:
        memory, backends = role.decide(chosen)
        stages = AbstractStages(
            config, meshes, layers, backends, kind, quantize, quantize_head, format_of, kv_dtype
        )
        if checkpoint is not None:
            check_tensors(checkpoint, [parameter for stage in stages.parameters for parameter in stage])
        if memory is not None and memory.free < 2 * max(share.weight_bytes for share in stages.shares):
            memory = None  # a model that is too large for this machine can be explained too
        limits = stages.limits(memory, max_model_len, None)
        runner = Runner.of_stages(
            stages.decoders, meshes, limits, kind, leader=role.leader, kv_dtype=kv_dtype
        )
        role.follow(runner, partial(explain_own_stages, runner))
        return explain(runner, name=model, dp=dp)


def _step(stage: Stage, name: str, spec: ProgramSpec) -> Step:
    """Compiles a program, and reads its collectives and memory."""
    compiled = stage.program(stage.own(spec))
    memory = compiled.memory_analysis()
    return Step(
        name=name,
        tokens=spec.tokens,
        collectives=summarise(find_collectives(compiled.as_text())),
        budget=collective_budget(
            stage.own_config,
            stage.mesh.size,
            tokens=spec.tokens,
            rows=spec.sampled_rows,
            itemsize=stage.dtype.itemsize,
            greedy=spec.greedy,
            platform=stage.mesh.devices.flat[0].platform,
            embeds=stage.is_first,
            samples=stage.is_last,
            hands_on_whole=stage.hands_on_whole(spec),
        ),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
    )


def _spec(spec: PartitionSpec) -> str:
    """Writes a spec as ``(-, tp)``, or ``replicated``."""
    return (
        "(" + ", ".join("-" if part is None else str(part) for part in spec) + ")" if spec else "replicated"
    )


def _tensor_rows(stage: Stage) -> list[TensorRow]:
    model, devices = stage.abstract_model(), stage.mesh.size
    alike: dict[tuple[Any, ...], list[Parameter]] = {}
    for one in parameters(model, stage.mesh):
        name = re.sub(r"^layers\.\d+\.", "layers.*.", one.name)
        alike.setdefault((name, one.sharding, one.layout, np.dtype(one.dtype)), []).append(one)
    rows = []
    for (name, sharding, layout, dtype), several in alike.items():
        contents = _contents(layout, sharding, len(several) * dtype_bits(dtype))
        held, copied, zeros = (
            sum(getattr(content, kind) for content in contents) for kind in ("held", "copied", "zeros")
        )
        bytes_per_device = len(several) * several[0].bytes_per_device
        rows.append(
            TensorRow(
                name=name,
                count=len(several),
                spec=_spec(sharding.spec),
                shape=layout.shape,
                shard_shape=sharding.shard_shape(layout.shape),
                bytes=len(several) * math.prod(layout.shape) * dtype_bits(dtype) // 8,
                bytes_per_device=bytes_per_device,
                padding=zeros / held,
                copies=copied / held,
                replicated=sharding.is_fully_replicated,
                why=reason(several[0], model, devices),
                devices=contents,
            )
        )
    return rows


def _contents(layout: Layout, sharding: NamedSharding, bits: int) -> tuple[Content, ...]:
    """Returns the content of the slice on each device, in bytes, for elements of ``bits`` bits."""
    contents, seen = [], set()
    slices = sharding.devices_indices_map(layout.shape)
    for device in sharding.mesh.devices.flat:
        index = slices[device]
        content = layout.content(index)
        if (key := str(index)) in seen:
            content = replace(content, held=0, copied=content.held + content.copied)
        seen.add(key)
        held, copied, zeros = (bits * n // 8 for n in (content.held, content.copied, content.zeros))
        contents.append(Content(held, copied, zeros))
    return tuple(contents)


def _cache(stage: Stage) -> dict[str, Any]:
    config, mesh, limits = stage.own_config, stage.mesh, stage.limits
    cache = cache_layout(config, mesh.size, limits.num_pages, limits.page_size)
    platform = mesh.devices.flat[0].platform
    page_bytes = page_bytes_per_device(
        config, mesh.size, limits.page_size, stage.dtype, platform, limits.windows, stage.kv_dtype
    )
    *rows, width = cache.shape
    stored_shape = (*rows, vector_bytes(width, stage.kv_dtype, stage.dtype))  # in bytes, scales included
    layout = tensor_layout("latents", stored_shape)
    if config.attention.latent is None:
        stored = enumerate(head_plan(config, mesh.size).stored_kv_heads)
        heads = tuple(Segment("heads", head, 1, place) for place, head in stored if head is not None)
        layout = WeightLayout(stored_shape, 1, heads, (("heads", config.attention.num_kv_heads),))
    sharding = NamedSharding(mesh, cache.spec)
    buffers = cache.count * num_entries(config, limits.windows)
    places = layer_places(config, limits.windows)
    groups = [
        {"window": window, "layers": sum(place.group == number for place in places)}
        for number, window in enumerate(limits.windows)
    ]
    token_bytes = page_bytes // limits.page_size  # in one page group
    past = limits.windows.count(None)  # groups that keep what no window sees
    return {
        "spec": _spec(cache.spec),
        "shape": cache.shape,
        "shard_shape": sharding.shard_shape(cache.shape),
        "buffers": buffers,
        "num_pages": limits.num_pages,
        "page_size": limits.page_size,
        "bytes": page_bytes * limits.num_pages * mesh.size,
        "bytes_per_device": page_bytes * limits.num_pages,
        "page_groups": groups,
        "page_bytes_per_device": page_bytes,
        "bytes_per_token": token_bytes * len(groups) * mesh.size,
        "bytes_per_token_per_device": token_bytes * len(groups),
        "bytes_per_past_token": token_bytes * past * mesh.size,
        "bytes_per_past_token_per_device": token_bytes * past,
        "why": cache_reason(config, mesh.size),
        "devices": _contents(layout, sharding, 8 * buffers),
    }


def _heads(config: ModelConfig, tp: int) -> dict[str, Any]:
    plan = head_plan(config, tp)
    own, group = plan.head_slots_per_device, plan.group_size
    if config.attention.latent is None:
        cache_padding = plan.kv_padding
        summary = (
            f"heads: {plan.num_heads} query and {plan.num_kv_heads} KV heads of the checkpoint are computed "
            f"as {plan.num_padded_heads} and {plan.num_head_slots} "
            f"({plan.query_padding:+.0%} attention FLOPs, {cache_padding:+.0%} cache over all devices); "
            f"each device has {own} KV head{'s' * (own > 1)} with {group} query head{'s' * (group > 1)} each"
        )
    else:
        cache_padding = tp - 1.0
        summary = (
            f"heads: {plan.num_heads} of the checkpoint are computed as {plan.num_padded_heads} "
            f"({plan.query_padding:+.0%} attention FLOPs), {plan.head_slots_per_device} on each device; "
            "all read one latent per token, which is replicated "
            f"({cache_padding:+.0%} cache over all devices)"
        )
    return {
        "num_heads": plan.num_heads,
        "num_kv_heads": plan.num_kv_heads,
        "padded_heads": plan.num_padded_heads,
        "kv_head_slots": plan.num_head_slots,
        "group_size": plan.group_size,
        "query_padding": plan.query_padding,
        "kv_padding": cache_padding,
        "summary": summary,
    }


def _experts(moe: MoEConfig, tp: int) -> dict[str, Any]:
    count, width, axis = moe.num_experts, moe.expert_width, moe.sharded_axis(tp)
    if axis == "experts":
        what = f"each device has {count // tp} of its own"
    else:
        padded = tp * width_per_device(width, tp)
        what = f"each device has {padded // tp} of every expert's {width} features" + (
            f" (padded to {padded})" if padded > width else ""
        )
    who = f"{moe.experts_per_token} of {count} compute a token"
    return {
        "num_experts": count,
        "experts_per_token": moe.experts_per_token,
        "sparse_layers": sum(moe.sparse_layers),
        "sharded_by": axis,
        "summary": f"experts: {who}; {what}, as {experts_reason(moe, tp)}",
    }
