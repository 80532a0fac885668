"""Copies of blocks against numpy's own assignment: every order in memory, dtype and size."""

from __future__ import annotations

import itertools

import jax
import ml_dtypes
import numpy as np
import pytest

from tpjax.checkpoints import blocks

DTYPES = tuple(map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float16)))
SHAPES = ((3, 5), (1, 400), (400, 1), (129, 257), (640, 333))  # the last two are turned round by JAX


def random(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Values of any bits that are numbers, zeros of both signs, infinities and the smallest ones."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=shape).astype(np.float32) * 10.0 ** rng.integers(-3, 3, shape)
    values.reshape(-1)[:4] = (0.0, -0.0, np.inf, 1e-30)[: values.size]
    return values.astype(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copy_is_assignment(shape: tuple[int, int]) -> None:
    orders = ("C", "F")
    for stored, wanted, order, target_order in itertools.product(DTYPES, DTYPES, orders, orders):
        values = np.asarray(random(shape, stored), order=order)
        target = np.full((shape[0] + 2, shape[1] + 3), 7, wanted, order=target_order)
        expected = target.copy(order="K")
        expected[1:-1, 2:-1] = values
        blocks.copy_into(target[1:-1, 2:-1], values)
        assert target.tobytes() == expected.tobytes(), (stored, wanted, order, target_order)


def test_vectors_and_empty_blocks() -> None:
    for stored, wanted in itertools.product(DTYPES, DTYPES):
        values, target = random((9,), stored), np.zeros(9, wanted)
        blocks.copy_into(target, values)
        assert target.tobytes() == values.astype(wanted).tobytes()
        blocks.copy_into(np.empty((0, 4), wanted), random((0, 4), stored))


@pytest.mark.parametrize("dtype", (np.uint8, np.float16, np.float32, np.float64), ids=str)
@pytest.mark.parametrize("jax_has_a_cpu", (True, False))
def test_transpose(dtype: type, jax_has_a_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With JAX's runtime, and in tiles by numpy where JAX was told to leave the CPU alone."""
    if not jax_has_a_cpu:
        monkeypatch.setattr(blocks, "_cpu", lambda: None)
    values = np.random.default_rng(1).integers(0, 255, (700, 1030)).astype(dtype)
    for view in (values, values[3:400, 5:1000], values[::2]):
        turned = blocks.transpose(view)
        assert turned.flags.c_contiguous and turned.dtype == dtype
        np.testing.assert_array_equal(turned, view.T)


def test_jax_takes_aligned_memory_as_it_is() -> None:
    """No second copy of the weights: what is loaded is what was filled."""
    for dtype in DTYPES:
        shapes = [(7, 1001), (), (0, 3), (5,), (129, 3, 1)]
        arrays = blocks.empty(shapes, dtype, zeros=True)
        assert [array.shape for array in arrays] == shapes
        for number, memory in enumerate(arrays, start=1):
            array = jax.device_put(memory, jax.devices("cpu")[0])
            assert memory.size == 0 or array.unsafe_buffer_pointer() == memory.ctypes.data
            assert memory.dtype == dtype and not memory.any()
            memory[...] = number  # none overlaps another
        for number, memory in enumerate(arrays, start=1):
            assert (memory == number).all()
