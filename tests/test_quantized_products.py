"""The kernel for TPUs of products with scales for groups of inputs, interpreted, against the definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grouped_llama
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpjax import LLM
from tpjax.attention import Backend, selftest
from tpjax.layers import quantized_tpu
from tpjax.layers.selftest import product_verdict


@pytest.mark.parametrize("kind", ("int4", "int8", "float8_e4m3fn"))
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "group", "zeros"),
    (
        pytest.param(3, 256, 640, 32, False, id="outputs that fill no tile"),
        pytest.param(3, 1344, 128, 64, False, id="an odd number of half lanes"),
        pytest.param(40, 1536, 128, 128, True, id="zero points, two blocks"),
        pytest.param(1030, 128, 136, 128, False, id="two tiles of tokens"),
    ),
)
def test_product(kind: str, tokens: int, inputs: int, outputs: int, group: int, zeros: bool) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(tokens, inputs)), jnp.bfloat16)
    values = jnp.asarray(rng.integers(-8, 8, (inputs, outputs)), jnp.int8).astype(kind)
    shape = inputs // group, outputs
    scales = jnp.asarray(rng.uniform(0.5, 2, shape), jnp.bfloat16)
    zero = jnp.asarray(rng.integers(-8, 8, shape), jnp.int8) if zeros else None
    found = quantized_tpu.quantized_product(x, values, scales, zero, interpret=True)
    wide = np.asarray(values.astype(jnp.float32))
    if zero is not None:
        wide = wide - np.repeat(np.asarray(zero, np.float32), group, axis=0)
    wide = wide * np.repeat(np.asarray(scales, np.float32), group, axis=0)
    expected = np.asarray(x, np.float32) @ wide
    # a value times its scale is rounded once, and so is the output
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.006 * np.abs(expected).max())


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


def test_a_verdict_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(selftest, "_CALLS", 1)
    monkeypatch.setattr(selftest, "_ROUNDS", 1)
    found = product_verdict(INTERPRETED, jax.devices()[0], tmp_path)
    assert found.right and "where XLA's product takes" in str(found)
    assert selftest.verdicts(tmp_path) == [found]
    assert product_verdict(INTERPRETED, jax.devices()[0], tmp_path) == found


@pytest.mark.parametrize("wrong", (0.0, np.nan))
def test_a_wrong_kernel_is_found(wrong: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def product(x: jax.Array, values: jax.Array, *_: Any, **__: Any) -> jax.Array:
        return jnp.full((len(x), values.shape[1]), wrong, x.dtype)

    monkeypatch.setattr(quantized_tpu, "quantized_product", product)
    found = product_verdict(INTERPRETED, jax.devices()[0], tmp_path)
    assert not found.right and not found.use_kernel
