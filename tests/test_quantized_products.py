"""The kernel for TPUs of products with scales for groups of inputs, interpreted, against the definition."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import grouped_llama
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from jax.sharding import PartitionSpec

from tpjax import LLM
from tpjax.attention import XLA, Backend, KernelShape, Verdict, selftest
from tpjax.checkpoints.opening import read_config
from tpjax.engine import loading
from tpjax.layers import quantized_tpu
from tpjax.layers.experts import ExpertWeights, Matrices, tiled_experts
from tpjax.layers.selftest import product_verdict
from tpjax.layers.weights import QuantizedWeight


@pytest.mark.parametrize("kind", ("int4", "int8", "float8_e4m3fn"))
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "group", "zeros"),
    (
        pytest.param(3, 256, 640, 32, False, id="outputs that fill no tile"),
        pytest.param(3, 1344, 128, 64, False, id="an odd number of half lanes"),
        pytest.param(40, 1536, 128, 128, True, id="zero points, two blocks"),
        pytest.param(1030, 128, 136, 128, False, id="two tiles of tokens"),
        pytest.param(9, 4160, 136, 64, False, id="a last block that is not full"),
    ),
)
def test_product(kind: str, tokens: int, inputs: int, outputs: int, group: int, zeros: bool) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(tokens, inputs)), jnp.bfloat16)
    values = jnp.asarray(rng.integers(-8, 8, (inputs, outputs)), jnp.int8).astype(kind)
    shape = inputs // group, outputs
    scales = jnp.asarray(rng.uniform(0.5, 2, shape), jnp.bfloat16)
    zero = jnp.asarray(rng.integers(-8, 8, shape), jnp.int8) if zeros else None
    stack = [None if one is None else jnp.stack([jnp.ones_like(one), one]) for one in (values, scales, zero)]
    found = quantized_tpu.quantized_product(x, *stack, 1, interpret=True)
    wide = np.asarray(values.astype(jnp.float32))
    if zero is not None:
        wide = wide - np.repeat(np.asarray(zero, np.float32), group, axis=0)
    wide = wide * np.repeat(np.asarray(scales, np.float32), group, axis=0)
    expected = np.asarray(x, np.float32) @ wide
    # a value times its scale is rounded once, and so is the output
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.006 * np.abs(expected).max())


def test_which_products() -> None:
    """Llama-3-8B's down projection over three devices has 75 groups of 64 inputs on each."""
    assert quantized_tpu.takes(64, jnp.dtype(jnp.int4), 75, 64)
    assert quantized_tpu.choose_tiling(64, 4096, 75, 64) == (64, 1024, 512)
    assert quantized_tpu.choose_tiling(64, 4096, 45, 64) == (64, 45 * 64, 128)  # all at once
    assert quantized_tpu.choose_tiling(64, 4096, 112, 128) == (64, 1024, 512)
    assert not quantized_tpu.takes(64, jnp.dtype(jnp.int4), 75, 4)
    assert not quantized_tpu.takes(64, jnp.dtype(jnp.int4), 31, 136)


