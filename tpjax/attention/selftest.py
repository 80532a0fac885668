"""Holds a kernel to the definition on the chip that it is to run on, and times it beside the page walk.

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
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpjax.attention import kernels, reference, xla
from tpjax.attention.backends import FIXED_TRIPS, WALK_PAGES, KernelShape, Verdict
from tpjax.attention.kernels import kernel_module
from tpjax.cache import NULL_PAGE, Buffer, CacheWriter, LatentCache, LatentPages, LayerCache, TokenGroup
from tpjax.cache_quantization import QuantizedBuffer, part_width

log = logging.getLogger(__name__)

_CONTEXT = 1000  # tokens of the longest sequence
_ROWS = 8  # sequences, the last of them padding
_ALLOWED = {"bfloat16": 0.02, "float16": 0.01, "float32": 1e-3}  # largest difference, of outputs of about 1
_CALLS, _ROUNDS = 8, 5
_HANGS_AFTER_S = 60.0  # compiling included


def verdict(
    kernel: str, shape: KernelShape, device: jax.Device, folder: Path, *, interpret: Any = None
) -> Verdict:
    """Checks a kernel in the shapes of a model, or returns what an earlier check found.

    Args:
        kernel: ``tpu`` or ``gpu``.
        shape: what of the model it depends on.
        device: a device of the mesh.
        folder: where verdicts are kept.
        interpret: how the kernel is interpreted, on a CPU.
    """
    about = {
        "kernel": hashlib.sha256(_source(kernel)).hexdigest(),
        "shape": shape._asdict(),
    }
    return kept_verdict(about, device, folder, lambda: _check(kernel, shape, device, interpret))


def kept_verdict(
    about: dict[str, Any], device: jax.Device, folder: Path, check: Callable[[], Verdict]
) -> Verdict:
    """Returns what a check of a kernel found, now or earlier. One that hangs ends the process.

    A kernel that does not compile or run is not used. That is not kept: memory may have been short.

    Args:
        about: what the verdict depends on beside the device and its compiler, as plain data.
        device: what the kernel runs on.
        folder: where verdicts are kept.
        check: checks it.
    """
    about = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "compiler": device.client.platform_version,
        **about,
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    file = folder / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Verdict(**json.loads(file.read_text())["verdict"])
    with _watchdog(_HANGS_AFTER_S):
        try:
            found = check()
        except Exception as error:  # of a compiler, or of a version of Pallas that was not tried
            log.warning("the check of a kernel failed", exc_info=log.isEnabledFor(logging.DEBUG))
            lines = str(error).strip().splitlines()
            return Verdict.failed(device.device_kind, ": ".join([type(error).__name__, *lines[:1]]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({**about, "verdict": asdict(found)}, indent=1))
        part.replace(file)
    except OSError as error:
        log.warning("what was found of a kernel is not kept: %s", error)
    return found


def verdicts(folder: Path) -> list[Verdict]:
    """Returns the verdicts that a folder keeps."""
    found = []
    for file in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append(Verdict(**json.loads(file.read_text())["verdict"]))
    return found


@contextlib.contextmanager
def _watchdog(seconds: float) -> Iterator[None]:
    """Ends the process if the block takes longer: nothing else stops a kernel that hangs."""

    def end() -> None:
        sys.stderr.write(
            f"tpjax: error: a kernel has not returned after {seconds:.0f} s: start again with "
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


def _source(kernel: str) -> bytes:
    """Returns the source of a kernel, and of what writes pages for it."""
    module = Path(str(kernel_module(kernel).__file__))
    return b"".join(file.read_bytes() for file in sorted(module.parent.glob(f"{kernel}*.py")))


def _check(kernel_name: str, shape: KernelShape, device: jax.Device, interpret: Any) -> Verdict:
    """Runs the kernel, the page walk and the definition on random data."""
    module, kernel_ms, walk_ms = kernel_module(kernel_name), 0.0, 0.0
    rng = np.random.default_rng(0)
    with jax.default_device(device):
        error = _write_error(kernels.cache_writer(kernel_name, interpret), shape, rng)
        for window in shape.windows:
            attend: dict[str, Any] = {
                "scale": shape.width**-0.5,
                "window": window,
                "softcap": shape.softcap,
                "sinks": None,
            }
            if shape.sinks:
                attend["sinks"] = jnp.asarray(rng.normal(size=(shape.heads, shape.per_head)), jnp.float32)
            kernel = functools.partial(_kernel, module, shape.value_dim, interpret=interpret, **attend)
            pages = WALK_PAGES.get(device.platform, 1)
            walked = functools.partial(xla.paged_attention, pages=(pages,))
            walk = functools.partial(_other, walked, shape.value_dim, **attend)
            define = functools.partial(_other, reference.paged_attention, shape.value_dim, **attend)
            for length in (1, shape.page_size):
                group, query, buffers = _rows(shape, rng, length)
                error = max(error, _difference(kernel, define, query, buffers, group))
                if length == 1:
                    kernel_ms += time_ms(kernel, query, buffers, group)
                    if device.platform in FIXED_TRIPS:  # as decode steps walk there
                        group = replace(group, walk=_ROWS * -(-group.block_tables.shape[1] // pages))
                    walk_ms += time_ms(walk, query, buffers, group)
    return Verdict(device.device_kind, error, _ALLOWED[shape.dtype], kernel_ms, walk_ms)


def _write_error(writer: CacheWriter | None, shape: KernelShape, rng: np.random.Generator) -> float:
    """Returns 0 if pages are written where they belong and nothing else is, else infinity."""
    if writer is None or writer.write_pages is None or writer.write_scales is None:
        return 0.0
    heads, pages = 1 if shape.latent else shape.heads, jnp.asarray([6, 2, 5], jnp.int32)
    for width in {shape.width} if shape.latent else {shape.width, shape.value_dim}:
        buffer, content = (
            _stored(rng.normal(size=(count, heads, shape.page_size, width)), shape)
            for count in (8, len(pages))
        )
        values, new = _vectors(buffer), _vectors(content)
        if not jnp.array_equal(jax.jit(writer.write_pages)(values, new, pages), values.at[pages].set(new)):
            return np.inf
        offsets = jnp.asarray([0, shape.page_size // 2 + 1, shape.page_size - 1], jnp.int32)
        tokens, put = new[:, :, 0], values.at[pages, :, offsets]
        write_tokens = None if shape.page_size % 32 else writer.write_tokens
        if write_tokens is not None and not jnp.array_equal(
            jax.jit(write_tokens)(values, tokens, pages, offsets), put.set(tokens)
        ):
            return np.inf
        if isinstance(buffer, QuantizedBuffer) and isinstance(content, QuantizedBuffer):
            scales, of_pages = buffer.scales, content.scales
            written = jax.jit(writer.write_scales)(scales, of_pages.swapaxes(0, 1), pages)
            if not jnp.array_equal(written, scales.at[:, pages].set(of_pages)):
                return np.inf
    return 0.0


def _difference(
    kernel: Callable[..., jax.Array],
    define: Callable[..., jax.Array],
    query: jax.Array,
    buffers: list[Buffer],
    group: TokenGroup,
) -> float:
    """Returns the largest difference of a kernel from the definition; infinite if it is not a number."""
    with jax.default_matmul_precision("highest"):
        exact = list(map(_exact, buffers))
        expected = jax.jit(define)(query.astype(jnp.float32), exact, group)
    found = jax.jit(kernel)(query, buffers, group).astype(jnp.float32)
    present = group.present[..., None, None, None]
    difference = float(jnp.max(jnp.where(present, jnp.abs(found - expected), 0)))
    if bool(jnp.any(found[jnp.logical_not(jnp.any(group.present, axis=1))] != 0)):
        return np.inf
    return difference if np.isfinite(difference) else np.inf


def _exact(buffer: Buffer) -> jax.Array:
    """Returns the numbers of a buffer in float32, and zeros in place of what is not a number."""
    wide = buffer.vectors if isinstance(buffer, QuantizedBuffer) else buffer.astype(jnp.float32)
    return jnp.nan_to_num(wide)


def _rows(
    shape: KernelShape, rng: np.random.Generator, length: int
) -> tuple[TokenGroup, jax.Array, list[Buffer]]:
    """Returns rows of ``length`` tokens, their queries, and a cache in which all else is not a number.

    A row of several tokens is a prompt chunk, which begins at a page and of which some is padding.
    """
    page = shape.page_size
    first = np.append(rng.integers(1, _CONTEXT, _ROWS - 1), 0)
    lengths = np.where(first > 0, rng.integers(1, length, _ROWS, endpoint=True), 0)
    if length > 1:
        first = first // page * page
    tables = np.full((_ROWS, -(-(_CONTEXT + page + length) // page)), NULL_PAGE)
    order = iter(rng.permutation(np.arange(1, 1 + tables.size)))
    heads = 1 if shape.latent else shape.heads
    buffers = [
        np.full((1 + tables.size, heads, page, width), np.nan, np.float32)
        for width in ((shape.width,) if shape.latent else (shape.width, shape.value_dim))
    ]
    for row, stop in enumerate(np.where(lengths > 0, first + lengths, 0)):
        for block in range(-(-stop // page)):
            at = tables[row, block] = next(order)
            count = min(stop - block * page, page)
            for buffer in buffers:
                buffer[at, :, :count] = rng.normal(size=(heads, count, buffer.shape[3]))
    query = rng.normal(size=(_ROWS, length, shape.heads, shape.per_head, shape.width))
    positions = first[:, None] + np.arange(length)
    arrays = [jnp.asarray(x, jnp.int32) for x in (tables, positions, lengths)]
    group = TokenGroup(arrays[0], arrays[1], arrays[2], chunks=length > 1)
    return group, jnp.asarray(query, shape.dtype), [_stored(x, shape) for x in buffers]


def _stored(x: np.ndarray, shape: KernelShape) -> Buffer:
    """Returns a buffer of the cache with this content, as the device that has it stores it."""
    content = jnp.asarray(x, shape.dtype)
    if shape.kv_dtype == "auto":
        return content
    (device,) = content.devices()
    return QuantizedBuffer.of(content, shape.kv_dtype, part_width(x.shape[-1], device.platform))


def _vectors(buffer: Buffer) -> jax.Array:
    """Returns the array that holds keys or values, without their scales."""
    return buffer.values if isinstance(buffer, QuantizedBuffer) else buffer


def _pages(value_dim: int, buffers: list[Buffer]) -> LayerCache | LatentPages:
    if len(buffers) == 2:
        return LayerCache(*buffers)
    return LatentPages(LatentCache(*buffers), value_dim)


def _kernel(
    module: ModuleType,
    value_dim: int,
    query: jax.Array,
    buffers: list[Buffer],
    group: TokenGroup,
    **attend: Any,
) -> jax.Array:
    stored = _pages(value_dim, buffers).stored
    return kernels.paged_attention(module, query, value_dim, stored, group, **attend)


def _other(
    attention: Callable[..., jax.Array],
    value_dim: int,
    query: jax.Array,
    buffers: list[Buffer],
    group: TokenGroup,
    **attend: Any,
) -> jax.Array:
    """Computes attention by the walk or the definition; the tokens' own keys are those in the cache."""
    pages = _pages(value_dim, buffers)
    blocks, offsets = jnp.divmod(group.positions, pages.page_size)
    at = jnp.take_along_axis(group.block_tables, blocks, axis=1)
    batch, length = group.shape
    rows = jnp.arange(batch * length).reshape(batch, length)
    own = [part[rows, :, offsets] for part in pages.read(at.reshape(-1))]
    return attention(query, *own, pages, group, **attend)


def time_ms(function: Callable[..., jax.Array], first: jax.Array, *rest: Any) -> float:
    """Returns the time of one call, of several that wait for each other in one dispatch.

    Args:
        function: what is timed.
        first: its first argument, which each call waits for.
        rest: the others.
    """

    @jax.jit
    def several(first: jax.Array, *rest: Any) -> jax.Array:
        def again(_: int, first: jax.Array) -> jax.Array:
            return first + 0 * function(first, *rest).reshape(-1)[0].astype(first.dtype)

        return jax.lax.fori_loop(0, _CALLS, again, first)

    several(first, *rest).block_until_ready()
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        several(first, *rest).block_until_ready()
        times.append(time.perf_counter() - started)
    return min(times) / _CALLS * 1e3
