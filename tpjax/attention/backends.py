"""The attention backends, and the one place that chooses among them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from tpjax.attention import kernels, reference, xla
from tpjax.attention.kernels import kernel_module
from tpjax.cache import CacheWriter, Pages, TokenGroup
from tpjax.config import AttentionBackend, KVDtype, ModelConfig, check_choice
from tpjax.errors import ConfigError
from tpjax.sharding import head_plan

_KERNEL_DTYPES = {"tpu": ("bfloat16", "float32"), "gpu": ("bfloat16", "float16")}
_KERNEL_DEVICES = {"tpu": "TPUs", "gpu": "NVIDIA GPUs"}
WALK_PAGES = {"tpu": 8, "gpu": 8}  # by platform; elsewhere 1
# A short chunk gets a block of pages on a CPU too: products with a page are small, and its queries repay the
# copy. SmolLM2 takes 0.87 of the time for a prompt of 4,096 tokens beside three streams, in chunks of 32; for
# one alone, in chunks of 512, blocks take 1.03 times as long as pages.
SHORT_CHUNK, SHORT_CHUNK_PAGES = 128, 8
FIXED_TRIPS = ("gpu",)  # platforms whose host waits for each iteration of a loop whose end it does not know
_HOPPER = 9  # its products are in no earlier chip, nor in a later one


class KernelShape(NamedTuple):
    """What of a model a kernel depends on, on one device.

    Attributes:
        heads: KV heads.
        per_head: query heads of each.
        width: of keys.
        value_dim: of values.
        latent: whether the beginning of each key is the value, and all heads share it.
        windows: keys that a query sees, of each kind of layer.
        softcap: bounds the scores.
        sinks: whether there are sinks.
        page_size: positions per page.
        dtype: of activations, and of a cache that is not quantised.
        kv_dtype: what keys and values are kept in; ``auto``: ``dtype``.
    """

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
    kv_dtype: KVDtype = "auto"

    @classmethod
    def of(
        cls, config: ModelConfig, tp: int, dtype: jnp.dtype, page_size: int, kv_dtype: KVDtype = "auto"
    ) -> KernelShape:
        """Returns that of a model over ``tp`` devices."""
        attention, plan = config.attention, head_plan(config, tp)
        latent, width, value_dim = attention.latent, attention.head_dim, attention.head_dim
        if latent is not None:
            width, value_dim = latent.kv_lora_rank + config.rotated_dim, latent.kv_lora_rank
        return cls(
            plan.head_slots_per_device,
            plan.group_size,
            width,
            value_dim,
            latent is not None,
            tuple(dict.fromkeys(attention.window_of(kind) for kind in attention.layer_types)),
            attention.softcap,
            attention.sinks,
            page_size,
            str(jnp.dtype(dtype)),
            kv_dtype,
        )


@dataclass(frozen=True)
class Backend:
    """What computes attention and, where it is a kernel, products of quantised weights and experts; and why.

    Attributes:
        name: ``reference`` (the definition, over gathered pages), ``xla`` (the page walk), ``tpu`` or ``gpu``
            (Pallas kernels).
        why: the reason for the choice, in a sentence without a full stop.
        interpret: how the kernel is interpreted, slow and exact; ``None``: it is compiled.
        walk_pages: pages of a sequence that one iteration of the page walk reads, at most. An iteration takes
            a TPU some 2,000 cycles for each of its instructions.
        short_chunk_pages: the same for prompt chunks of up to 128 tokens, as long as so many are left.
        fixed_trips: whether the iterations of the page walk of decode steps are compiled in: see
            :meth:`tpjax.runtime.limits.Limits.decode_shapes`.
        in_rows: whether tokens are written in rows of one head, as on TPUs: else XLA lays out the cache in
            other ways for some layers, and copies it for each.
        products: where it is a kernel, whether products of weights with scales for groups of inputs are, too.
        experts: where it is the kernel for GPUs, whether products of routed experts are one's, too.
    """

    name: Literal["reference", "xla", "tpu", "gpu"]
    why: str = ""
    interpret: Any = None
    walk_pages: int = 1
    short_chunk_pages: int = 1
    fixed_trips: bool = False
    in_rows: bool = False
    products: bool = True
    experts: bool = True

    @property
    def is_kernel(self) -> bool:
        """Whether a kernel reads the cache as it is stored."""
        return self.name in _KERNEL_DTYPES

    @property
    def block_pages(self) -> int | None:
        """Pages of a block, so many of which decode steps are compiled for; ``None``: for any number."""
        return self.walk_pages if self.fixed_trips else None

    def __str__(self) -> str:
        return f"{self.name}: {self.why}" if self.why else self.name


@dataclass(frozen=True)
class Verdict:
    """What the check of a kernel on a device found; see :mod:`tpjax.attention.selftest`.

    Attributes:
        device: kind of the device.
        error: largest difference from the definition; infinite if an output was not a number.
        allowed: largest difference that counts as right.
        kernel_ms: time of the kernel: decode rows, one layer of each kind.
        walk_ms: time of what it stands in for.
        walk: what that is.
        problem: why it could not be checked.
    """

    device: str
    error: float
    allowed: float
    kernel_ms: float
    walk_ms: float
    walk: str = "the page walk"
    problem: str | None = None

    @classmethod
    def failed(cls, device: str, problem: str) -> Verdict:
        """Returns the verdict on a kernel that does not compile or run."""
        return cls(device, math.inf, 0.0, math.inf, 0.0, problem=problem)

    @property
    def right(self) -> bool:
        """Whether the kernel computes what it should."""
        return self.error <= self.allowed

    @property
    def use_kernel(self) -> bool:
        """Whether it is right, and no slower."""
        return self.right and self.kernel_ms <= self.walk_ms

    def __str__(self) -> str:
        if self.problem is not None:
            return f"the kernel does not run on {self.device}: {self.problem}"
        if not self.right:
            return f"the kernel is wrong on {self.device}: off by {self.error:.3g}, {self.allowed:g} allowed"
        times = f"{self.kernel_ms:.3g} ms where {self.walk} takes {self.walk_ms:.3g}"
        takes = "and takes" if self.use_kernel else "but takes"
        return f"the kernel is right on {self.device}, {takes} {times}"


XLA = Backend("xla", "it runs on every platform")


def choose_backend(
    asked: str, device: Any, shape: KernelShape, verify: Callable[[], Verdict] | None = None
) -> Backend:
    """Chooses what computes attention.

    Args:
        asked: a backend, or ``auto``: the platform's kernel if it was found right and no slower than the page
            walk on this kind of chip, else the walk.
        device: one of the mesh's devices.
        shape: what of the model a kernel depends on.
        verify: checks the platform's kernel on these devices; ``None``: they are not here, or cannot tell.

    Raises:
        ConfigError: there is no such backend, or it does not run here.
    """
    check_choice("attention", asked, AttentionBackend)
    platform = device.platform
    chosen = _choose(asked, device, shape, verify)
    fixed = platform in FIXED_TRIPS and chosen.name == "xla"
    walk_pages = WALK_PAGES.get(platform, 1)
    return replace(
        chosen,
        walk_pages=walk_pages,
        short_chunk_pages=SHORT_CHUNK_PAGES,
        fixed_trips=fixed,
        in_rows=platform == "tpu",
    )


def _choose(asked: str, device: Any, shape: KernelShape, verify: Callable[[], Verdict] | None) -> Backend:
    platform = device.platform
    if asked == "auto":
        if platform not in _KERNEL_DTYPES:
            return XLA
        if (problem := _problem(platform, device, shape)) is not None:
            return Backend("xla", f"the kernel {problem}")
        if verify is None:
            return Backend(
                "xla", f"the kernel (--attention {platform}) is used unasked only where it was checked"
            )
        verdict = verify()
        return Backend(_kernel(platform) if verdict.use_kernel else "xla", str(verdict))
    if asked not in _KERNEL_DTYPES:
        return Backend("xla" if asked == "xla" else "reference", "asked for")
    if platform not in ("cpu", asked):
        raise ConfigError(
            f"attention={asked!r} needs {_KERNEL_DEVICES[asked]}, and the devices are of platform "
            f"{platform!r}"
        )
    if (problem := _problem(asked, device, shape)) is not None:
        raise ConfigError(f"attention={asked!r} {problem}")
    if platform == "cpu":
        return Backend(
            _kernel(asked),
            f"asked for; interpreted, as there is no {asked.upper()}",
            kernel_module(asked).interpreted(),
        )
    return Backend(_kernel(asked), "asked for")


def _kernel(platform: str) -> Literal["tpu", "gpu"]:
    return "tpu" if platform == "tpu" else "gpu"


def _problem(kernel: str, device: Any, shape: KernelShape) -> str | None:
    """Returns what keeps a kernel from such a device or model, as the end of a sentence about it."""
    if shape.dtype not in _KERNEL_DTYPES[kernel]:
        return f"supports {' and '.join(_KERNEL_DTYPES[kernel])}, not {shape.dtype}"
    if kernel == "tpu":
        return None
    if device.platform == "gpu":
        capability = str(getattr(device, "compute_capability", _HOPPER))
        if capability.split(".")[0] != str(_HOPPER):
            return f"is for compute capability {_HOPPER} (Hopper), and {device.device_kind} has {capability}"
    problem: str | None = kernel_module("gpu").unsupported(shape)
    return problem


def paged_attention(
    query: Float[Array, "B S K G h"],
    key: Float[Array, "B S #K h"],
    value: Float[Array, "B S #K v"],
    cache: Pages,
    group: TokenGroup,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Float[Array, "K G"] | None = None,
    backend: Backend = XLA,
) -> Float[Array, "B S K G v"]:
    """Computes causal attention of each query to the keys at or before its position.

    Args:
        query: G query heads for each of the K KV heads.
        key: keys of the same tokens, as the cache returns them, which has them already. K may be 1 in keys
            and values: all heads share it.
        value: values of the same tokens, as the cache returns them; their width may differ from the keys'.
        cache: keys and values of every position up to the queries' own.
        group: pages of each sequence, and positions of the queries.
        scale: multiplies query-key products.
        window: keys that a query sees, its own included; ``None``: all.
        softcap: bounds the scaled products smoothly; ``None``: no bound.
        sinks: for each query head, the score of an extra key without a value, float32; ``None``: no such key
            (Xiao et al. 2023, https://arxiv.org/abs/2309.17453).
        backend: what computes it.

    Returns:
        The attention output in the query's dtype; softmax and sums are float32. Rows without a token get 0.
    """
    scoring: Any = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    if backend.is_kernel:
        assert cache.stored is not None
        kernel, value_dim = kernel_module(backend.name), value.shape[-1]
        return kernels.paged_attention(
            kernel, query, value_dim, cache.stored, group, interpret=backend.interpret, **scoring
        )
    if backend.name == "reference":
        return reference.paged_attention(query, key, value, cache, group, **scoring)
    short = group.chunks and group.shape[1] <= SHORT_CHUNK
    pages = (*((backend.short_chunk_pages,) if short else ()), backend.walk_pages)
    return xla.paged_attention(query, key, value, cache, group, pages=pages, **scoring)


def cache_writer(backend: Backend) -> CacheWriter:
    """Returns how new keys and values are written for a backend to read."""
    return kernels.cache_writer(backend.name, backend.interpret) or CacheWriter(by_head=backend.in_rows)
