"""What the kernels have in common: which module holds each, and how they are laid out over devices.

A kernel's module has ``attend``, which computes attention on one device, and ``interpreted``.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from tpjax.cache import CacheWriter, StoredPages, TokenGroup
from tpjax.cache_quantization import QuantizedBuffer
from tpjax.mesh import AXIS
from tpjax.sharding import PAGES, REPLICATED


def kernel_module(name: str) -> ModuleType:
    """Returns a module that holds kernels: ``tpu``, ``tpu_write`` or ``gpu``.

    Pallas is imported where it is used: that takes a while.
    """
    return importlib.import_module(f"tpjax.attention.{name}")


def cache_writer(kernel: str, interpret: Any = None) -> CacheWriter | None:
    """Returns how keys and values are written for a kernel to read; ``None``: as XLA likes."""
    if kernel != "tpu":
        return None
    module = kernel_module("tpu_write")
    writers = (
        functools.partial(one, interpret=interpret)
        for one in (module.write_pages, module.write_scales, module.write_tokens)
    )
    return CacheWriter(True, *writers)


def paged_attention(
    kernel: ModuleType,
    query: Float[Array, "B S K G h"],
    value_dim: int,
    stored: StoredPages,
    group: TokenGroup,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Float[Array, "K G"] | None = None,
    interpret: Any = None,
) -> Float[Array, "B S K G v"]:
    """Computes attention with a kernel, on each device to the pages of its own heads.

    See :func:`tpjax.attention.paged_attention` for the other arguments.

    Args:
        kernel: the kernel's module.
        query: queries.
        value_dim: width of the values.
        stored: the cache, which holds the tokens' own keys and values already.
        group: pages of each sequence, and positions of the queries.
        scale: multiplies query-key products.
        window: keys that a query sees.
        softcap: bounds the scaled products.
        sinks: scores of an extra key.
        interpret: how the kernel is interpreted on a CPU: what its module's ``interpreted`` returns.
    """
    attend = functools.partial(
        kernel.attend,
        value_dim=value_dim,
        scale=scale,
        window=window,
        softcap=softcap,
        cyclic=group.cyclic,
        interpret=interpret,
    )
    first = group.positions[:, 0]
    stop = first + group.shape[1]
    if group.lengths is not None:  # rows of padding read nothing
        stop = jnp.where(group.lengths > 0, first + group.lengths, 0)
    if not jax.sharding.get_abstract_mesh().empty:
        queries = P(None, None, AXIS, None, None)
        # latents: all heads read all of them
        spec = PAGES if stored.keys.shape[1] == query.shape[2] else REPLICATED
        pages: Any = [one.specs(spec) if isinstance(one, QuantizedBuffer) else spec for one in stored]
        attend = jax.shard_map(
            attend,
            in_specs=(queries, StoredPages(*pages), P(AXIS, None), REPLICATED, REPLICATED, REPLICATED),
            out_specs=queries,
            check_vma=False,
        )
    output: Array = attend(query, stored, sinks, group.block_tables, first, stop)
    return output
