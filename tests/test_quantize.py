"""Weights that stay 8 bits: their numbers, their shards, what they weigh, and what cannot be quantised."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import GOLDENS
from flax import nnx
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file
from stepwise import Stepwise

from tpjax import LLM
from tpjax.checkpoints import rounding
from tpjax.checkpoints.canonical import ENDS
from tpjax.checkpoints.kept import Kept
from tpjax.checkpoints.load import load_decoder
from tpjax.checkpoints.opening import open_checkpoint, read_config
from tpjax.checkpoints.parameters import abstract_decoder, parameters
from tpjax.checkpoints.rounding import RoundedSource
from tpjax.config import Quantize
from tpjax.errors import CheckpointError, ConfigError
from tpjax.hardware import HARDWARE
from tpjax.inspect.collectives import find_collectives
from tpjax.inspect.explain import explain_model
from tpjax.layers.linear import dot, grouped_dot
from tpjax.layers.weights import FORMATS, QuantizedWeight, split_axis
from tpjax.layers.widening import product_by_groups
from tpjax.mesh import make_mesh
from tpjax.planning.cost_model import CostModel
from tpjax.planning.workload import Workload
from tpjax.runtime.counts import Counts
from tpjax.runtime.device_speed import step_time
from tpjax.runtime.limits import Limits
from tpjax.runtime.programs import ProgramSpec
from tpjax.runtime.runner import Runner

F32 = jnp.dtype("float32")
TOLERANCE = 1e-4
# Biases, norms with an offset, matrices stored [in, out], parallel blocks, experts, shared ones, latents.
FAMILIES = ("llama", "qwen2", "gemma3", "gpt2", "cohere", "mixtral", "qwen2_moe", "deepseek_v3")
OTHER_FAMILIES = (
    *("cohere2", "gemma", "gemma2", "gpt_neox", "gpt_neox-serial", "granite", "mistral", "olmo2", "phi3"),
    *("qwen3", "qwen3_moe", "smollm3", "starcoder2"),
)
FAST = {("llama", 1), ("llama", 3), ("gpt2", 3), ("mixtral", 3), ("deepseek_v3", 3)}  # in the default tier
GROUP = 12  # inputs that share a scale in int4, in most tests
PROMPT = np.random.default_rng(5).integers(0, 128, 40)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 12 inputs in place of 128, of which the goldens' matrices have at most one."""
    monkeypatch.setitem(FORMATS, "int4", replace(FORMATS["int4"], group=GROUP))


def wide(name: str, tp: int) -> tuple[pytest.MarkDecorator, ...]:
    """Marks what the default tier leaves to `--all`."""
    return () if (name, tp) in FAST else (pytest.mark.slow,)


def dequantised(weight: np.ndarray, kind: Quantize, factor: float = 1) -> np.ndarray:
    """Rounds [out, in] by the definition, one weight at a time, and returns what it stands for, float64."""
    largest = np.abs(weight).max(axis=1, keepdims=True).astype(np.float64)
    scale = (largest / {"int8": 127, "fp8": 448}[kind]).astype(np.float32) * np.float32(factor)
    scale = scale.astype(np.float64)
    numbers = weight / np.where(scale > 0, scale, 1)
    grid = (
        np.arange(-127, 128)
        if kind == "int8"
        else np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    )
    grid = np.unique(grid.astype(np.float64)[np.isfinite(grid.astype(np.float64))])
    above = np.clip(np.searchsorted(grid, numbers), 1, len(grid) - 1)
    nearest = np.where(grid[above] - numbers < numbers - grid[above - 1], grid[above], grid[above - 1])
    return nearest * scale


