"""Loads a model: chooses what computes its attention and the sizes that fit, reads weights, makes engines."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tpjax.attention import Backend, KernelShape, Verdict, choose_backend
from tpjax.checkpoints.hub import cache_dir
from tpjax.checkpoints.load import load_replicas
from tpjax.checkpoints.opening import Checkpoint
from tpjax.config import AttentionBackend, KVDtype, Quantize, SequenceParallel
from tpjax.engine.engine import Engine
from tpjax.layers.experts import Matrices, expert_matrices
from tpjax.runtime.abstract_stages import AbstractStages
from tpjax.runtime.device_speed import split_layers, step_time
from tpjax.runtime.limits import PAGE_SIZE
from tpjax.runtime.role import Role
from tpjax.runtime.runner import Runner

log = logging.getLogger(__name__)

# Time per token in 16 bits over float32: SmolLM2-135M at tp=1 on 2 cores (AMD EPYC, shared with other work),
# 64 tokens from position 100 in dispatches of 4 steps, contenders in turns. Medians of 7 rounds: bfloat16
# 4.08 (3.35 to 4.46), float16 4.09 (3.16 to 5.04). Prefill of 256 tokens: 1.78 and 2.06.
_CPU_HALF_PRECISION_SLOWDOWN = 4


def load_engines(
    checkpoint: Checkpoint,
    meshes: Sequence[Sequence[Mesh]],
    role: Role,
    dtype: jnp.dtype,
    *,
    attention: AttentionBackend,
    max_model_len: int | None,
    max_slots: int | None,
    quantize: Quantize | None,
    quantize_head: bool,
    kv_dtype: KVDtype,
    sequence_parallel: SequenceParallel,
    max_num_batched_tokens: int | None,
) -> list[Engine]:
    """Loads a checkpoint onto the devices of all replicas; returns their engines.

    Args:
        checkpoint: the checkpoint.
        meshes: for each replica those of its stages.
        role: the part of this process, which has joined the others.
        dtype: of activations and cache, and of weights that are not quantised.
        attention: as ``LLM`` takes it, and so the others.
        max_model_len: longest sequence, tokens.
        max_slots: sequences decoded at once.
        quantize: what weights are rounded to.
        quantize_head: whether embedding and head are too.
        kv_dtype: what keys and values are kept in.
        sequence_parallel: whether prefill shards the residual over positions.
        max_num_batched_tokens: tokens of a step.

    Raises:
        TpjaxError: the model does not fit, or the checkpoint is invalid.
    """
    config, format_of, first = checkpoint.config, checkpoint.source.format_of, meshes[0]
    device = first[0].devices.flat[0]
    grouped = quantize == "int4" or (quantize is None and format_of is not None)
    shapes = [KernelShape.of(config, mesh.size, dtype, PAGE_SIZE, kv_dtype) for mesh in first]
    experts = [None if quantize else expert_matrices(config, mesh.size, dtype) for mesh in first]
    memory, backends = role.decide(
        lambda: choose_backends(attention, shapes, experts, first[0].local_devices[0], grouped=grouped)
    )
    for backend in dict.fromkeys(backends):
        log.info("attention: %s", backend)
    if dtype.itemsize < 4 and device.platform == "cpu":
        log.warning(
            "dtype=%s is slow on a CPU: SmolLM2-135M takes %d times as long per token as in float32",
            dtype,
            _CPU_HALF_PRECISION_SLOWDOWN,
        )
    layers = split_layers(config, first, dtype, quantize, kv_dtype)
    stages = AbstractStages(
        config, first, layers, backends, dtype, quantize, quantize_head, format_of, kv_dtype
    )
    rounded = quantize is not None or checkpoint.quantization is not None
    limits = stages.limits(memory, max_model_len, max_slots, may_quantize=not rounded)
    predicted = None
    if role.follower is None:  # it schedules none
        declared = [parameter for stage in stages.parameters for parameter in stage]
        predicted = step_time(config, first[0], dtype, declared, kv_dtype)
    abstract = [stages.decoders, *(replace(stages, meshes=others).decoders for others in meshes[1:])]
    return [
        Engine(
            Runner.of_stages(models, own, limits, dtype, sequence_parallel, role.leader, kv_dtype),
            max_num_batched_tokens,
            predicted,
        )
        for models, own in zip(load_replicas(checkpoint, abstract, meshes), meshes, strict=True)
    ]


def choose_backends(
    asked: AttentionBackend,
    shapes: Sequence[KernelShape],
    experts: Sequence[Matrices | None],
    device: jax.Device,
    *,
    grouped: bool,
) -> list[Backend]:
    """Chooses what computes attention in each stage; checks the platform's kernels once on each chip.

    Who asks for a kernel of attention gets that unchecked. Nobody asks for those of products: they are
    checked wherever they are compiled.

    Args:
        asked: the user's choice.
        shapes: what a kernel would compute in each stage.
        experts: the matrices of routed experts on a device of each, if these are of 16 bits.
        device: a device of this process.
        grouped: whether weights may have scales for groups of inputs, whose product is a kernel's then.
    """
    folder = cache_dir() / "attention"

    @functools.cache
    def choose(shape: KernelShape, experts: Matrices | None) -> Backend:
        def verify() -> Verdict:
            from tpjax.attention.selftest import verdict

            return verdict(device.platform, shape, device, folder)

        backend = choose_backend(asked, device, shape, verify)
        if not backend.is_kernel or backend.interpret is not None:
            return backend
        if grouped:
            from tpjax.layers.selftest import product_verdict

            products = product_verdict(backend, device, folder)
            log.info("products of quantised weights: %s", products)
            backend = replace(backend, products=products.use_kernel)
        if backend.name == "gpu" and experts is not None and experts.kernel_takes:
            from tpjax.layers.selftest import experts_verdict

            products = experts_verdict(backend, experts, device, folder)
            log.info("products of routed experts: %s", products)
            backend = replace(backend, experts=products.use_kernel)
        return backend

    return [choose(shape, one) for shape, one in zip(shapes, experts, strict=True)]
