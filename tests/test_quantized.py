"""Quantised checkpoints: values worked out by hand, slices, what is read, and every kind of misfit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tpjax.checkpoints.quantized import dequantized
from tpjax.checkpoints.source import TensorInfo, TensorSource
from tpjax.errors import CheckpointError
from tpjax.families.quantization import Quantization

WHERE = Path("somewhere")
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
Box = tuple[slice, ...]


class ArraySource:
    """Tensors in memory, and the shapes read of each."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self._arrays = arrays
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(x.shape, x.dtype) for name, x in arrays.items()
        }
        self.shapes: dict[str, tuple[int, ...]] = {}

    def read(self, name: str, index: Box | None = None, memory: np.ndarray | None = None) -> np.ndarray:
        out = self._arrays[name][index or ()].copy()
        self.shapes[name] = out.shape
        return out


def e4m3_by_hand(byte: int) -> float:
    """Sign, four bits of exponent biased by 7, three of mantissa; no infinities."""
    sign = -1.0 if byte & 128 else 1.0
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def boxes(shape: tuple[int, ...], count: int, seed: int) -> list[Box]:
    """Random boxes, empty ones among them, and the full tensor."""
    rng = np.random.default_rng(seed)
    cuts = [
        tuple(slice(*sorted(int(i) for i in rng.integers(0, size + 1, 2))) for size in shape)
        for _ in range(count)
    ]
    return [(), (slice(1, None),), *cuts]


def read_every_box(source: TensorSource, name: str, expected: np.ndarray) -> None:
    assert source.tensors[name] == TensorInfo(expected.shape, np.dtype(np.float32))
    np.testing.assert_array_equal(source.read(name), expected)
    for box in boxes(expected.shape, 60, seed=1):
        got = source.read(name, box)
        np.testing.assert_array_equal(got, expected[box])
        assert got.dtype == np.float32 and got.flags.c_contiguous


# --- float8 with a scale per block -------------------------------------------------------------------------

FP8 = Quantization("fp8", (4, 3))


