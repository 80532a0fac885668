"""Copies a block of a tensor to its place: transposed, cast to another dtype, or as it is.

Each is done a few megabytes at a time, so that what was just read is still in the processor's cache, and
without holding Python's global lock, so that threads share the work.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from math import prod

import jax
import ml_dtypes
import numpy as np

_BF16, _F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
_INT8, _INT4 = np.dtype(np.int8), np.dtype(ml_dtypes.int4)
_E2M1, _E4M3 = np.dtype(ml_dtypes.float4_e2m1fn), np.dtype(ml_dtypes.float8_e4m3fn)
_E4M3_OF_E2M1 = np.arange(16, dtype=np.uint8).view(_E2M1).astype(np.float32).astype(_E4M3).view(np.uint8)
_BITS: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
}
# Below this size, numpy is faster than the overhead of a call of JAX.
_LEAST_BYTES = 32 * 1024
_TILE = (32, 512)  # rows, columns: the best of those tried, for items of two bytes
_ALIGNMENT = 64  # bytes; JAX's CPU backend takes an array so aligned as it is, and copies any other


def empty(shapes: Sequence[tuple[int, ...]], dtype: np.dtype, *, zeros: bool = False) -> list[np.ndarray]:
    """Allocates arrays that JAX's CPU backend can use without a copy.

    They lie in one piece of memory: numpy asks for huge pages from 4 MiB on, and memory in pages of 4 KiB is
    first written at less than half the speed.

    Args:
        shapes: shapes of the arrays.
        dtype: their dtype.
        zeros: fill them with zeros.
    """
    sizes = [prod(shape) * dtype.itemsize for shape in shapes]
    places = [0, *accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    memory = (np.zeros if zeros else np.empty)(places[-1] + _ALIGNMENT, np.uint8)
    memory = memory[-memory.ctypes.data % _ALIGNMENT :]
    return [
        memory[place : place + size].view(dtype).reshape(shape)
        for place, size, shape in zip(places, sizes, shapes, strict=False)
    ]


def copy_into(target: np.ndarray, values: np.ndarray) -> None:
    """Assigns ``target[...] = values``, for any memory order of the two and any floating-point dtypes."""
    if values.dtype.itemsize > target.dtype.itemsize:
        values = values.astype(target.dtype)  # cast first: fewer bytes to move
    if target.ndim == 2 and _is_column_major(target):
        target, values = target.T, values.T
    if values.ndim == 2 and _is_column_major(values):
        values = transpose(values.T)
    if values.dtype == target.dtype:
        # as integers: numpy copies its own dtypes without the lock, and by the word
        bits = _BITS.get(target.dtype.itemsize, target.dtype)
        target.view(bits)[...] = values.view(bits)
    elif (values.dtype, target.dtype) == (_INT8, _INT4):  # whose numbers take a byte each on the host
        np.bitwise_and(values.view(np.uint8), 15, out=target.view(np.uint8))
    elif (values.dtype, target.dtype) == (_E2M1, _E4M3):
        target.view(np.uint8)[...] = _E4M3_OF_E2M1[values.view(np.uint8) & 15]
    elif (values.dtype, target.dtype) == (_BF16, _F32):
        # a bfloat16 is the upper half of the float32 of the same value
        np.left_shift(values.view(np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        target[...] = values


def transpose(values: np.ndarray) -> np.ndarray:
    """Returns a contiguous copy of the transpose of a matrix.

    JAX's host runtime transposes matrices with vector instructions while it puts them on a CPU device: at
    7 GB/s if the matrix is in the cache; numpy reaches 1 GB/s.
    """
    bits = _BITS.get(values.dtype.itemsize)
    device = _cpu()
    if values.nbytes < _LEAST_BYTES or bits is None or bits.itemsize > 4:
        return np.ascontiguousarray(values.T)
    words = np.ascontiguousarray(values).view(bits)
    transposed = _by_tiles(words) if device is None else np.asarray(jax.device_put(words.T, device))
    return transposed.view(values.dtype)


def _by_tiles(values: np.ndarray) -> np.ndarray:
    out = np.empty(values.shape[::-1], values.dtype)
    height, width = _TILE
    for row in range(0, values.shape[0], height):
        for column in range(0, values.shape[1], width):
            tile = values[row : row + height, column : column + width]
            out[column : column + width, row : row + height] = tile.T
    return out


def _is_column_major(values: np.ndarray) -> bool:
    return abs(values.strides[0]) < abs(values.strides[1])


@functools.cache
def _cpu() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return None