@pytest.mark.parametrize("tp", (1, 2))
def test_a_model_in_int4_multiplies_by_the_kernel(
    tp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are those of XLA's products of the same weights, up to rounding in bfloat16."""
    product, calls = quantized_tpu.quantized_product, []

    def counted(*arguments: Any, **named: Any) -> jax.Array:
        calls.append(arguments)
        return product(*arguments, **named)

    monkeypatch.setattr(quantized_tpu, "quantized_product", counted)
    folder, prompt, found = grouped_llama.write(tmp_path), [at % 50 for at in range(70)], []
    for attention in ("xla", "tpu"):
        calls.clear()
        settings: Any = {"dtype": "bfloat16", "max_model_len": 128, "max_slots": 1, "quantize": "int4"}
        with LLM(folder, tp=tp, attention=attention, **settings) as llm:
            found.append(llm.logits(prompt))
        assert bool(calls) == (attention == "tpu")
    assert np.abs(found[1] - found[0]).max() <= 0.02 * np.abs(found[0]).max()


INTERPRETED = Backend("tpu", interpret=True)


def test_experts_stay_in_their_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reads one expert of it; what comes out is what XLA computes from slices."""
    taken, product = [], quantized_tpu.quantized_product

    def counted(x: jax.Array, values: jax.Array, *arguments: Any, **named: Any) -> jax.Array:
        taken.append(values.shape)
        return product(x, values, *arguments, **named)

    monkeypatch.setattr(quantized_tpu, "quantized_product", counted)
    rng = np.random.default_rng(0)

    def stack(inputs: int, outputs: int, backend: Backend) -> QuantizedWeight:
        values = jnp.asarray(rng.integers(-8, 8, (3, inputs, outputs)), jnp.int8)
        scales = jnp.asarray(rng.uniform(0.01, 0.02, (3, inputs // 64, outputs)), jnp.bfloat16)
        return QuantizedWeight(values, scales, None, PartitionSpec(), -2, backend)

    config = read_config(GOLDENS / "mixtral")
    x = jnp.asarray(rng.normal(size=(20, 256)), jnp.bfloat16)
    sizes, found = jnp.asarray([9, 0, 11]), []
    for backend in (XLA, INTERPRETED):
        rng = np.random.default_rng(1)
        weights = ExpertWeights(stack(256, 256, backend), stack(128, 256, backend), None, None)
        tiled = jax.jit(partial(tiled_experts, config=config, tile=16))
        found.append(np.asarray(tiled(x, sizes, weights), np.float32))
        assert set(taken) == (set() if backend is XLA else {(3, 256, 256), (3, 128, 256)})
    assert np.abs(found[1] - found[0]).max() <= 0.02 * np.abs(found[0]).max() > 0


def test_a_verdict_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(selftest, "_CALLS", 1)
    monkeypatch.setattr(selftest, "_ROUNDS", 1)
    found = product_verdict(INTERPRETED, jax.devices()[0], tmp_path)
    assert found.right and "where XLA's product takes" in str(found)
    what = "tpu products with scales for groups"
    assert selftest.verdicts(tmp_path, jax.devices()[0]) == [(what, found)]
    assert product_verdict(INTERPRETED, jax.devices()[0], tmp_path) == found


@pytest.mark.parametrize(
    ("asked", "name"), (("auto", "tpu"), ("tpu", "tpu"), ("auto", "gpu"), ("gpu", "gpu"))
)
def test_products_are_checked_however_attention_was_chosen(
    asked: Any, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a chip, and where they may be multiplied by: nobody asked for the kernels of products."""
    checked: list[str] = []

    def verdict(kernel: str, *_: Any) -> Verdict:
        checked.append(kernel)
        return Verdict("a chip", 1.0, 0.02, 1.0, 2.0)

    monkeypatch.setattr(loading, "choose_backend", lambda *_: Backend(name))
    for kernel in ("product", "experts"):
        monkeypatch.setattr(f"tpjax.layers.selftest.{kernel}_verdict", partial(verdict, kernel))
    shape = KernelShape.of(read_config(GOLDENS / "llama"), 1, jnp.dtype("bfloat16"), 128)
    device, narrow, wide = jax.devices()[0], Matrices(64, 96, "bfloat16"), Matrices(64, 128, "bfloat16")
    assert (
        loading.choose_backends(asked, [shape] * 2, [None, narrow], device, grouped=False)
        == [Backend(name)] * 2
    )
    assert checked == []
    wrong = Backend(name, products=False), Backend(name, products=False, experts=name == "tpu")
    assert loading.choose_backends(asked, [shape] * 3, [None, wide, wide], device, grouped=True) == [
        wrong[0],
        wrong[1],
        wrong[1],
    ]
    assert checked == ["product", "product", *(["experts"] if name == "gpu" else [])]
    monkeypatch.setattr(loading, "choose_backend", lambda *_: INTERPRETED)
    assert loading.choose_backends(asked, [shape], [wide], device, grouped=True) == [INTERPRETED]


@pytest.mark.parametrize("wrong", (0.0, np.nan, "no zero points", "no second tile"))
def test_a_wrong_kernel_is_found(wrong: float | str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Among zero points and prompts, which it computes in other ways than a few rows, too."""
    right = quantized_tpu.quantized_product
    monkeypatch.setattr(selftest, "_CALLS", 1)
    monkeypatch.setattr(selftest, "_ROUNDS", 1)

    def product(
        x: jax.Array, values: jax.Array, scales: jax.Array, zeros: jax.Array | None, *rest: Any, **named: Any
    ) -> jax.Array:
        if isinstance(wrong, float):
            return jnp.full((len(x), values.shape[2]), wrong, x.dtype)
        zeros = None if wrong == "no zero points" else zeros
        y: jax.Array = right(x, values, scales, zeros, *rest, **named)
        return y.at[128:].set(0) if wrong == "no second tile" else y

    monkeypatch.setattr(quantized_tpu, "quantized_product", product)
    found = product_verdict(INTERPRETED, jax.devices()[0], tmp_path)
    assert not found.right and not found.use_kernel and not found.problem
