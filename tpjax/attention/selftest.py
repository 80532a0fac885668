"""Holds a kernel to the definition on the chip that it is to run on, and times it beside the page walk.

A kernel that was never run on a kind of chip, by a version of the compiler, may be wrong there, slow, refused
by the compiler, or hang. So it is used unasked only after this. The verdict is kept in a file.
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
import uuid
from collections.abc import Callable, Iterator, Mapping
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
_WINDOW = 250  # keys that a query sees, at most, where the kernel is held to the definition: windows end then
_ROWS = 8  # sequences, the last of them padding
_ALLOWED = {"bfloat16": 0.02, "float16": 0.01, "float32": 1e-3}  # largest difference, of outputs of about 1
_CALLS, _ROUNDS = 8, 5
_HANGS_AFTER_S = 60.0  # a call, compiling included
_NO_MEMORY = "RESOURCE_EXHAUSTED"  # of an error: at the next start there may be some
_PACKAGE = Path(__file__).parents[1]
_LAYERS = "experts_gpu", "quantized_gpu", "quantized_tpu", "selftest", "weights", "widening"
# a verdict is of the kernels, of what they are held to and timed beside, and of the check
_SOURCES = (
    *(f"attention/{file.name}" for file in sorted(_PACKAGE.glob("attention/*.py"))),
    *(f"layers/{name}.py" for name in _LAYERS),
    *(f"{name}.py" for name in ("activations", "cache_quantization", "mosaic_gpu")),
)


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
    return kept_verdict(
        f"{kernel} attention",
        shape._asdict(),
        device,
        folder,
        lambda: _check(kernel, shape, device, interpret),
    )


def kept_verdict(
    kernel: str, shape: Mapping[str, Any], device: jax.Device, folder: Path, check: Callable[[], Verdict]
) -> Verdict:
    """Returns what a check of a kernel found, now or earlier.

    A kernel that does not compile or run is not used, nor tried again: after some errors a device does
    nothing more in a process. Where memory was short it is tried.

    Args:
        kernel: what is checked.
        shape: what it depends on beside the device, the compiler and its source, as plain data.
        device: what the kernel runs on.
        folder: where verdicts are kept.
        check: checks it; calls the kernel by :func:`called`.
    """
    about = {**_present(device), "kernel": kernel, "shape": dict(shape)}
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    file = folder / f"{name}.json"
    if (known := _read(file)) is not None:
        return known[1]
    try:
        found = check()
    except Exception as error:  # of a compiler, of a chip, or of a version of Pallas that was not tried
        lines = str(error).strip().splitlines()
        found = Verdict.failed(device.device_kind, ": ".join([type(error).__name__, *lines[:1]]))
        log.warning("%s", found, exc_info=log.isEnabledFor(logging.DEBUG))
        if _NO_MEMORY in str(error):
            return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{uuid.uuid4().hex}")  # processes of two containers may have one number
        part.write_text(json.dumps({**about, "verdict": asdict(found)}, indent=1))
        part.replace(file)
    except OSError as error:
        log.warning("what was found of a kernel is not kept: %s", error)
    return found


def verdicts(folder: Path, device: jax.Device) -> list[tuple[str, Verdict]]:
    """Returns the verdicts of a folder that count for a device here and now, and what each is of."""
    present, found = _present(device), []
    for known in map(_read, sorted(folder.glob("*.json"))):
        if known is not None and present.items() <= known[0].items():
            about, verdict = known
            plain = (None, False, "auto", [None])
            shape = [f"{name} {value}" for name, value in about["shape"].items() if value not in plain]
            found.append((", ".join([about["kernel"], *shape]), verdict))
    return found


def _present(device: jax.Device) -> dict[str, str]:
    """Returns what every verdict depends on."""
    source = b"".join((_PACKAGE / name).read_bytes() for name in _SOURCES)
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "compiler": device.client.platform_version,
        "source": hashlib.sha256(source).hexdigest(),
    }


def _read(file: Path) -> tuple[dict[str, Any], Verdict] | None:
    """Returns what a verdict is of, and the verdict; ``None``: there is none that this version can read."""
    try:
        about = json.loads(file.read_text())
        verdict = Verdict(**about.pop("verdict"))
        str(verdict)  # its figures are numbers
        return about, verdict
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def called(function: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
    """Calls a compiled function and waits for it. If it hangs, or its compiler, the process is ended."""
    with _watchdog(_HANGS_AFTER_S):
        return function(*arguments).block_until_ready()


@contextlib.contextmanager
def _watchdog(seconds: float) -> Iterator[None]:
    """Ends the process if the block takes longer: nothing else stops a kernel that hangs."""

    def end() -> None:
        sys.stderr.write(
            f"tpjax: error: a kernel, or its compiler, has not returned after {seconds:.0f} s: start again "
            "with --attention xla\n"
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


def _check(kernel_name: str, shape: KernelShape, device: jax.Device, interpret: Any) -> Verdict:
    """Runs the kernel, the page walk and the definition on random data."""
    module, kernel_ms, walk_ms = kernel_module(kernel_name), 0.0, 0.0
    rng = np.random.default_rng(0)
    with jax.default_device(device):
        error = _write_error(kernels.cache_writer(kernel_name, interpret), shape, rng)
        for window in shape.windows:
            sinks = None
            if shape.sinks:
                sinks = jnp.asarray(rng.normal(size=(shape.heads, shape.per_head)), jnp.float32)
            attend: dict[str, Any] = {
                "scale": shape.width**-0.5,
                "window": window,
                "softcap": shape.softcap,
                "sinks": sinks,
            }
            near = attend | {"window": window and min(window, _WINDOW)}
            kernel = functools.partial(_kernel, module, shape.value_dim, interpret=interpret)
            define = functools.partial(_other, reference.paged_attention, shape.value_dim, **near)
            for length in (1, shape.page_size):
                rows = _rows(shape, rng, length, near["window"])
                error = max(error, _difference(functools.partial(kernel, **near), define, *rows))
            group, query, buffers = _rows(shape, rng, 1)
            kernel_ms += time_ms(functools.partial(kernel, **attend), query, buffers, group)
            pages = WALK_PAGES.get(device.platform, 1)
            walked = functools.partial(xla.paged_attention, pages=(pages,))
            if device.platform in FIXED_TRIPS:  # as decode steps walk there
                group = replace(group, walk=_ROWS * -(-group.block_tables.shape[1] // pages))
            walk = functools.partial(_other, walked, shape.value_dim, **attend)
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
        written = called(jax.jit(writer.write_pages), values, new, pages)
        if not jnp.array_equal(written, values.at[pages].set(new)):
            return np.inf
        offsets = jnp.asarray([0, shape.page_size // 2 + 1, shape.page_size - 1], jnp.int32)
        tokens, put = new[:, :, 0], values.at[pages, :, offsets]
        write_tokens = None if shape.page_size % 32 else writer.write_tokens
        if write_tokens is not None:
            written = called(jax.jit(write_tokens), values, tokens, pages, offsets)
            if not jnp.array_equal(written, put.set(tokens)):
                return np.inf
        if isinstance(buffer, QuantizedBuffer) and isinstance(content, QuantizedBuffer):
            scales, of_pages = buffer.scales, content.scales
            written = called(jax.jit(writer.write_scales), scales, of_pages.swapaxes(0, 1), pages)
            if not jnp.array_equal(written, scales.at[:, pages].set(of_pages)):
                return np.inf
    return 0.0


def _difference(
    kernel: Callable[..., jax.Array],
    define: Callable[..., jax.Array],
    group: TokenGroup,
    query: jax.Array,
    buffers: list[Buffer],
) -> float:
    """Returns the largest difference of a kernel from the definition; infinite if any output is no number."""
    with jax.default_matmul_precision("highest"):
        exact = list(map(_exact, buffers))
        expected = jax.jit(define)(query.astype(jnp.float32), exact, group)
    found = called(jax.jit(kernel), query, buffers, group).astype(jnp.float32)
    present = group.present[..., None, None, None]
    difference = float(jnp.max(jnp.where(present, jnp.abs(found - expected), 0)))
    if bool(jnp.any(found[jnp.logical_not(jnp.any(group.present, axis=1))] != 0)):
        return np.inf
    return difference if bool(jnp.isfinite(found).all()) else np.inf  # of padding too, which experts see


def _exact(buffer: Buffer) -> jax.Array:
    """Returns the numbers of a buffer in float32, and zeros in place of what is not a number."""
    wide = buffer.vectors if isinstance(buffer, QuantizedBuffer) else buffer.astype(jnp.float32)
    return jnp.nan_to_num(wide)


def _rows(
    shape: KernelShape, rng: np.random.Generator, length: int, window: int | None = None
) -> tuple[TokenGroup, jax.Array, list[Buffer]]:
    """Returns rows of ``length`` tokens, their queries, and a cache in which all else is not a number.

    A row of several tokens is a prompt chunk, which begins at a page and of which some is padding. With a
    window, block tables are cyclic and have no page before it.
    """
    page = shape.page_size
    first = np.append(rng.integers(1, _CONTEXT, _ROWS - 1), 0)
    lengths = np.where(first > 0, rng.integers(1, length, _ROWS, endpoint=True), 0)
    if length > 1:
        first = first // page * page
    seen = _CONTEXT + page + length if window is None else window + length - 2 + page
    tables = np.full((_ROWS, -(-seen // page)), NULL_PAGE)
    order = iter(rng.permutation(np.arange(1, 1 + tables.size)))
    heads = 1 if shape.latent else shape.heads
    buffers = [
        np.full((1 + tables.size, heads, page, width), np.nan, np.float32)
        for width in ((shape.width,) if shape.latent else (shape.width, shape.value_dim))
    ]
    for row, stop in enumerate(np.where(lengths > 0, first + lengths, 0)):
        start = 0 if window is None else max(first[row] - window + 1, 0) // page
        for block in range(start, -(-stop // page)):
            at = tables[row, block % tables.shape[1]] = next(order)
            count = min(stop - block * page, page)
            for buffer in buffers:
                buffer[at, :, :count] = rng.normal(size=(heads, count, buffer.shape[3]))
    query = rng.normal(size=(_ROWS, length, shape.heads, shape.per_head, shape.width))
    positions = first[:, None] + np.arange(length)
    arrays = [jnp.asarray(x, jnp.int32) for x in (tables, positions, lengths)]
    cyclic = window is not None
    group = TokenGroup(arrays[0], arrays[1], arrays[2], chunks=length > 1, cyclic=cyclic)
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
    if group.cyclic:
        blocks %= group.block_tables.shape[1]
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
        *rest: the others.
    """

    @jax.jit
    def several(first: jax.Array, *rest: Any) -> jax.Array:
        def again(_: int, first: jax.Array) -> jax.Array:
            return first + 0 * function(first, *rest).reshape(-1)[0].astype(first.dtype)

        return jax.lax.fori_loop(0, _CALLS, again, first)

    called(several, first, *rest)
    times = []
    with _watchdog(_HANGS_AFTER_S):
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            several(first, *rest).block_until_ready()
            times.append(time.perf_counter() - started)
    return min(times) / _CALLS * 1e3
