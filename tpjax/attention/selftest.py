"""Holds the TPU kernel to the definition on the chip that it is to run on, and times it beside the page walk.

A kernel that was never run on a kind of chip, by a version of the compiler, may be wrong there, slow, or
hang. So it is used unasked only after this. The verdict is kept in a file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpjax.attention import reference, tpu, xla
from tpjax.attention.backends import Verdict
from tpjax.cache import NULL_PAGE, LatentCache, LatentPages, LayerCache, TokenGroup
from tpjax.config import ModelConfig
from tpjax.sharding import head_plan

log = logging.getLogger(__name__)

_CONTEXT = 1000  # tokens of the longest sequence
_ROWS = 8  # sequences of one token, the last of them padding; prompt chunks take the page walk in any case
_ALLOWED = {"bfloat16": 0.02, "float32": 1e-3}  # largest difference, of outputs of about 1
_CALLS, _ROUNDS = 8, 5
_HANGS_AFTER_S = 60.0  # compiling included


class _Shape(NamedTuple):
    """What of a model the kernel depends on, on one device."""

    heads: int
    per_head: int
    width: int
    value_dim: int
    latent: bool
    windows: tuple[int | None, ...]
    softcap: float | None
    sinks: bool
    page_size: int
    dtype: str


def verdict(
    config: ModelConfig,
    tp: int,
    dtype: jnp.dtype,
    page_size: int,
    device: jax.Device,
    folder: Path,
    *,
    interpret: bool = False,
) -> Verdict:
    """Checks the kernel in the shapes of a model, or returns what an earlier check found.

    Args:
        config: the architecture.
        tp: number of devices.
        dtype: of activations and cache.
        page_size: positions per page.
        device: a device of the mesh.
        folder: where verdicts are kept.
        interpret: interpret the kernel, on a CPU.
    """
    shape = _shape(config, tp, dtype, page_size)
    about = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "compiler": device.client.platform_version,
        "kernel": hashlib.sha256(Path(tpu.__file__).read_bytes()).hexdigest(),
        "shape": shape._asdict(),
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    file = folder / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Verdict(**json.loads(file.read_text())["verdict"])
    with _watchdog(_HANGS_AFTER_S):
        found = _check(shape, device, interpret)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({**about, "verdict": asdict(found)}, indent=1))
        part.replace(file)
    except OSError as error:
        log.warning("what was found of the attention kernel is not kept: %s", error)
    return found


def verdicts(folder: Path) -> list[Verdict]:
    """Returns the verdicts that a folder keeps."""
    found = []
    for file in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append(Verdict(**json.loads(file.read_text())["verdict"]))
    return found


def _shape(config: ModelConfig, tp: int, dtype: jnp.dtype, page_size: int) -> _Shape:
    attention, plan = config.attention, head_plan(config, tp)
    latent, width, value_dim = attention.latent, attention.head_dim, attention.head_dim
    if latent is not None:
        width, value_dim = latent.kv_lora_rank + config.rotated_dim, latent.kv_lora_rank
    windows = dict.fromkeys(attention.window_of(kind) for kind in attention.layer_types)
    return _Shape(
        plan.head_slots_per_device,
        plan.group_size,
        width,
        value_dim,
        latent is not None,
        tuple(windows),
        attention.softcap,
        attention.sinks,
        page_size,
        str(jnp.dtype(dtype)),
    )


@contextlib.contextmanager
def _watchdog(seconds: float) -> Iterator[None]:
    """Ends the process if the block takes longer: nothing else stops a kernel that hangs."""

    def end() -> None:
        sys.stderr.write(
            f"tpjax: error: the attention kernel has not returned after {seconds:.0f} s: start again with "
            "--attention xla\n"
        )
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check(shape: _Shape, device: jax.Device, interpret: bool) -> Verdict:
    """Runs the kernel, the page walk and the definition on random data."""
    error, kernel_ms, walk_ms = 0.0, 0.0, 0.0
    rng = np.random.default_rng(0)
    with jax.default_device(device):
        for window in shape.windows:
            group, query, buffers = _decode_rows(shape, rng)
            sinks = None
            if shape.sinks:
                sinks = jnp.asarray(rng.normal(size=query.shape[2:4]), jnp.float32)
            attend = {
                "scale": shape.width**-0.5,
                "window": window,
                "softcap": shape.softcap,
                "sinks": sinks,
            }
            kernel = functools.partial(_kernel, shape.value_dim, interpret=interpret, **attend)
            walk = functools.partial(_other, xla.paged_attention, shape.value_dim, **attend)
            define = functools.partial(_other, reference.paged_attention, shape.value_dim, **attend)
            with jax.default_matmul_precision("highest"):
                exact = [jnp.nan_to_num(x.astype(jnp.float32)) for x in buffers]
                expected = jax.jit(define)(query.astype(jnp.float32), exact, group)
            found = jax.jit(kernel)(query, buffers, group).astype(jnp.float32)
            present = group.present[..., None, None, None]
            difference = float(jnp.max(jnp.where(present, jnp.abs(found - expected), 0)))
            error = max(error, difference if np.isfinite(difference) else np.inf)
            if bool(jnp.any(found[jnp.logical_not(jnp.any(group.present, axis=1))] != 0)):
                error = np.inf
            kernel_ms += _time_ms(kernel, query, buffers, group)
            walk_ms += _time_ms(walk, query, buffers, group)
    return Verdict(device.device_kind, error, _ALLOWED[shape.dtype], kernel_ms, walk_ms)


def _decode_rows(shape: _Shape, rng: np.random.Generator) -> tuple[TokenGroup, jax.Array, list[jax.Array]]:
    """Returns decode rows, their queries, and a cache in which all else is not a number."""
    page = shape.page_size
    first = np.append(rng.integers(1, _CONTEXT, _ROWS - 1), 0)
    lengths = (first > 0).astype(np.int32)
    tables = np.full((_ROWS, -(-(_CONTEXT + page) // page)), NULL_PAGE)
    order = iter(rng.permutation(np.arange(1, 1 + tables.size)))
    heads = 1 if shape.latent else shape.heads
    buffers = [
        np.full((1 + tables.size, heads, page, width), np.nan, np.float32)
        for width in ((shape.width,) if shape.latent else (shape.width, shape.value_dim))
    ]
    for row, stop in enumerate(np.where(lengths > 0, first + 1, 0)):
        for block in range(-(-stop // page)):
            at = tables[row, block] = next(order)
            count = min(stop - block * page, page)
            for buffer in buffers:
                buffer[at, :, :count] = rng.normal(size=(heads, count, buffer.shape[3]))
    query = rng.normal(size=(_ROWS, 1, shape.heads, shape.per_head, shape.width))
    arrays = [jnp.asarray(x, jnp.int32) for x in (tables, first[:, None], lengths)]
    group = TokenGroup(arrays[0], arrays[1], arrays[2])
    return group, jnp.asarray(query, shape.dtype), [jnp.asarray(x, shape.dtype) for x in buffers]


def _pages(value_dim: int, buffers: list[jax.Array]) -> LayerCache | LatentPages:
    if len(buffers) == 2:
        return LayerCache(*buffers)
    return LatentPages(LatentCache(*buffers), value_dim)


def _kernel(
    value_dim: int, query: jax.Array, buffers: list[jax.Array], group: TokenGroup, **attend: Any
) -> jax.Array:
    return tpu.paged_attention(query, value_dim, _pages(value_dim, buffers).stored, group, **attend)


def _other(
    attention: Callable[..., jax.Array],
    value_dim: int,
    query: jax.Array,
    buffers: list[jax.Array],
    group: TokenGroup,
    **attend: Any,
) -> jax.Array:
    """Computes attention by the walk or the definition; the tokens' own keys are those in the cache."""
    pages = _pages(value_dim, buffers)
    blocks, offsets = jnp.divmod(group.positions, pages.page_size)
    at = jnp.take_along_axis(group.block_tables, blocks, axis=1)
    own = [buffer[at, :, offsets] for buffer in buffers]
    return attention(query, own[0], own[-1][..., :value_dim], pages, group, **attend)


def _time_ms(
    attend: Callable[..., jax.Array], query: jax.Array, buffers: list[jax.Array], group: TokenGroup
) -> float:
    """Returns the time of one call, of several that wait for each other in one dispatch."""

    @jax.jit
    def several(query: jax.Array, buffers: list[jax.Array], group: TokenGroup) -> jax.Array:
        def again(_: int, query: jax.Array) -> jax.Array:
            return query + 0 * attend(query, buffers, group)[:1, :1, :1, :1, :1]

        return jax.lax.fori_loop(0, _CALLS, again, query)

    several(query, buffers, group).block_until_ready()
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        several(query, buffers, group).block_until_ready()
        times.append(time.perf_counter() - started)
    return min(times) / _CALLS * 1e3