def worth_of(weight: np.ndarray, kind: Quantize) -> np.ndarray:
    """What [out, in] is worth once rounded, float64: read group by group, each as a tensor of its own."""
    group = GROUP if kind == "int4" else weight.shape[1]
    parts = np.split(weight, range(group, weight.shape[1], group), axis=1)
    worth = []
    for part in parts:
        source = rounded(Arrays(w=np.ascontiguousarray(part)), kind)
        values = source.read("w", tuple(slice(0, size) for size in part.shape))
        scales = source.read("w_scale", (slice(0, len(part)),)).astype(np.float64)
        worth.append(values.astype(np.float64) * scales[:, None])
    return np.concatenate(worth, axis=1)


CASES = [
    *(pytest.param(name, tp, marks=wide(name, tp)) for name in FAMILIES for tp in (1, 3, 5, 8)),
    *(pytest.param(name, 3, marks=pytest.mark.slow) for name in OTHER_FAMILIES),
]


@functools.cache
def expected(name: str, kind: Quantize, head: bool = False) -> np.ndarray:
    """Logits of the NumPy model with dequantised weights in place of those that are quantised."""
    checkpoint, mesh = open_checkpoint(GOLDENS / name), make_mesh(1)
    weights = {}
    model = abstract_decoder(checkpoint.config, mesh, F32, kind, quantize_head=head)
    for parameter in parameters(model, mesh):
        if not parameter.is_scales:
            for source, shape in parameter.layout.canonical_shapes().items():
                key = parameter.canonical(source)
                weight = checkpoint.source.read(key, (slice(None),) * len(shape))
                as_int8: Quantize = "int8" if key in ENDS and kind == "int4" else kind
                weights[key] = worth_of(weight, as_int8) if parameter.is_quantized else weight
    assert head == (parameters(model, mesh)[0].quantized is not None)
    return reference.logits(checkpoint.config, weights, PROMPT)


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_logits_are_those_of_the_dequantised_weights(name: str, tp: int) -> None:
    """A prompt in one chunk; then a token through the cache, which latent attention computes another way."""
    want = expected(name, "int8")
    model = Stepwise(name, tp, max_length=64, quantize="int8")
    got = np.concatenate([model(PROMPT[:-1].tolist()), model(PROMPT[-1:].tolist())])
    assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_logits_in_int4(name: str, tp: int, small_groups: None) -> None:
    """In groups that neither heads nor slices are multiples of."""
    want = expected(name, "int4")
    model = Stepwise(name, tp, max_length=64, quantize="int4")
    got = np.concatenate([model(PROMPT[:-1].tolist()), model(PROMPT[-1:].tolist())])
    assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize("name", ("llama", pytest.param("deepseek_v3", marks=pytest.mark.slow)))
def test_logits_in_fp8(name: str) -> None:
    want = expected(name, "fp8")
    got = Stepwise(name, 2, max_length=64, quantize="fp8")(PROMPT.tolist())
    assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize(
    ("name", "kind", "tp"),
    (
        ("llama", "int4", 3),
        pytest.param("gemma3", "int8", 2),
        *(
            pytest.param(name, kind, tp, marks=pytest.mark.slow)
            for name in ("llama", "gemma3", "llama-bias-tied", "cohere")
            for kind in ("int8", "fp8", "int4")
            for tp in (1, 5, 8)
        ),
    ),
)
def test_logits_with_embedding_and_head(name: str, kind: Quantize, tp: int, small_groups: None) -> None:
    """Apart or one matrix; with int4 these are int8."""
    want = expected(name, kind, True)
    got = Stepwise(name, tp, max_length=64, quantize=kind, quantize_head=True)(PROMPT.tolist())
    assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()


