"""Compiles the serving programs for chips that are not here, and reads what the compiler made of them."""

from __future__ import annotations

import math
import re
import time
import warnings
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax

from tpjax.attention import KernelShape, choose_backend
from tpjax.attention.tpu import Work, work
from tpjax.attention.xla import pages_at_once
from tpjax.checkpoints.hub import resolve
from tpjax.checkpoints.load import abstract_decoder, check_quantize, parameters, read_config
from tpjax.config import AttentionBackend, ExpertParallel, ModelConfig, Quantize, SequenceParallel
from tpjax.errors import ConfigError
from tpjax.hardware import USABLE_MEMORY
from tpjax.inspect.budget import collective_budget
from tpjax.inspect.collectives import find_collectives, summarise
from tpjax.inspect.copies import copied_arrays, write_backs
from tpjax.inspect.estimate import estimate
from tpjax.inspect.hlo import Module, tpu_array
from tpjax.inspect.topology import Topology
from tpjax.inspect.topology_report import ProgramReport, TopologyReport
from tpjax.layers.weights import dtype_bits
from tpjax.old_spellings import accepts_old_spellings
from tpjax.planning.published import is_published, published_config
from tpjax.planning.workload import DEFAULT_CONTEXT, STEP_BATCH, STEP_PROMPT_LEN
from tpjax.runtime.limits import MAX_PROMPT_TOKENS, PAGE_SIZE, Limits, resolve_dtype
from tpjax.runtime.memory import DeviceMemory, plan_limits
from tpjax.runtime.programs import ProgramSpec
from tpjax.runtime.runner import Runner
from tpjax.runtime.steps import padded_tokens
from tpjax.sharding import SEQUENCE_PARALLEL, head_plan

_ALIAS = re.compile(r"\{\d*\}: \((\d+), \{\}")


@accepts_old_spellings
def explain_topology(
    model: str,
    topology: Topology,
    tp: int | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    expert_parallel: ExpertParallel = "auto",
    context: int = DEFAULT_CONTEXT,
    batch: int = STEP_BATCH,
    prompt_len: int = STEP_PROMPT_LEN,
    quantize: Quantize | None = None,
    attention: AttentionBackend = "auto",
    dp: int = 1,
) -> TopologyReport:
    """Compiles a model's decode and prefill steps for chips that are not here, from shapes alone.

    A program that does not fit the chips is compiled too, unless the compiler fails.

    Args:
        model: a name or path that ``LLM`` accepts, the name of a published model, or a ``config.json``.
        topology: the chips.
        tp: number of devices; ``None``: all of them.
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

    Raises:
        TpjaxError: the model is not supported, or its programs cannot be compiled here.
    """
    for name, number in (("context", context), ("batch", batch), ("prompt_len", prompt_len)):
        if number < 1:
            raise ConfigError(f"{name}={number} is less than 1")
    if prompt_len > MAX_PROMPT_TOKENS:
        raise ConfigError(f"prompt_len={prompt_len} is more than the {MAX_PROMPT_TOKENS} tokens of a step")
    if is_published(model):
        config = published_config(model)
    else:
        config = read_config(resolve(model, configuration=True))
    runner = abstract_runner(
        config.with_expert_parallel(expert_parallel),
        topology,
        topology.devices_of_replica(tp, dp),
        dtype,
        max_model_len=max_model_len,
        max_slots=batch,
        quantize=quantize,
        attention=attention,
    )
    limits = runner.limits
    chunks = next(shape for shape in limits.chunk_shapes if shape.tokens >= prompt_len)
    decode = ProgramSpec("decode", limits.max_slots, greedy=True)
    prefill = ProgramSpec("step", 0, chunks, greedy=True)
    return TopologyReport(
        model=model,
        topology=topology.name,
        tp=runner.mesh.size,
        dp=dp,
        dtype=str(runner.dtype),
        quantize=quantize,
        attention=str(runner.backend),
        memory_bytes=topology.memory_bytes,
        programs=[
            compile_program(runner, topology, "decode", decode, context),
            compile_program(runner, topology, "prefill", prefill),
        ],
    )


