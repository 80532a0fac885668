"""What kernels for NVIDIA's Hopper GPUs share.

They use Pallas' Mosaic GPU, whose interface changes between versions of jax: what differs is here.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from tpjax.errors import ConfigError

PROCESSORS = 132  # of an H100 or H200
SHARED_BYTES = 223 << 10  # of a program; of the 227 KiB some are for barriers and reductions


def tiled(shape: tuple[int, ...], dtype: Any, width: int | None = None) -> Any:
    """Returns shared memory in the layout that the tensor cores read.

    Args:
        shape: of the array.
        dtype: its dtype.
        width: elements of a row that are read at once; ``None``: all.
    """
    bits = 4 if dtype == jnp.int4 else 8 * jnp.dtype(dtype).itemsize
    swizzle = math.gcd((width or shape[-1]) * bits // 8, 128)
    tiling: Any = plgpu.TilingTransform  # to a type checker they are abstract
    swizzling: Any = plgpu.SwizzleTransform
    transforms = tiling((8, 8 * swizzle // bits)), swizzling(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def transposed(ref: Any) -> Any:
    """Returns a view of a matrix with its axes exchanged."""
    if hasattr(plgpu, "wait_gmem_to_smem"):  # jax 0.11 and later
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))


def multiply(left: Any, right: Any, product: Any) -> Any:
    """Returns what an accumulator holds, a matrix product added: the body of a ``run_scoped``."""
    plgpu.wgmma(product, left, right)
    return product[...]


def widen(values: Any, dtype: Any) -> Any:
    """Returns values of 8 or 4 bits, in registers, in the layout of a product and in its dtype.

    They change their layout while they are narrow, when fewer registers are exchanged.

    Args:
        values: int8, float8 e4m3 or int4, as loaded from shared memory.
        dtype: of 16 bits.
    """
    if values.dtype == jnp.int4:
        values = plgpu.layout_cast(values, plgpu.Layout.WGMMA_UPCAST_4X)
    values = plgpu.layout_cast(values, plgpu.Layout.WGMMA_UPCAST_2X)
    values = plgpu.layout_cast(values, plgpu.Layout.WGMMA)
    if values.dtype == jnp.float8_e4m3fn:
        values = values.astype(jnp.float32)
    elif dtype != jnp.bfloat16:  # exact, and faster than at once
        values = values.astype(jnp.bfloat16).astype(jnp.float32)
    return values.astype(dtype)


def interpreted(what: str) -> Any:
    """Returns what makes :func:`plgpu.kernel` interpret a kernel on a CPU.

    Args:
        what: the option that asks for it, for the message.

    Raises:
        ConfigError: the installed jax interprets no such kernel.
    """
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise ConfigError(f"{what} on a CPU is interpreted by jax 0.12 and later, not {jax.__version__}")
    return plgpu.InterpretGPUParams()
