"""The attention backends, and the one place that chooses among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from tpjax.attention import reference, xla
from tpjax.cache import Pages, TokenGroup
from tpjax.config import AttentionBackend, check_choice
from tpjax.errors import ConfigError

_KERNEL_DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Backend:
    """What computes attention, and why.

    Attributes:
        name: ``reference`` (the definition, over gathered pages), ``xla`` (the page walk) or ``tpu`` (a
            Pallas kernel).
        why: the reason for the choice, in a sentence without a full stop.
        interpret: whether the kernel is interpreted: slow, and exact.
    """

    name: Literal["reference", "xla", "tpu"]
    why: str = ""
    interpret: bool = False

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
        walk_ms: time of the page walk.
    """

    device: str
    error: float
    allowed: float
    kernel_ms: float
    walk_ms: float

    @property
    def right(self) -> bool:
        """Whether the kernel computes attention."""
        return self.error <= self.allowed

    @property
    def use_kernel(self) -> bool:
        """Whether it is right, and no slower."""
        return self.right and self.kernel_ms <= self.walk_ms

    def __str__(self) -> str:
        if not self.right:
            return f"the kernel is wrong on {self.device}: off by {self.error:.3g}, {self.allowed:g} allowed"
        times = f"{self.kernel_ms:.3g} ms where the page walk takes {self.walk_ms:.3g}"
        takes = "and takes" if self.use_kernel else "but takes"
        return f"the kernel is right on {self.device}, {takes} {times}"


XLA = Backend("xla", "it runs on every platform")


def choose_backend(
    asked: str,
    platform: str,
    dtype: jnp.dtype,
    verify: Callable[[], Verdict] | None = None,
) -> Backend:
    """Chooses what computes attention.

    Args:
        asked: a backend, or ``auto``: on a TPU the kernel if it was found right and no slower than the page
            walk on this kind of chip, else the walk.
        platform: of the devices: ``cpu``, ``gpu`` or ``tpu``.
        dtype: of activations and cache.
        verify: checks the kernel on these devices; ``None``: they are not here, or cannot tell.

    Raises:
        ConfigError: there is no such backend, or it does not run here.
    """
    check_choice("attention", asked, AttentionBackend)
    kernel_takes = str(jnp.dtype(dtype)) in _KERNEL_DTYPES
    if asked == "auto":
        if platform != "tpu" or not kernel_takes:
            return XLA
        if verify is None:
            return Backend("xla", "the kernel (--attention tpu) is used unasked only where it was checked")
        verdict = verify()
        return Backend("tpu" if verdict.use_kernel else "xla", str(verdict))
    if asked != "tpu":
        return Backend("xla" if asked == "xla" else "reference", "asked for")
    if platform not in ("cpu", "tpu"):
        raise ConfigError(f"attention='tpu' needs TPUs, and the devices are of platform {platform!r}")
    if not kernel_takes:
        raise ConfigError(f"attention='tpu' supports {' and '.join(_KERNEL_DTYPES)}, not {jnp.dtype(dtype)}")
    if platform == "cpu":
        return Backend("tpu", "asked for; interpreted, as there is no TPU", interpret=True)
    return Backend("tpu", "asked for")


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

    Prompt chunks take the page walk where decode rows take the kernel: it computes them too, but where they
    are written to the cache for it, XLA moves the whole cache on chip and back (v5e, ahead of time).

    Args:
        query: G query heads for each of the K KV heads.
        key: keys of the same tokens, already in the cache. K may be 1 in keys and values: all heads share it.
        value: values of the same tokens, already in the cache; their width may differ from the keys'.
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
    attend = reference.paged_attention if backend.name == "reference" else xla.paged_attention
    if backend.name == "tpu" and cache.stored is not None and not group.chunks:
        from tpjax.attention import tpu  # Pallas is imported where it is used: that takes a while

        return tpu.paged_attention(
            query,
            value.shape[-1],
            cache.stored,
            group,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            interpret=backend.interpret,
        )
    return attend(query, key, value, cache, group, scale=scale, window=window, softcap=softcap, sinks=sinks)