def abstract_runner(
    config: ModelConfig,
    topology: Topology,
    tp: int | None = None,
    dtype: str = "auto",
    *,
    max_model_len: int | None = None,
    max_slots: int = STEP_BATCH,
    sequence_parallel: SequenceParallel = "auto",
    quantize: Quantize | None = None,
    attention: AttentionBackend = "auto",
) -> Runner:
    """Makes a runner whose programs can be lowered and compiled for a topology, not run.

    If the model does not fit, its cache has the size that it would have without a memory limit.
    """
    mesh, kind = topology.mesh(tp), resolve_dtype("bfloat16" if dtype == "auto" else dtype)
    check_quantize(quantize)
    backend = choose_backend(
        attention, mesh.devices.flat[0], KernelShape.of(config, mesh.size, kind, PAGE_SIZE)
    )
    decoder = abstract_decoder(config, mesh, kind, quantize, backend)

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
    # several decode steps of one dispatch would be a loop: here one step is looked at
    return Runner(decoder, mesh, replace(sizes, steps=1), kind, sequence_parallel)


def compile_program(
    runner: Runner, topology: Topology, name: str, spec: ProgramSpec, context: int = 0
) -> ProgramReport:
    """Compiles a program of a runner and reports what it does.

    Args:
        runner: a runner made by :func:`abstract_runner`.
        topology: the topology it was made for.
        name: name in the report.
        spec: the program.
        context: tokens in the cache of each sequence, for the time estimate.
    """
    state = runner.abstract_state()
    cache = jax.tree.leaves(state.cache)
    model = runner.abstract_model()
    weights = [
        jax.ShapeDtypeStruct(p.layout.shape, p.dtype, sharding=p.format)
        for p in parameters(model, runner.mesh)
    ]
    predicted = sum(_bytes(leaf, topology.is_tpu) for leaf in (*weights, *jax.tree.leaves(state)))
    residual = runner.programs.residual_spec(spec)
    tokens = padded_tokens(spec.tokens, residual, runner.mesh.size)
    batch, length = (spec.batch, 1) if spec.chunks is None else (1, tokens)
    budget = collective_budget(
        runner.config,
        runner.mesh.size,
        tokens=tokens,
        rows=spec.sampled_rows,
        itemsize=runner.dtype.itemsize,
        sequence_parallel=residual == SEQUENCE_PARALLEL,
        greedy=spec.greedy,
        platform="tpu" if topology.is_tpu else "gpu",
    )
    started = time.perf_counter()
    compile_error, compiled = "", None
    try:
        with warnings.catch_warnings():
            # jax's cache stores programs of chips that are not here, and cannot read them: they compile again
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
            compiled = runner.program(spec)
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
            collectives,
            runner.config,
            topology,
            tp=runner.mesh.size,
            dtype=str(runner.dtype),
            quantize=model.quantize,
            batch=batch,
            length=length,
            context=min(context, runner.limits.max_model_len),
            page_size=runner.limits.page_size,
            caches=caches,
            pages_at_once=_pages_at_once(runner, batch),
            kernel_work=_kernel_work(runner, spec, context),
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


def _heads(runner: Runner) -> _Heads:
    attention, latent = runner.config.attention, runner.config.attention.latent
    plan = head_plan(runner.config, runner.mesh.size)
    if latent is None:
        width = attention.head_dim
        return _Heads(plan.head_slots_per_device, plan.group_size, (width, width), width)
    width, query_heads = latent.kv_lora_rank + runner.config.rotated_dim, plan.head_slots_per_device
    # one latent for all heads, which holds key and value
    return _Heads(1, query_heads * plan.group_size, (width, 0), latent.kv_lora_rank)


def _pages_at_once(runner: Runner, batch: int) -> int:
    """Returns the pages of a sequence that one trip of the page walk of decode rows reads."""
    heads, _, widths, value_dim = _heads(runner)
    limits = runner.limits
    page_bytes = heads * (widths[0] + value_dim) * limits.page_size * runner.dtype.itemsize
    return pages_at_once(runner.backend.walk_pages, batch * page_bytes, limits.blocks)


def _kernel_work(runner: Runner, spec: ProgramSpec, context: int) -> list[Work]:
    """Returns what the attention kernels of a program do on one device, call by call.

    Args:
        runner: the runner.
        spec: the program. Its prompt chunks are the beginning of one prompt.
        context: tokens in the cache of each decoded sequence.
    """
    if runner.backend.name != "tpu":
        return []
    attention, limits, calls = runner.config.attention, runner.limits, []
    heads, per_head, widths, value_dim = _heads(runner)
    for kind in attention.layer_types:
        call = partial(
            work,
            window=attention.window_of(kind),
            heads=heads,
            per_head=per_head,
            page_size=limits.page_size,
            widths=widths,
            value_dim=value_dim,
            itemsize=runner.dtype.itemsize,
        )
        if spec.batch:
            calls.append(call(spec.batch, 1, min(context, limits.max_model_len)))
        if spec.chunks and attention.latent is None:  # chunks of latents take the page walk
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
