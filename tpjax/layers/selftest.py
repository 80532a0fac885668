"""Holds the kernel of quantised products to the definition on the chip that it is to run on, and times it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from tpjax.attention import XLA, Backend, Verdict
from tpjax.attention.selftest import kept_verdict, time_ms
from tpjax.layers import widening
from tpjax.layers.linear import dot
from tpjax.layers.weights import QuantizedWeight

_TOKENS, _INPUTS, _OUTPUTS, _GROUP = 48, 1024, 640, 128
_ALLOWED = 0.02  # largest difference, of outputs of about 1


def product_verdict(backend: Backend, device: jax.Device, folder: Path) -> Verdict:
    """Checks the kernel of products with scales for groups, or returns what an earlier check found.

    Args:
        backend: ``tpu`` or ``gpu``.
        device: a device of the mesh.
        folder: where verdicts are kept.
    """
    source = Path(__file__).with_name(f"quantized_{backend.name}.py").read_bytes()
    about = {"kernel": hashlib.sha256(source).hexdigest(), "shape": "product"}
    return kept_verdict(about, device, folder, lambda: _check(backend, device))


def _check(backend: Backend, device: jax.Device) -> Verdict:
    """Computes a product in int4 and in float8 by the kernel, by XLA and in float32."""
    rng, error, kernel_ms, xla_ms = np.random.default_rng(0), 0.0, 0.0, 0.0
    first = backend.name == "gpu"  # outputs first
    with jax.default_device(device):
        x = jnp.asarray(rng.normal(size=(_TOKENS, _INPUTS)) / 32, jnp.bfloat16)
        for kind in (jnp.int4, jnp.float8_e4m3fn):
            values = jnp.asarray(rng.integers(-8, 8, (_INPUTS, _OUTPUTS)), jnp.int8).astype(kind)
            scales = jnp.asarray(rng.uniform(0.1, 0.4, (_INPUTS // _GROUP, _OUTPUTS)), jnp.bfloat16)
            wide = values.astype(jnp.float32) * jnp.repeat(scales.astype(jnp.float32), _GROUP, axis=0)
            with jax.default_matmul_precision("highest"):
                expected = x.astype(jnp.float32) @ wide
            stored = (values.T, scales.T) if first else (values, scales)
            weight = QuantizedWeight(*stored, None, PartitionSpec(), -1 if first else -2, backend)
            subscripts = "...i,oi->...o" if first else "...i,io->...o"
            by_xla = partial(dot, weight=replace(weight, backend=XLA), subscripts=subscripts)
            kernel: Any = partial(widening.product_on_gpu, scaled=True) if first else widening.product_on_tpu
            found = jax.jit(partial(kernel, dtype=jnp.float32))(x, weight)
            difference = float(jnp.max(jnp.abs(found - expected)))
            error = max(error, difference if np.isfinite(difference) else np.inf)
            kernel_ms += time_ms(partial(kernel, dtype=jnp.bfloat16), x, weight)
            xla_ms += time_ms(by_xla, x)
    return Verdict(device.device_kind, error, _ALLOWED, kernel_ms, xla_ms, "XLA's product")