def test_a_quantised_head_is_sharded_and_counted() -> None:
    config, mesh = read_config(GOLDENS / "llama"), make_mesh(3)
    declared = {
        p.name: p for p in parameters(abstract_decoder(config, mesh, F32, "int4", quantize_head=True), mesh)
    }
    for name in ("embed_tokens", "lm_head"):
        values, scales = (declared[f"{name}.weight.{part}"] for part in ("values", "scales"))
        assert (values.dtype, tuple(values.sharding.spec)) == (jnp.int8, ("tp", None))
        assert (scales.dtype, tuple(scales.sharding.spec)) == (F32, ("tp",))
    times = step_time(config, mesh, F32, declared.values())
    hidden = declared["lm_head.weight.values"].layout.shape[1]
    assert times.itemsizes.head == pytest.approx(1 + 4 / hidden)
    held = sum(p.bytes_per_device for p in declared.values() if p.path[0] == "layers" and p.quantized)
    elements = times.held.attention + times.held.mlp
    assert times.itemsizes.weights == pytest.approx(held / elements)


def test_logits_of_experts_with_biases() -> None:
    """Those of the float model with values times scales in its weights' places."""
    plain, quantized = Stepwise("gpt_oss", 3, 64), Stepwise("gpt_oss", 3, 64, quantize="int8")
    stored = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(quantized.weights)}
    filled = []
    for path, leaf in nnx.to_flat_state(plain.weights):
        if (*path, "values") in stored:
            scales = jnp.expand_dims(stored[*path, "scales"], leaf.get_metadata("inputs"))
            leaf = leaf.replace(stored[*path, "values"].astype(jnp.float32) * scales)
        filled.append((path, leaf))
    plain.weights = nnx.from_flat_state(filled)
    want = plain(PROMPT.tolist())
    assert np.abs(quantized(PROMPT.tolist()) - want).max() <= TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize(
    ("name", "tps"),
    (
        ("llama", (2, 3)),
        pytest.param("llama", (1, 2, 3, 5, 8), marks=pytest.mark.slow),
        pytest.param("qwen3_moe", (1, 2, 3, 5, 8), marks=pytest.mark.slow),
    ),
)
def test_greedy_tokens_at_any_tp(name: str, tps: tuple[int, ...]) -> None:
    """Through the engine."""
    tokens = []
    for tp in tps:
        with LLM(GOLDENS / name, tp=tp, quantize="int8", max_model_len=64, max_slots=1) as llm:
            (one,) = llm.generate([PROMPT[:8].tolist()], max_tokens=32, temperature=0, ignore_eos=True)
        tokens.append(one.token_ids)
    assert tokens == tokens[:1] * len(tps) and len(set(tokens[0])) > 8


# --- products ----------------------------------------------------------------------------------------------


def weight_of(
    shape: tuple[int, ...], inputs: int, dtype: Any = np.int8
) -> tuple[QuantizedWeight, np.ndarray]:
    """A random weight of 8 bits, and the float64 array that it stands for."""
    rng = np.random.default_rng(3)
    values = rng.integers(-100, 100, shape).astype(np.float32).astype(dtype)
    scales = rng.uniform(0.5, 2, [1 if axis == inputs else size for axis, size in enumerate(shape)])
    scales = scales.astype(np.float32)
    weight = QuantizedWeight(
        jnp.asarray(values), jnp.asarray(scales), None, PartitionSpec(), inputs - len(shape)
    )
    return weight, values.astype(np.float64) * scales