def fp8_arrays(shape: tuple[int, ...] = (10, 8), seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    grid = (*shape[:-2], -(-shape[-2] // 4), -(-shape[-1] // 3))
    return rng.normal(size=shape).astype(np.float32).astype(E4M3), rng.uniform(0.1, 9, grid).astype(
        np.float32
    )


def test_every_float8_byte() -> None:
    """On a 16 x 16 tensor with one block, whose scale is 1."""
    weight = np.arange(256, dtype=np.uint8).reshape(16, 16).view(E4M3)
    source = ArraySource(weight=weight, weight_scale_inv=np.ones((1, 1), np.float32))
    got = dequantized(source, Quantization("fp8"), WHERE).read("weight")
    np.testing.assert_array_equal(got.ravel(), [e4m3_by_hand(byte) for byte in range(256)])


@pytest.mark.parametrize("shape", ((10, 8), (8, 9), (3, 2), (2, 10, 8)))
def test_float8_blocks(shape: tuple[int, ...]) -> None:
    """Blocks of 4 x 3, smaller at the edges; element (i, j) has the scale of block (i // 4, j // 3)."""
    weight, scale = fp8_arrays(shape)
    expected = np.zeros(shape, np.float32)
    for at in np.ndindex(shape):
        block = (*at[:-2], at[-2] // 4, at[-1] // 3)
        expected[at] = np.float32(weight[at]) * scale[block]
    source = dequantized(ArraySource(weight=weight, weight_scale_inv=scale), FP8, WHERE)
    read_every_box(source, "weight", expected)


@pytest.mark.parametrize("kind", (ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu))
def test_float8_scales_of_other_dtypes(kind: type) -> None:
    weight, scale = fp8_arrays()
    scale = np.exp2(np.round(np.log2(scale))).astype(np.float32)  # powers of two: exact in both
    wide = dequantized(ArraySource(weight=weight, weight_scale_inv=scale), FP8, WHERE)
    narrow = dequantized(ArraySource(weight=weight, weight_scale_inv=scale.astype(kind)), FP8, WHERE)
    np.testing.assert_array_equal(narrow.read("weight"), wide.read("weight"))


def test_float8_slices_read_their_scales_only() -> None:
    weight, scale = fp8_arrays()
    memory = ArraySource(weight=weight, weight_scale_inv=scale)
    dequantized(memory, FP8, WHERE).read("weight", (slice(5, 9), slice(3, 6)))
    assert memory.shapes == {"weight": (4, 3), "weight_scale_inv": (2, 1)}


def test_float8_beside_plain_tensors() -> None:
    weight, scale = fp8_arrays()
    norm = np.arange(3, dtype=ml_dtypes.bfloat16)
    source = dequantized(ArraySource(norm=norm, weight=weight, weight_scale_inv=scale), FP8, WHERE)
    assert list(source.tensors) == ["norm", "weight"]
    assert source.tensors["norm"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(source.read("norm", (slice(1, 3),)), norm[1:3])


def fp8_refusal(**arrays: np.ndarray) -> str:
    with pytest.raises(CheckpointError) as error:
        dequantized(ArraySource(**arrays), FP8, WHERE)
    return str(error.value)


@pytest.mark.parametrize("shape", ((3, 2), (2, 3), (3, 3, 1), (9,), ()))
def test_float8_scales_that_do_not_fit(shape: tuple[int, ...]) -> None:
    message = fp8_refusal(weight=fp8_arrays()[0], weight_scale_inv=np.ones(shape, np.float32))
    assert message == (
        "somewhere: tensor 'weight' of shape [10, 8] in blocks of [4, 3] needs scales of shape [3, 3], "
        f"'weight_scale_inv' has {list(shape)}"
    )


def test_float8_other_misfits() -> None:
    weight, scale = fp8_arrays()
    assert fp8_refusal(weight=weight) == (
        "somewhere: tensor 'weight' is float8, but 'weight_scale_inv' is missing"
    )
    assert "'weight' of float32 with scales of float32" in fp8_refusal(
        weight=weight.astype(np.float32), weight_scale_inv=scale
    )
    assert "scales of int8" in fp8_refusal(weight=weight, weight_scale_inv=scale.astype(np.int8))
    assert "of shape [8] has no rows and columns" in fp8_refusal(weight=weight[0], weight_scale_inv=scale)


@pytest.mark.parametrize("wrong", (np.nan, -np.inf))
def test_float8_scales_that_are_no_numbers(wrong: float) -> None:
    """Where a weight is dequantised while it loads; elements of other blocks can be read."""
    weight, scale = fp8_arrays()
    scale[1, 2] = wrong
    source = dequantized(ArraySource(weight=weight, weight_scale_inv=scale), FP8, WHERE)
    assert np.isfinite(source.read("weight", (slice(0, 10), slice(0, 6)))).all()
    message = f"somewhere: tensor 'weight' has a scale that is no finite number: {wrong} at [5, 2]"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        source.read("weight", (slice(5, 9), slice(3, 8)))


def test_float8_blocks_of_modelopt() -> None:
    """FP8_PB_WO: scales [blocks of rows, 1, blocks of columns, 1]."""
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(300, 260)).astype(np.float32).astype(E4M3)
    scale = rng.uniform(0.1, 9, (3, 3)).astype(np.float32)
    expected = weight.astype(np.float32) * np.kron(scale, np.ones((128, 128), np.float32))[:300, :260]
    modelopt = Quantization("modelopt", (128, 128))
    memory = ArraySource(weight=weight, weight_scale=scale[:, None, :, None])
    source = dequantized(memory, modelopt, WHERE)
    read_every_box(source, "weight", expected)
    box = (slice(130, 250), slice(100, 200))
    np.testing.assert_array_equal(source.read("weight", box), expected[box])
    assert memory.shapes == {"weight": (120, 100), "weight_scale": (1, 1, 2, 1)}
    with pytest.raises(CheckpointError, match=r"scales of shape \[3, 3\], 'weight_scale' has \[3, 1, 2, 1\]"):
        dequantized(ArraySource(weight=weight, weight_scale=scale[:, None, :2, None]), modelopt, WHERE)


# --- MXFP4 -------------------------------------------------------------------------------------------------

MXFP4 = Quantization("mxfp4", (1, 32), 4)


def fp4_by_hand(code: int) -> float:
    """Sign, two bits of exponent biased by 1, one of mantissa."""
    sign = -1.0 if code & 8 else 1.0
    exponent, mantissa = (code >> 1) & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def mxfp4_arrays(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three experts, five rows, two groups."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (3, 5, 2, 16), dtype=np.uint8)
    return blocks, rng.integers(118, 130, (3, 5, 2), dtype=np.uint8)


def test_mxfp4_values() -> None:
    blocks, scales = mxfp4_arrays()
    expected = np.zeros((3, 64, 5), np.float32)
    for expert, column, row in np.ndindex(expected.shape):
        group, place = divmod(column, 32)
        byte = int(blocks[expert, row, group, place // 2])
        code = byte >> 4 if place % 2 else byte & 15  # the even places are the low halves
        expected[expert, column, row] = fp4_by_hand(code) * 2.0 ** (int(scales[expert, row, group]) - 127)
    source = dequantized(ArraySource(down_blocks=blocks, down_scales=scales), MXFP4, WHERE)
    assert list(source.tensors) == ["down"]
    read_every_box(source, "down", expected)


def test_mxfp4_codes_are_those_of_ml_dtypes() -> None:
    codes = np.arange(16, dtype=np.uint8)
    blocks = (codes | (codes << 4)).reshape(1, 1, 1, 16)
    source = dequantized(
        ArraySource(w_blocks=blocks, w_scales=np.full((1, 1, 1), 128, np.uint8)), MXFP4, WHERE
    )
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(source.read("w")[0, :, 0], 2 * np.repeat(values, 2))


def test_mxfp4_is_what_transformers_reads() -> None:
    torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", reason="pip install -e '.[parity]'")
    blocks, scales = mxfp4_arrays(seed=3)
    expected = mxfp4.convert_moe_packed_tensors(
        torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32
    )
    source = dequantized(ArraySource(w_blocks=blocks, w_scales=scales), MXFP4, WHERE)
    np.testing.assert_array_equal(source.read("w"), expected.numpy())


def test_mxfp4_slices_read_their_groups_only() -> None:
    blocks, scales = mxfp4_arrays()
    memory = ArraySource(w_blocks=blocks, w_scales=scales)
    dequantized(memory, MXFP4, WHERE).read("w", (slice(1, 2), slice(33, 40), slice(0, 3)))
    assert memory.shapes == {"w_blocks": (1, 3, 1, 16), "w_scales": (1, 3, 1)}


def test_mxfp4_beside_plain_tensors() -> None:
    blocks, scales = mxfp4_arrays()
    bias = np.arange(6, dtype=np.float32)
    source = dequantized(ArraySource(bias=bias, w_blocks=blocks, w_scales=scales), MXFP4, WHERE)
    assert set(source.tensors) == {"bias", "w"}
    np.testing.assert_array_equal(source.read("bias", (slice(2, 4),)), bias[2:4])


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"w_scales": np.zeros((3, 5, 1), "u1")}, "scales of shape [3, 5, 2], 'w_scales' has [3, 5, 1]"),
        ({"w_scales": None}, "tensor 'w_blocks' has no 'w_scales' beside it"),
        ({"w": np.zeros(1, np.float32)}, "'w_blocks' and 'w' are both there"),
        ({"w_scales": np.zeros((3, 5, 2), np.int8)}, "is uint8 and its scales int8"),
        ({"w_blocks": np.zeros((3, 5, 2, 8), np.uint8)}, "[3, 5, 2, 8], not [experts, rows, groups, 16]"),
        ({"w_blocks": np.zeros((5, 2, 16), np.uint8)}, "[5, 2, 16], not [experts, rows, groups, 16]"),
    ),
)  # fmt: skip
def test_mxfp4_misfits(change: dict[str, np.ndarray | None], message: str) -> None:
    blocks, scales = mxfp4_arrays()
    arrays = {"w_blocks": blocks, "w_scales": scales, **change}
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        dequantized(ArraySource(**{k: v for k, v in arrays.items() if v is not None}), MXFP4, WHERE)
    assert str(error.value).startswith("somewhere: tensor ")


# --- NVFP4 -------------------------------------------------------------------------------------------------


def test_nvfp4_values() -> None:
    """Stacked too; element (i, j) is the low half of byte (i, j // 2) where j is even."""
    rng = np.random.default_rng(5)
    pairs = rng.integers(0, 256, (2, 5, 20), dtype=np.uint8)
    scale = rng.uniform(0.1, 400, (2, 5, 3)).astype(np.float32).astype(E4M3)
    shared = np.float32(0.37)
    expected = np.zeros((2, 5, 40), np.float32)
    for at in np.ndindex(expected.shape):
        byte = int(pairs[(*at[:2], at[2] // 2)])
        product = np.float32(e4m3_by_hand(int(scale.view(np.uint8)[(*at[:2], at[2] // 16)]))) * shared
        expected[at] = np.float32(fp4_by_hand(byte >> 4 if at[2] % 2 else byte & 15)) * product
    arrays = {"weight": pairs, "weight_scale": scale, "weight_scale_2": np.full(1, shared)}
    memory = ArraySource(**arrays)
    source = dequantized(memory, Quantization("modelopt", (1, 16), 4), WHERE)
    assert list(source.tensors) == ["weight"]
    read_every_box(source, "weight", expected)
    memory.shapes.clear()
    source.read("weight", (slice(1, 2), slice(0, 3), slice(17, 24)))
    assert memory.shapes == {"weight": (1, 3, 4), "weight_scale": (1, 3, 1), "weight_scale_2": (1,)}


def test_unknown_tensor() -> None:
    for quantization in (FP8, MXFP4):
        with pytest.raises(CheckpointError, match="no tensor 'x' among its 0 tensors"):
            dequantized(ArraySource(), quantization, WHERE).read("x")
