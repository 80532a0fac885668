"""Compiles the serving programs for chips that are not here, and reads what the compiler made of them."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax

from tpjax.attention import KernelShape, choose_backend
from tpjax.attention.tpu import Work, work
from tpjax.attention.xla import pages_at_once
from tpjax.checkpoints.opening import check_quantize
from tpjax.checkpoints.parameters import parameters
from tpjax.config import (
    AttentionBackend,
    ExpertParallel,
    KVDtype,
    ModelConfig,
    Quantize,
    SequenceParallel,
    check_choice,
)
from tpjax.errors import ConfigError
from tpjax.hardware import USABLE_MEMORY
from tpjax.inspect.budget import collective_budget
from tpjax.inspect.collectives import find_collectives, summarise
from tpjax.inspect.copies import copied_arrays, write_backs
from tpjax.inspect.estimate import estimate
from tpjax.inspect.hlo import Module, tpu_array
from tpjax.inspect.topology import Topology
from tpjax.inspect.topology_report import ProgramReport, TopologyReport
from tpjax.layers.weights import FormatOf, dtype_bits
from tpjax.old_spellings import accepts_old_spellings
from tpjax.planning.published import find_model
from tpjax.planning.workload import DEFAULT_CONTEXT, STEP_BATCH, STEP_PROMPT_LEN
from tpjax.runtime import layer_split
from tpjax.runtime.abstract_stages import AbstractStages
from tpjax.runtime.counts import Counts
from tpjax.runtime.device_speed import itemsizes, stored_itemsizes
from tpjax.runtime.limits import MAX_PROMPT_TOKENS, PAGE_SIZE, resolve_dtype
from tpjax.runtime.memory import DeviceMemory
from tpjax.runtime.programs import ProgramSpec
from tpjax.runtime.runner import Runner
from tpjax.runtime.stage import Stage
from tpjax.runtime.steps import padded_tokens
from tpjax.sharding import SEQUENCE_PARALLEL, head_plan
from tpjax.step_time import Itemsizes

_ALIAS = re.compile(r"\{\d*\}: \((\d+), \{\}")


@accepts_old_spellings
def explain_topology(
    model: str,
    topology: Topology,
    tp: int | Sequence[int] | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    expert_parallel: ExpertParallel = "auto",
    context: int = DEFAULT_CONTEXT,
    batch: int = STEP_BATCH,
    prompt_len: int = STEP_PROMPT_LEN,
    quantize: Quantize | None = None,
    attention: AttentionBackend = "auto",
    dp: int = 1,
    kv_dtype: KVDtype = "auto",
    pp: int = 1,
    quantize_head: bool = False,
) -> TopologyReport:
    """Compiles a model's decode and prefill steps for chips that are not here, from shapes alone.

    A program that does not fit the chips is compiled too, unless the compiler fails.

    Args:
        model: a name or path that ``LLM`` accepts, the name of a published model, or a ``config.json``.
        topology: the chips.
        tp: number of devices of a stage, or of each, as for ``LLM``; ``None``: all are shared out.
        dtype: a dtype that ``LLM`` accepts; ``auto`` is bfloat16 here.
        max_model_len: longest sequence, tokens.
        expert_parallel: whether experts are sharded, as for ``LLM``.
        context: tokens in the cache of each decoded sequence, for the time estimate; at most
            ``max_model_len``.
        batch: sequences of the decode step.
        prompt_len: tokens of the prefill step; it takes the smallest chunks that hold them.
        quantize: what weights are kept in, as for ``LLM``.
        attention: what computes attention, as for ``LLM``.
        dp: number of replicas; the programs of each are the same.
        kv_dtype: what keys and values are kept in, as for ``LLM``.
        pp: number of pipeline stages of a replica, whose programs are reported one after the other.
        quantize_head: whether embedding and head are kept so too, as for ``LLM``.

    Raises:
        TpjaxError: the model is not supported, or its programs cannot be compiled here.
    """
    for name, number in (("context", context), ("batch", batch), ("prompt_len", prompt_len)):
        if number < 1:
            raise ConfigError(f"{name}={number} is less than 1")
    if prompt_len > MAX_PROMPT_TOKENS:
        raise ConfigError(f"prompt_len={prompt_len} is more than the {MAX_PROMPT_TOKENS} tokens of a step")
    known = find_model(model)
    known.check_quantize(quantize, quantize_head)
    runner = abstract_runner(
        known.config.with_expert_parallel(expert_parallel),
        topology,
        topology.devices_of_meshes(tp, dp, pp),
        dtype,
        pp=pp,
        max_model_len=max_model_len,
        max_slots=batch,
        quantize=quantize,
        attention=attention,
        kv_dtype=kv_dtype,
        quantize_head=quantize_head,
        format_of=known.format_of,
    )
    limits = runner.limits
    chunks = next(shape for shape in limits.chunk_shapes if shape.tokens >= prompt_len)
    longest = min(context, limits.max_model_len)
    decode = ProgramSpec.decode(runner.decode_shapes_for([longest] * limits.max_rows)[0], greedy=True)
    prefill = ProgramSpec("step", 0, chunks, greedy=True)
    return TopologyReport(
        model=model,
        topology=topology.name,
        tp=[stage.mesh.size for stage in runner.stages] if pp > 1 else runner.mesh.size,
        dp=dp,
        pp=pp,
        layers=[(stage.layers.start, stage.layers.stop) for stage in runner.stages] if pp > 1 else [],
        dtype=str(runner.dtype),
        quantize=quantize,
        kv_dtype=kv_dtype,
        attention=str(runner.backend),
        memory_bytes=topology.memory_bytes,
        programs=[
            compile_program(stage, topology, name, spec, context if name == "decode" else 0)
            for stage in runner.stages
            for name, spec in (("decode", decode), ("prefill", prefill))
        ],
    )


def abstract_runner(
    config: ModelConfig,
    topology: Topology,
    tp: int | Sequence[int] | None = None,
    dtype: str = "auto",
    *,
    max_model_len: int | None = None,
    max_slots: int = STEP_BATCH,
    sequence_parallel: SequenceParallel = "auto",
    quantize: Quantize | None = None,
    attention: AttentionBackend = "auto",
    kv_dtype: KVDtype = "auto",
    pp: int = 1,
    quantize_head: bool = False,
    format_of: FormatOf | None = None,
) -> Runner:
    """Makes a runner whose programs can be lowered and compiled for a topology, not run.

    If the model does not fit, its cache has the size that it would have without a memory limit.
    """
    meshes, kind = topology.meshes(tp, pp), resolve_dtype("bfloat16" if dtype == "auto" else dtype)
    tps = [mesh.size for mesh in meshes]
    check_quantize(quantize)
    check_choice("kv_dtype", kv_dtype, KVDtype)
    device = meshes[0].devices.flat[0]
    backends = [
        choose_backend(attention, device, KernelShape.of(config, tp, kind, PAGE_SIZE, kv_dtype)) for tp in tps
    ]
    layers = layer_split.split_layers(
        config, tps, itemsizes(kind, quantize, kv_dtype), topology.hardware.device
    )
    stages = AbstractStages(
        config, meshes, layers, backends, kind, quantize, quantize_head, format_of, kv_dtype
    )
    platform = device.platform
    memory = DeviceMemory(int(topology.memory_bytes * USABLE_MEMORY), platform=platform)
    try:
        sizes = stages.limits(memory, max_model_len, max_slots)
    except ConfigError:  # what else is wrong with the sizes is raised again
        longest = max_model_len or min(config.longest_context, DEFAULT_CONTEXT)
        sizes = stages.limits(None, longest, max_slots)
    # several decode steps of one dispatch would be a loop: here one step is looked at
    return Runner.of_stages(
        stages.decoders, meshes, replace(sizes, steps=1), kind, sequence_parallel, kv_dtype=kv_dtype
    )


def compile_program(
    stage: Stage, topology: Topology, name: str, spec: ProgramSpec, context: int = 0
) -> ProgramReport:
    """Compiles a program and reports what it does.

    Args:
        stage: a runner made by :func:`abstract_runner`, or a stage of it.
        topology: the topology it was made for.
        name: name in the report.
        spec: the program, of the last stage; it is compiled what this stage runs for it.
        context: tokens in the cache of each sequence, for the time estimate.
    """
    config = stage.own_config
    state = stage.abstract_state()
    cache = jax.tree.leaves(state.cache)
    model = stage.abstract_model()
    weights = [
        jax.ShapeDtypeStruct(p.layout.shape, p.dtype, sharding=p.sharding)
        for p in parameters(model, stage.mesh)
    ]
    predicted = sum(_bytes(leaf, topology.is_tpu) for leaf in (*weights, *jax.tree.leaves(state)))
    residual = stage.programs.residual_spec(spec)
    tokens = padded_tokens(spec.tokens, residual, stage.mesh.size)
    batch, length = (spec.batch, 1) if spec.chunks is None else (1, tokens)
    budget = collective_budget(
        config,
        stage.mesh.size,
        tokens=tokens,
        rows=spec.sampled_rows,
        itemsize=stage.dtype.itemsize,
        sequence_parallel=residual == SEQUENCE_PARALLEL,
        greedy=spec.greedy,
        platform="tpu" if topology.is_tpu else "gpu",
        embeds=stage.is_first,
        samples=stage.is_last,
        hands_on_whole=stage.hands_on_whole(spec),
    )
    started = time.perf_counter()
    compile_error, compiled = "", None
    try:
        with warnings.catch_warnings():
            # jax's cache stores programs of chips that are not here, and cannot read them: they compile again
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
            compiled = stage.program(stage.own(spec))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compile_error = str(error).strip().splitlines()[0]
    program = ProgramReport(
        name=name,
        batch=batch,
        length=length,
        budget=budget,
        compile_s=time.perf_counter() - started,
        predicted_bytes=predicted,
        cache_buffers=len(cache),
        compile_error=compile_error,
    )
    if compiled is None:
        return program
    memory, module = compiled.memory_analysis(), Module(compiled.as_text())
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    first = len(weights)  # arguments: the weights, then the state, the cache first
    aliased = {int(n) for n in _ALIAS.findall(module.text.split("entry_computation_layout", 1)[0])}
    copies, collectives = copied_arrays(module), find_collectives(module)
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
            config,
            topology,
            tp=stage.mesh.size,
            itemsizes=_itemsizes(stage),
            batch=batch,
            length=length,
            context=min(context, stage.limits.max_model_len),
            page_size=stage.limits.page_size,
            caches=caches,
            samples=stage.is_last,
            pages_at_once=_pages_at_once(stage, batch),
            kernel_work=_kernel_work(stage, spec, context),
        )
        if topology.is_tpu
        else None,
    )


class _Heads(NamedTuple):
    """Attention on one device: KV heads, query heads of each, and widths as ``tpu.work`` takes them."""

    heads: int
    per_head: int
    widths: tuple[int, int]
    value_dim: int


def _heads(stage: Stage) -> _Heads:
    attention, latent = stage.own_config.attention, stage.own_config.attention.latent
    plan = head_plan(stage.own_config, stage.mesh.size)
    if latent is None:
        width = attention.head_dim
        return _Heads(plan.head_slots_per_device, plan.group_size, (width, width), width)
    width, query_heads = latent.kv_lora_rank + stage.own_config.rotated_dim, plan.head_slots_per_device
    # one latent for all heads, which holds key and value
    return _Heads(1, query_heads * plan.group_size, (width, 0), latent.kv_lora_rank)


def _pages_at_once(stage: Stage, batch: int) -> int:
    """Returns the pages of a sequence that one trip of the page walk of decode rows reads."""
    heads, _, widths, value_dim = _heads(stage)
    limits = stage.limits
    page_bytes = heads * (widths[0] + value_dim) * limits.page_size * stage.dtype.itemsize
    return pages_at_once(stage.backend.walk_pages, batch * page_bytes, limits.blocks)


def _itemsizes(stage: Stage) -> Itemsizes:
    """Returns the bytes of an element of the weights, as they are kept, and of activations and cache."""
    config, tp = stage.own_config, stage.mesh.size
    held = Counts("", config).on_device(tp, config.moe.sharded_axis(tp) if config.moe else "width")
    return stored_itemsizes(held, stage.dtype, parameters(stage.abstract_model(), stage.mesh), stage.kv_dtype)


def _kernel_work(stage: Stage, spec: ProgramSpec, context: int) -> list[Work]:
    """Returns what the attention kernels of a program do on one device, call by call.

    Args:
        stage: the stage.
        spec: the program. Its prompt chunks are the beginning of one prompt.
        context: tokens in the cache of each decoded sequence.
    """
    if stage.backend.name != "tpu":
        return []
    attention, limits, calls = stage.own_config.attention, stage.limits, []
    heads, per_head, widths, value_dim = _heads(stage)
    for kind in attention.layer_types:
        call = partial(
            work,
            window=attention.window_of(kind),
            heads=heads,
            per_head=per_head,
            page_size=limits.page_size,
            widths=widths,
            value_dim=value_dim,
            dtype=stage.dtype,
            kv_dtype=stage.kv_dtype,
        )
        if spec.batch:
            calls.append(call(spec.batch, 1, min(context, limits.max_model_len)))
        if spec.chunks:
            ends = range(spec.chunks.length, spec.chunks.tokens + 1, spec.chunks.length)
            rows = [call(1, spec.chunks.length, end) for end in ends]
            calls.append(Work(*map(sum, zip(*rows, strict=True))))
    return calls


def _shard(array: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Returns the dimensions on one device in the form of :attr:`Array.sizes`."""
    return tuple(sorted(size for size in array.sharding.shard_shape(array.shape) if size > 1))


def _bytes(array: jax.ShapeDtypeStruct, tiled: bool) -> int:
    """Returns the bytes of an array on one device, tiled as on a TPU or not."""
    dims: tuple[int, ...] = array.sharding.shard_shape(array.shape)
    bits = dtype_bits(array.dtype)
    if not tiled:
        return math.prod(dims) * bits // 8
    layout = array.format.layout
    if layout is not None:
        dims = tuple(dims[axis] for axis in layout.major_to_minor)
    return tpu_array(f"u{bits}", dims, fixed=layout is not None).bytes
