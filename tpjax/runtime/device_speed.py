"""The figures of the device that a model runs on: published ones of a known chip, or measured ones."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import compress
from operator import not_

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tpjax.cache_quantization import element_bytes, scale_bytes
from tpjax.checkpoints.parameters import Parameter
from tpjax.config import KVDtype, ModelConfig, Quantize
from tpjax.hardware import Efficiency, Hardware, known_device
from tpjax.interconnect import Measured
from tpjax.layers.weights import FORMATS, dtype_bits
from tpjax.runtime import layer_split
from tpjax.runtime.counts import Counts
from tpjax.step_time import Elements, Itemsizes, StepTime

_WIDTH = 2048  # of a square weight: 16 MB in float32, more than a core's caches hold
_TOKENS = 128
_ROUNDS = 5
_MEASURED = Efficiency(
    weights=1.0,
    low_precision_weights=1.0,
    cache=1.0,
    compute=1.0,
    low_precision_compute=1.0,
    layer_us=0.0,
    expert_us=0.0,
)


def step_time(
    config: ModelConfig,
    mesh: Mesh,
    dtype: jnp.dtype,
    declared: Iterable[Parameter] = (),
    kv_dtype: KVDtype = "auto",
) -> StepTime:
    """Returns what predicts the steps of a model on a mesh.

    Args:
        config: the architecture.
        mesh: ``("tp",)``.
        dtype: dtype of activations, and of weights that are not quantised.
        declared: the model's parameters: those of 8 or 4 bits count as they are stored, with their scales.
        kv_dtype: what keys and values are kept in; ``auto``: ``dtype``.
    """
    share = Counts(config.model_type, config).share(
        mesh.size, config.moe.sharded_axis(mesh.size) if config.moe else "width"
    )
    hardware = device_hardware(mesh.devices.flat[0], dtype)
    return StepTime(share, hardware, stored_itemsizes(share.held, dtype, declared, kv_dtype))


def stored_itemsizes(
    held: Elements, dtype: jnp.dtype, declared: Iterable[Parameter], kv_dtype: KVDtype = "auto"
) -> Itemsizes:
    """Returns the mean bytes of an element: of layers' matrices, of experts, of the head, and of all else.

    Args:
        held: elements on a device, of the mesh of the first of these parameters.
        dtype: dtype of what is not quantised.
        declared: the parameters of the model, or of all its stages.
        kv_dtype: what keys and values are kept in; ``auto``: ``dtype``.
    """
    itemsize = jnp.dtype(dtype).itemsize
    quantized = [one for one in declared if one.quantized is not None]

    def share(one: Parameter) -> float:
        """Returns the devices that have a parameter, over those of the first: stages may have others."""
        return one.sharding.mesh.size / quantized[0].sharding.mesh.size

    def mean(elements: int, parts: Iterable[Parameter]) -> float:
        parts = list(parts)
        values = sum(
            share(one) * math.prod(one.sharding.shard_shape(one.layout.shape))
            for one in parts
            if one.is_quantized
        )
        stored = sum(share(one) * one.bytes_per_device for one in parts)
        return (stored + (elements - values) * itemsize) / elements

    of_layers = [one for one in quantized if one.path[0] == "layers"]
    routed = [one.path[3] == "experts" for one in of_layers]
    name = "lm_head" if held.head else "embed_tokens"
    of_head = {one.path: one for one in quantized if one.path[0] == name}  # a last stage may have a copy
    weights = mean(held.attention + held.mlp, compress(of_layers, map(not_, routed)))
    experts = mean(held.experts, compress(of_layers, routed)) if held.experts else None
    head = mean(held.head or held.embedding, of_head.values()) if of_head else None
    return replace(itemsizes(dtype, None, kv_dtype), weights=weights, head=head, experts=experts)


def split_layers(
    config: ModelConfig,
    meshes: Sequence[Mesh],
    dtype: jnp.dtype,
    quantize: Quantize | None = None,
    kv_dtype: KVDtype = "auto",
) -> tuple[range, ...]:
    """Returns the layers of the stages on these meshes: see :mod:`tpjax.runtime.layer_split`.

    What is measured of a device that is not known does not count: the split is the same at every start.

    Raises:
        ConfigError: there are more stages than layers.
    """
    known = known_device(meshes[0].devices.flat[0].device_kind)
    sizes = itemsizes(dtype, quantize, kv_dtype)
    return layer_split.split_layers(config, [mesh.size for mesh in meshes], sizes, known)


def itemsizes(dtype: jnp.dtype, quantize: Quantize | None, kv_dtype: KVDtype = "auto") -> Itemsizes:
    """Returns the bytes of elements in a model of a dtype, whose matrices and cache may be kept in fewer."""
    itemsize = jnp.dtype(dtype).itemsize
    weights = itemsize if quantize is None else dtype_bits(FORMATS[quantize].values) / 8
    return Itemsizes(weights, itemsize, element_bytes(kv_dtype, dtype), cache_scale=scale_bytes(kv_dtype))


@cache
def device_hardware(device: jax.Device, dtype: jnp.dtype) -> Hardware:
    """Returns the figures of a device; those of a CPU or an unknown chip are measured in about 0.2 s, once.

    Measured are reading a weight, by a product of one token, and multiplying, by a product of 128 tokens.
    Collectives and the fixed cost of a layer are left at zero: a ratio of two steps needs neither exactly.
    ``tpjax.planning.measure`` measures everything, in a minute.

    Args:
        device: a device of the mesh; faked ones share their machine.
        dtype: dtype of the products.
    """
    known = known_device(device.device_kind)
    if known is not None:
        return known
    bandwidth, flops = _measure(device, dtype)
    return Hardware(
        name=device.device_kind,
        memory_bytes=float((device.memory_stats() or {}).get("bytes_limit", 0)),
        bandwidth_bytes_s=bandwidth,
        flops=flops,
        low_precision_flops=None,
        interconnect=Measured(((1.0, 0.0),)),
        efficiency=_MEASURED,
        source="measured on this machine",
        shared=device.platform == "cpu",
    )


def _measure(device: jax.Device, dtype: jnp.dtype) -> tuple[float, float]:
    """Measures the bytes a second of reading a weight, and the FLOPs a second of multiplying by it."""
    weight = jax.device_put(np.full((_WIDTH, _WIDTH), 1e-3, dtype), device)
    product = jax.jit(jnp.dot)

    def best_s(tokens: int) -> float:
        x = jax.device_put(np.ones((tokens, _WIDTH), dtype), device)
        call = product.lower(x, weight).compile()
        times = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            call(x, weight).block_until_ready()
            times.append(time.perf_counter() - start)
        return min(times)

    return weight.nbytes / best_s(1), 2 * _TOKENS * weight.size / best_s(_TOKENS)
