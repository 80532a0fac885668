"""Holds the kernels of products to the definition on the chip that they are to run on, and times them.

They are those of weights with scales for groups of inputs, and of routed experts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from tpjax.attention import XLA, Backend, Verdict
from tpjax.attention.selftest import called, kept_verdict, time_ms
from tpjax.layers import widening
from tpjax.layers.experts import Matrices
from tpjax.layers.linear import dot, grouped_dot
from tpjax.layers.weights import QuantizedWeight

_INPUTS, _OUTPUTS = 1024, 640
_ALLOWED = 0.02  # largest difference, of outputs of about 1
_EXPERTS, _CHOSEN = 12, 8  # experts, of which so many have rows
_EXPERTS_TOKENS = 4, 40, 600  # all in each tile, tiles of some of them, tiles as large as there are
_LARGE = 2048  # of a matrix: a larger one is checked at about this size, with as much in its last block


class _Case(NamedTuple):
    """A product; kernels compute those of other values, groups, zero points and tokens in other ways."""

    values: Any
    group: int = 128
    zeros: bool = False
    tokens: int = 48


_TIMED = _Case(jnp.int4), _Case(jnp.float8_e4m3fn)
_UNTIMED = _Case(jnp.int8, 32, zeros=True), _Case(jnp.int4, tokens=136), _Case(jnp.int4, 64)


def product_verdict(backend: Backend, device: jax.Device, folder: Path) -> Verdict:
    """Checks the kernel of products with scales for groups, or returns what an earlier check found.

    Args:
        backend: ``tpu`` or ``gpu``.
        device: a device of the mesh.
        folder: where verdicts are kept.
    """
    what = f"{backend.name} products with scales for groups"
    return kept_verdict(what, {}, device, folder, lambda: _check(backend, device))


def experts_verdict(backend: Backend, matrices: Matrices, device: jax.Device, folder: Path) -> Verdict:
    """Checks the kernel of routed experts, or returns what an earlier check found.

    Args:
        backend: ``gpu``.
        matrices: of an expert.
        device: a device of the mesh.
        folder: where verdicts are kept.
    """
    what, shape = f"{backend.name} products of experts", matrices._asdict()
    return kept_verdict(what, shape, device, folder, lambda: _check_experts(backend, matrices, device))


def _checked(size: int) -> int:
    return size if size <= _LARGE else _LARGE + size % 128


def _check(backend: Backend, device: jax.Device) -> Verdict:
    """Computes products by the kernel and in float32, and times some beside XLA's."""
    rng, error, kernel_ms, xla_ms = np.random.default_rng(0), 0.0, 0.0, 0.0
    first = backend.name == "gpu"  # outputs first
    with jax.default_device(device):
        for case in (*_TIMED, *_UNTIMED):
            x = jnp.asarray(rng.normal(size=(case.tokens, _INPUTS)) / 32, jnp.bfloat16)
            most = 4 if case.zeros else 8  # outputs are as large
            values = jnp.asarray(rng.integers(-most, most, (_INPUTS, _OUTPUTS)), jnp.int8)
            of_groups = _INPUTS // case.group, _OUTPUTS
            scales = jnp.asarray(rng.uniform(0.05, 0.2, of_groups), jnp.bfloat16)
            zeros = jnp.asarray(rng.integers(-most, most, of_groups), jnp.int8) if case.zeros else None
            wide = values.astype(jnp.float32)
            if zeros is not None:
                wide = wide - jnp.repeat(zeros.astype(jnp.float32), case.group, axis=0)
            wide = wide * jnp.repeat(scales.astype(jnp.float32), case.group, axis=0)
            with jax.default_matmul_precision("highest"):
                expected = x.astype(jnp.float32) @ wide
            weight = QuantizedWeight(values.astype(case.values), scales, zeros, PartitionSpec(), -2, backend)
            if first:
                weight = replace(jax.tree.map(jnp.transpose, weight), inputs=-1)
            kernel: Any = partial(widening.product_on_gpu, scaled=True) if first else widening.product_on_tpu
            found = called(jax.jit(partial(kernel, dtype=jnp.float32)), x, weight)
            difference = float(jnp.max(jnp.abs(found - expected)))
            error = max(error, difference if np.isfinite(difference) else np.inf)
            if case in _TIMED:
                subscripts = "...i,oi->...o" if first else "...i,io->...o"
                by_xla = partial(dot, weight=replace(weight, backend=XLA), subscripts=subscripts)
                kernel_ms += time_ms(partial(kernel, dtype=jnp.bfloat16), x, weight)
                xla_ms += time_ms(by_xla, x)
    return Verdict(device.device_kind, error, _ALLOWED, kernel_ms, xla_ms, "XLA's product")


def _check_experts(backend: Backend, matrices: Matrices, device: jax.Device) -> Verdict:
    """Computes the products of an expert's matrices, each token by two experts.

    Few tokens by both, as a decode step has them, more by the first alone: compiling takes most of the time.
    """
    from tpjax.layers import experts_gpu

    rng, error, kernel_ms, xla_ms = np.random.default_rng(0), 0.0, 0.0, 0.0

    def by_kernel(x: jax.Array, weights: jax.Array, assigned: jax.Array) -> jax.Array:
        tiles = experts_gpu.lay_out(assigned, _EXPERTS)
        out = experts_gpu.grouped_product(tiles.take(x), weights, tiles, interpret=backend.interpret)
        return out[tiles.places]

    def by_xla(x: jax.Array, weights: jax.Array, assigned: jax.Array) -> jax.Array:
        flat = assigned.reshape(-1)
        order, sizes = jnp.argsort(flat), jnp.zeros(_EXPERTS, jnp.int32).at[flat].add(1)
        return grouped_dot(x[order // assigned.shape[1]], weights, sizes)

    with jax.default_device(device):
        hidden, width = _checked(matrices.hidden), matrices.width
        gate_up, down = (
            _random_experts(number, *shape, jnp.dtype(matrices.dtype))
            for number, shape in enumerate(((hidden, _checked(2 * width)), (_checked(width), hidden)))
        )
        few, *more = _EXPERTS_TOKENS
        for weights, count in ((gate_up, few), (down, few), *((gate_up, count) for count in more)):
            x = jnp.asarray(rng.normal(size=(count, weights.shape[1])) / 4, weights.dtype)
            assigned = np.stack([rng.permutation(_CHOSEN)[:2] for _ in range(count)])
            with jax.default_matmul_precision("highest"):
                every = jnp.einsum("nd,edf->nef", *(one.astype(jnp.float32) for one in (x, weights)))
            expected = jnp.take_along_axis(every, jnp.asarray(assigned)[..., None], axis=1)
            arguments = x, weights, jnp.asarray(assigned, jnp.int32)
            found = called(jax.jit(by_kernel), *arguments).astype(jnp.float32)
            difference = float(jnp.max(jnp.abs(found - expected)))
            error = max(error, difference if np.isfinite(difference) else np.inf)
            if count == few:
                kernel_ms += time_ms(by_kernel, *arguments)
                xla_ms += time_ms(by_xla, *arguments)
    return Verdict(device.device_kind, error, _ALLOWED, kernel_ms, xla_ms, "XLA's grouped product")


def _random_experts(number: int, inputs: int, outputs: int, dtype: jnp.dtype) -> jax.Array:
    """Returns weights, of which those of experts without rows are not numbers: they are not read."""
    weights = jax.random.normal(jax.random.key(number), (_EXPERTS, inputs, outputs), dtype)
    return (weights * inputs**-0.5).at[_CHOSEN:].set(jnp.nan)