@pytest.mark.parametrize(
    ("subscripts", "x_shape", "shape", "inputs"),
    (
        ("...i,io->...o", (2, 3, 5), (5, 7), 0),
        ("...i,oi->...o", (3, 5), (7, 5), 1),
        ("...ti,oti->t...o", (2, 3, 4), (7, 3, 4), 1),
        ("td,df->tf", (3, 5), (5, 7), 0),
        ("bskgn,knr->bskgr", (2, 1, 3, 1, 4), (3, 4, 5), 2),  # scales belong to what is summed over
        ("bskgr,kvr->bskgv", (2, 1, 3, 1, 5), (3, 4, 5), 2),
        ("btr,knr->bktn", (2, 6, 5), (3, 4, 5), 2),
    ),
)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("kind", (np.int8, ml_dtypes.float8_e4m3fn), ids=("int8", "fp8"))
def test_dot(subscripts: str, x_shape: Any, shape: Any, inputs: int, dtype: str, kind: Any) -> None:
    weight, full = weight_of(shape, inputs, kind)
    if "oti" in subscripts:  # an input in two axes: both share the scale
        weight = replace(weight, scales=weight.scales[:, :, :1])
        full = np.asarray(weight.values, np.float64) * np.asarray(weight.scales, np.float64)
    x = jnp.asarray(np.random.default_rng(4).normal(size=x_shape), dtype)
    got = dot(x, weight, subscripts)
    assert got.dtype == x.dtype and np.isfinite(np.asarray(got, np.float64)).all()
    want = np.einsum(subscripts, np.asarray(x, np.float64), full)
    tolerance = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    assert np.abs(np.asarray(got, np.float64) - want).max() <= tolerance * np.abs(want).max()
    assert dot(x, weight, subscripts, dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize(
    ("subscripts", "x_shape", "shape", "inputs"),
    (
        ("...i,io->...o", (2, 3, 12), (12, 7), 0),
        ("...i,oi->...o", (3, 12), (7, 12), 1),
        ("...ti,tio->t...o", (2, 3, 6), (3, 6, 7), 1),
        ("td,df->tf", (3, 12), (12, 7), 0),
        ("bskgn,knr->bskgr", (2, 1, 3, 1, 4), (3, 4, 12), 2),  # outputs are what shares a scale
        ("bskgr,kvr->bskgv", (2, 1, 3, 1, 12), (3, 4, 12), 2),
        ("btr,knr->bktn", (2, 6, 12), (3, 4, 12), 2),
    ),
)
@pytest.mark.parametrize("zeros", (False, True))
@pytest.mark.parametrize("group", (1, 3, 6))
def test_scales_of_groups(
    subscripts: str, x_shape: Any, shape: Any, inputs: int, zeros: bool, group: int
) -> None:
    """Both ways to compute it: block after block, as on a CPU, and group after group, as on others."""
    rng = np.random.default_rng(3)
    values = rng.integers(-8, 8, shape).astype(np.int8)
    of_scales = [size // group if axis == inputs else size for axis, size in enumerate(shape)]
    scales, zero = rng.uniform(0.5, 2, of_scales).astype(np.float32), rng.integers(-8, 9, of_scales)
    zero = zero.astype(np.int8) * zeros
    weight = QuantizedWeight(*map(jnp.asarray, (values, scales, zero)), PartitionSpec(), inputs - len(shape))
    weight = weight if zeros else replace(weight, zeros=None)
    full = values.astype(np.float64) - np.repeat(zero, group, inputs)
    full *= np.repeat(scales, group, inputs)
    x = rng.normal(size=x_shape).astype(np.float32)
    want = np.einsum(subscripts, x.astype(np.float64), full)
    by_groups = product_by_groups(
        jnp.asarray(x), weight, subscripts=subscripts, dtype=jnp.float32, precision=None
    )
    for got in (dot(jnp.asarray(x), weight, subscripts), by_groups):
        assert got.shape == want.shape
        assert np.abs(np.asarray(got) - want).max() <= 2e-6 * np.abs(want).max()


def test_float16_products_do_not_overflow() -> None:
    """An output within its range is a sum of unscaled int8 values beyond it."""
    weight = QuantizedWeight(
        jnp.full((2048, 1), 127, jnp.int8), jnp.full((1, 1), 1e-3, jnp.float32), None, PartitionSpec(), -2
    )
    got = dot(jnp.ones((1, 2048), jnp.float16), weight, "...i,io->...o")
    assert got == pytest.approx(2048 * 0.127, rel=1e-3)


def test_grouped_dot() -> None:
    """Each run of rows by the weight and the scales of its own expert; one has no rows."""
    weight, full = weight_of((4, 5, 7), 1)
    sizes = np.array([2, 0, 3, 1])
    x = np.random.default_rng(4).normal(size=(6, 5)).astype(np.float32)
    got = grouped_dot(jnp.asarray(x), weight, jnp.asarray(sizes, jnp.int32))
    want = np.stack(
        [row @ full[expert] for row, expert in zip(x, np.repeat(np.arange(4), sizes), strict=True)]
    )
    assert np.abs(np.asarray(got) - want).max() <= 1e-6 * np.abs(want).max()


def test_split_axis() -> None:
    weight, full = weight_of((6, 5), 1)
    split = split_axis(weight, 0, (3, -1))
    assert isinstance(split, QuantizedWeight) and split.scales.shape == (3, 2, 1)
    assert np.array_equal(
        np.asarray(split.values) * np.asarray(split.scales), full.reshape(3, 2, 5).astype(np.float32)
    )
    assert split_axis(weight, 1, (5, -1)).scales.shape == (6, 1, 1)


# --- loading -----------------------------------------------------------------------------------------------


class Arrays:
    """Tensors by canonical names; counts the elements that are read."""

    def __init__(self, columns_first: bool = False, **arrays: np.ndarray) -> None:
        self.arrays, self.columns_first, self.elements = arrays, columns_first, 0

    def read(self, name: str, index: tuple[slice, ...], memory: np.ndarray | None = None) -> np.ndarray:
        values = self.arrays[name][index]
        self.elements += values.size
        return values

    def itemsize(self, name: str) -> int:
        return self.arrays[name].dtype.itemsize

    def outer_axis(self, name: str) -> int:
        return int(self.columns_first)


def rounded(source: Arrays, kind: Quantize = "int8") -> RoundedSource:
    outputs, inputs = source.arrays["w"].shape
    kept = Kept((outputs, inputs), FORMATS[kind], None)
    return RoundedSource(source, {"w": kept}, Path("model"))


@pytest.mark.parametrize("kind", ("int8", "fp8"))
@pytest.mark.parametrize("dtype", (np.float32, ml_dtypes.bfloat16, np.float16))
@pytest.mark.parametrize("columns_first", (False, True))
def test_rounding(kind: Quantize, dtype: Any, columns_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any boxes and any order: values of parts of rows have the scales of whole rows."""
    monkeypatch.setattr(rounding, "_MEASURED_ELEMENTS", 40)
    monkeypatch.setattr(rounding, "_SAMPLED", 7)  # thus every third of 20, in columns
    weight = np.random.default_rng(1).normal(size=(12, 20)).astype(dtype)
    weight[5] = 0  # a row of zeros has no scale to divide by
    full = weight.astype(np.float32)
    factors = np.exp2(np.arange(8) / 8) if kind == "fp8" else [1]
    tried = np.stack([dequantised(full, kind, np.float32(factor)) for factor in factors])
    errors = ((tried - full)[..., :: 3 if columns_first else 1] ** 2).sum(axis=2)
    want = tried[errors.argmin(axis=0), np.arange(12)]
    source = rounded(Arrays(columns_first, w=weight, other=weight), kind)
    box = (slice(2, 8), slice(5, 9))
    part = source.read("w", box)
    values, scales = source.read("w", (slice(0, 12), slice(0, 20))), source.read("w_scale", (slice(0, 12),))
    assert (values.dtype.itemsize, scales.dtype) == (1, np.float32)
    assert np.array_equal(part.view(np.uint8), values[box].view(np.uint8))
    assert np.allclose(values.astype(np.float64) * scales[:, None], want, rtol=1e-7, atol=0)
    assert np.array_equal(source.read("other", box), weight[box])


def test_rounding_to_int4() -> None:
    """In any boxes: the nearest values, by scales that give -8 to the largest magnitude of each group."""
    weight = np.random.default_rng(1).normal(size=(6, 20)).astype(np.float32)
    weight[5] = 0
    kept = Kept((6, 20), replace(FORMATS["int4"], group=8), 2)
    source = RoundedSource(Arrays(w=weight), {"w": kept}, Path("model"))
    box = (slice(2, 5), slice(5, 9))
    part, some = source.read("w", box), source.read("w_scale", (slice(2, 5), slice(3, 9)))
    values, scales = (
        source.read("w", (slice(0, 6), slice(0, 20))),
        source.read("w_scale", (slice(0, 6), slice(0, 10))),
    )
    assert np.array_equal(part, values[box]) and np.array_equal(some, scales[2:5, 3:9])
    by_group = [scales[:, start : start + width // 2] for start, width in ((0, 8), (4, 8), (8, 4))]
    for first, width, repeated in zip((0, 8, 16), (8, 8, 4), by_group, strict=True):
        part, scale = weight[:, first : first + width].astype(np.float64), repeated[:, :1].astype(np.float64)
        assert (repeated == repeated[:, :1]).all()
        signed = part[np.arange(6), np.abs(part).argmax(axis=1)][:, None]

        def worth(scale: np.ndarray, part: np.ndarray = part) -> np.ndarray:
            return np.clip(np.rint(part / np.where(scale == 0, 1, scale)), -8, 7) * scale

        assert np.array_equal(scale, (signed / -8).astype(ml_dtypes.bfloat16).astype(np.float64))
        assert np.allclose(values[:, first : first + width] * scale, worth(scale))


def test_float8_bits() -> None:
    """Every float8 number, everything half-way between two of them, and what is next to that."""
    numbers = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (numbers[1:] + numbers[:-1]) / 2
    near = [np.nextafter(ties, np.float32(bound)) for bound in (0, 448)]
    values = np.concatenate([numbers, ties, *near, np.float32([1e-30, 1e-45])])
    values = np.concatenate([values, -values])
    cast = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(rounding.float8_bits(values), cast)


def test_rows_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading values finds the scales. A part of the inputs costs the others too; [in, out] is read twice."""
    weight = np.ones((12, 20), np.float32)
    rows, half, columns = ((slice(0, 12), part) for part in (slice(0, 20), slice(0, 10), slice(0, 20)))
    for box, columns_first, elements in ((rows, False, 240), (half, False, 240), (columns, True, 480)):
        arrays = Arrays(columns_first, w=weight)
        source = rounded(arrays)
        source.read("w", box)
        source.read("w_scale", (slice(0, 12),))
        assert arrays.elements == elements


def test_into_memory() -> None:
    memory = np.zeros((12, 20), np.int8)
    out = rounded(Arrays(w=np.ones((12, 20), np.float32))).read("w", (slice(0, 12), slice(0, 20)), memory)
    assert out is memory and (memory == 127).all()


@pytest.mark.parametrize("wrong", (np.nan, np.inf, -np.inf))
def test_weights_that_are_no_numbers(wrong: float) -> None:
    weight = np.ones((12, 20), np.float32)
    weight[7, 3] = wrong
    message = "model: tensor 'w' has a weight in row 7 that is no finite number: it has no int8 scale"
    with pytest.raises(CheckpointError, match=message):
        rounded(Arrays(w=weight)).read("w", (slice(0, 12), slice(0, 20)))


def loaded(path: Path, tp: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The stored arrays of a quantised model, and its parameters, by name."""
    checkpoint, mesh = open_checkpoint(path), make_mesh(tp)
    model = load_decoder(
        checkpoint, abstract_decoder(checkpoint.config, mesh, F32, "int8"), mesh, progress=False
    )
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    arrays = {".".join(map(str, key)): np.asarray(leaf.get_value()) for key, leaf in flat}
    return arrays, {one.name: one for one in parameters(model, mesh)}


@pytest.mark.parametrize("name", ("llama", "gpt2", "qwen2_moe", "deepseek_v3"))
def test_every_tp_reads_the_same_numbers(name: str) -> None:
    """What each canonical row is worth, whatever the slices: rebuilt from the shards of tp=1, 3 and 8."""

    def canonical(tp: int) -> dict[tuple[str, int], bytes]:
        found: dict[tuple[str, int], bytes] = {}
        arrays, declared = loaded(GOLDENS / name, tp)
        for key, one in declared.items():
            if not (one.is_quantized or one.is_scales):
                continue
            whole = {
                s: np.zeros(shape, arrays[key].dtype) for s, shape in one.layout.canonical_shapes().items()
            }
            for piece in one.layout.pieces(tuple(slice(0, size) for size in arrays[key].shape)):
                whole[piece.source][piece.box] = piece.view(arrays[key])
            for source, values in whole.items():
                part = 1 if ".value." in key else 0  # of one matrix, keys and values are stored apart
                found[one.canonical(source), part] = values.tobytes()
        return found

    one = canonical(1)
    assert len(one) > 8 and canonical(3) == one and canonical(8) == one


def test_scales_are_sharded_as_their_outputs() -> None:
    declared = {
        p.name: p
        for p in parameters(
            abstract_decoder(read_config(GOLDENS / "llama"), make_mesh(3), F32, "fp8"), make_mesh(3)
        )
    }
    layer = {name: (p.dtype, tuple(p.sharding.spec)) for name, p in declared.items() if "layers.0." in name}
    e4m3 = jnp.dtype(jnp.float8_e4m3fn)
    assert layer == {
        "layers.0.input_layernorm.weight": (F32, ()),
        "layers.0.mlp.down_proj.weight.scales": (F32, ()),
        "layers.0.mlp.down_proj.weight.values": (e4m3, (None, "tp")),
        "layers.0.mlp.gate_up_proj.weight.scales": (F32, ("tp",)),
        "layers.0.mlp.gate_up_proj.weight.values": (e4m3, ("tp", None)),
        "layers.0.post_attention_layernorm.weight": (F32, ()),
        "layers.0.self_attn.o_proj.weight.scales": (F32, ()),
        "layers.0.self_attn.o_proj.weight.values": (e4m3, (None, "tp")),
        "layers.0.self_attn.qkv_proj.weight.scales": (F32, ("tp",)),
        "layers.0.self_attn.qkv_proj.weight.values": (e4m3, ("tp", None)),
    }
    assert {p.dtype for name, p in declared.items() if "layers." not in name} == {F32}


def test_what_stays_as_it_is() -> None:
    """Embedding, head, routers, and whatever is no matrix."""
    mesh = make_mesh(1)
    for name in FAMILIES:
        config = read_config(GOLDENS / name)
        plain = {p.name: p for p in parameters(abstract_decoder(config, mesh, F32), mesh)}
        changed = {
            ".".join(map(str, p.attribute))
            for p in parameters(abstract_decoder(config, mesh, F32, "int8"), mesh)
            if p.is_quantized
        }
        kept = plain.keys() - changed
        one = {key: len(getattr(p.layout, "one", p.layout).shape) for key, p in plain.items()}
        assert all(one[key] == 2 for key in changed)
        matrices = {key.split(".", 2)[-1] for key in kept if one[key] == 2}
        assert matrices <= {"weight", "mlp.gate.weight", "mlp.shared_expert_gate.weight"}, name


# --- bytes and programs ------------------------------------------------------------------------------------


def test_a_report_has_the_bytes_that_are_stored() -> None:
    report = explain_model(str(GOLDENS / "llama"), tp=2, quantize="int8", dtype="bfloat16")
    rows = {row.name: row for row in report.tensors}
    values = [row for name, row in rows.items() if name.endswith(".values")]
    assert len(values) == 4
    assert all(row.bytes_per_device == row.count * np.prod(row.shard_shape) for row in values)
    scales = rows["layers.*.mlp.down_proj.weight.scales"]
    assert scales.bytes_per_device == 2 * 4 * 48 and scales.replicated
    assert scales.why == "scales of outputs that every device computes or adds up"
    assert rows["layers.*.self_attn.qkv_proj.weight.scales"].why.startswith("column-parallel: each device")
    assert "bfloat16 with int8 weights" in str(report.__rich__().renderables[0])


@pytest.mark.parametrize("tp", (1, 2, 3))
def test_planned_bytes_are_those_stored(tp: int) -> None:
    mesh = make_mesh(tp)
    for name in ("llama", "qwen3_moe", "deepseek_v3"):
        config = read_config(GOLDENS / name)
        model = abstract_decoder(config, mesh, jnp.dtype("bfloat16"), "int8")
        stored = sum(parameter.bytes_per_device for parameter in parameters(model, mesh))
        axis = config.moe.sharded_axis(tp) if config.moe else "width"
        planned = CostModel(Counts("", config), HARDWARE["v5e"], tp, Workload(dtype="int8"), axis)
        assert planned.memory(1, 128).weights == pytest.approx(stored, abs=100)  # float32 vectors of routers


def test_a_step_widens_no_weight_for_good() -> None:
    """Arguments are the 8-bit weights, collectives those of the float model, moving as many bytes."""
    config, mesh = read_config(GOLDENS / "llama"), make_mesh(4)
    limits = Limits(max_slots=1, max_model_len=128, num_pages=2)
    found = []
    for quantize in (None, "int8"):
        runner = Runner(abstract_decoder(config, mesh, F32, quantize), mesh, limits, F32)
        compiled = runner.program(ProgramSpec("decode", 1, greedy=True))
        moved = sorted((one.kind, one.bytes, one.count) for one in find_collectives(compiled.as_text()))
        weights = sum(p.bytes_per_device for p in parameters(runner.abstract_model(), mesh))
        found.append((moved, compiled.memory_analysis().argument_size_in_bytes - weights))
    (plain, rest), (quantized, same_rest) = found
    assert quantized == plain
    assert abs(same_rest - rest) < 4096


# --- what cannot be quantised ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "described"),
    (
        (
            {"quant_method": "fp8", "weight_block_size": [16, 12]},
            "float8 with a scale for each block of 16 × 12",
        ),
        ({"quant_method": "mxfp4"}, "MXFP4, 4 bits with a scale for 32 values"),
    ),
)
def test_a_checkpoint_that_is_quantised_already(
    settings: Mapping[str, Any], described: str, tmp_path: Path
) -> None:
    config = json.loads((GOLDENS / "llama" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    save_file(load_file(GOLDENS / "llama" / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as raised:
        LLM(tmp_path, tp=1, quantize="int8")
    message = str(raised.value)
    assert message == (
        f"quantize='int8' would round weights that are quantised already: {tmp_path} has them as {described},"
        " and rounding those to int8 would lose more of the original: use quantize=None, which computes with "
        "exactly what is stored"
    )
    with pytest.raises(ConfigError, match="would round weights that are quantised already"):
        explain_model(str(tmp_path), tp=1, quantize="fp8")


@pytest.mark.parametrize("wrong", ("int5", "INT8", "", 8, True))
def test_unknown_ways_to_quantise(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"^quantize=.* is not supported: use int8, fp8 or int4$"):
        LLM(GOLDENS / "llama", tp=1, quantize=wrong)


def test_a_head_that_nothing_quantises() -> None:
    message = (
        "^quantize_head=True keeps embedding and head as quantize says or as they are stored: quantize=None, "
        "and .*llama does not store them in 8 or 4 bits$"
    )
    with pytest.raises(ConfigError, match=message):
        LLM(GOLDENS / "llama", tp=1, quantize_head=True)
    with pytest.raises(ConfigError, match=message):
        explain_model(str(GOLDENS / "llama"), tp=1, quantize_head=True)
