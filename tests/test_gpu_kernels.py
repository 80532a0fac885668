"""The kernels for Hopper GPUs against the definitions: on such a GPU, else interpreted on a CPU.

jax 0.12 and later interpret them. On a GPU ``scripts/on_gpu`` runs these tests.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import attention_cases
import grouped_llama
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Shape
from conftest import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from tpjax import LLM
from tpjax.attention import Backend, KernelShape, gpu, selftest
from tpjax.checkpoints.opening import read_config
from tpjax.config import KVDtype, MoEConfig
from tpjax.layers import experts_gpu, quantized_gpu
from tpjax.layers import selftest as products_selftest
from tpjax.layers.experts import ExpertWeights, Matrices, Routing, reference_experts, routed_experts

ON_GPU = jax.default_backend() == "gpu"
CAN_INTERPRET = hasattr(plgpu, "InterpretGPUParams")
pytestmark = pytest.mark.skipif(
    not (ON_GPU or CAN_INTERPRET),
    reason=f"jax {jax.__version__} interprets no GPU kernel: pip install 'jax>=0.12' (Python 3.12), or a GPU",
)
check = partial(attention_cases.check, gpu)


def how(*, races: bool = False) -> Any:
    """How kernels run here."""
    return None if ON_GPU else plgpu.InterpretGPUParams(detect_races=races)


def shape_of(**fields: Any) -> Shape:
    widths = {"width": 64, "value_dim": 64, "page_size": 64, "dtype": "bfloat16"}
    return Shape(**(widths | fields))


# --- experts -----------------------------------------------------------------------------------------------


def assignments(sizes: list[int], further: int) -> np.ndarray:
    """Assignments in random order: so many to each expert, and some to none."""
    assigned = np.repeat(np.arange(len(sizes) + 1), [*sizes, further])
    return np.random.default_rng(1).permutation(assigned).astype(np.int32)


def check_experts(sizes: list[int], inner: int, columns: int, further: int = 0) -> None:
    rng, experts, assigned = np.random.default_rng(0), len(sizes), assignments(sizes, further)
    x = jnp.asarray(rng.normal(size=(len(assigned), inner)), jnp.bfloat16)
    values = rng.normal(size=(experts, inner, columns)) * inner**-0.5
    values[np.equal(sizes, 0)] = np.nan  # an expert without rows is not read
    weights = jnp.asarray(values, jnp.bfloat16)
    tiles = experts_gpu.lay_out(jnp.asarray(assigned)[:, None], experts)
    out = experts_gpu.grouped_product(tiles.take(x), weights, tiles, interpret=how(races=True))
    owned = assigned < experts
    rows, weights_of = np.asarray(x, np.float32)[owned], np.asarray(weights, np.float32)[assigned[owned]]
    found = np.asarray(out[tiles.places[:, 0]], np.float32)[owned]
    np.testing.assert_allclose(found, np.einsum("mi,mic->mc", rows, weights_of), atol=0.02, rtol=0.01)


@pytest.mark.parametrize(
    ("sizes", "inner", "columns", "further"),
    (
        pytest.param([3, 0, 9, 1], 128, 256, 0, id="few rows"),
        pytest.param([0, 0, 5], 192, 128, 4, id="rows of other devices"),
        pytest.param([130, 0, 70, 1, 128], 128, 128, 0, id="many rows"),
        pytest.param([40, 30], 64, 128, 0, id="between"),
        pytest.param([17, 40, 1, 9], 128, 128, 0, id="all parts of tiles, and a second tile"),
    ),
)
def test_experts(sizes: list[int], inner: int, columns: int, further: int) -> None:
    check_experts(sizes, inner, columns, further)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter knows no copies over an edge")
@pytest.mark.parametrize("sizes", ([3, 0, 9, 1], [130, 0, 70, 1, 128]))
def test_experts_whose_last_block_is_half_full(sizes: list[int]) -> None:
    check_experts(sizes, 192, 320)


@pytest.mark.parametrize("compared", (4096, 4))
@pytest.mark.parametrize("sizes", ([0, 0], [1], [4, 0, 2] + 9 * [0], [0, 7, 0, 8, 9], [129, 3]))
def test_layout(sizes: list[int], compared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row has a place of its own, in a tile of its expert."""
    monkeypatch.setattr(experts_gpu, "_COMPARED", compared)
    assigned = assignments(sizes, further=2)
    tiles = experts_gpu.lay_out(jnp.asarray(assigned)[:, None], len(sizes))
    (owned,) = np.nonzero(assigned < len(sizes))
    places = np.asarray(tiles.places)[owned, 0]
    assert len(set(places.tolist())) == len(owned)
    assert (np.asarray(tiles.experts)[places // tiles.size] == assigned[owned]).all()
    tokens = np.arange(len(assigned), dtype=np.float32)[:, None]
    here = np.asarray(tiles.take(jnp.asarray(tokens)))
    if tiles.sources is None:  # each tile has all tokens
        here = np.tile(here, (len(tiles.experts), 1))
    assert (here[places, 0] == owned).all()
    rows = np.bincount(places // tiles.size, minlength=len(tiles.experts))
    np.testing.assert_array_equal(tiles.rows, rows if tiles.sources is not None else len(tokens) * (rows > 0))


@pytest.mark.parametrize("experts", (4, 128))  # fewer than assignments, and more
@pytest.mark.parametrize("tokens", (1, 2, 8))
def test_experts_of_few_tokens(tokens: int, experts: int) -> None:
    """An expert of several tokens has one tile, and experts without tokens are not read.

    Rows are longer than all stages hold, so that these are filled again.
    """
    rng = np.random.default_rng(tokens)
    assigned = np.stack([rng.permutation(experts)[:3] for _ in range(tokens)]).astype(np.int32)
    assigned[-1, 1] = experts  # another device's
    values = rng.normal(size=(experts, 640, 128)) * 640**-0.5
    values[np.setdiff1d(np.arange(experts), assigned)] = np.nan
    weights = jnp.asarray(values, jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(tokens, 640)), jnp.bfloat16)
    tiles = experts_gpu.lay_out(jnp.asarray(assigned), experts)
    distinct = len(np.unique(assigned[assigned < experts]))
    assert np.count_nonzero(np.asarray(tiles.rows)) == distinct
    out = np.asarray(
        experts_gpu.grouped_product(tiles.take(x), weights, tiles, interpret=how(races=True)), np.float32
    )
    here = assigned < experts
    wide = np.asarray(weights, np.float32)[np.where(here, assigned, 0)]
    expected = np.einsum("nd,nkdf->nkf", np.asarray(x, np.float32), wide)
    np.testing.assert_allclose(out[np.asarray(tiles.places)][here], expected[here], atol=0.02, rtol=0.01)


@pytest.mark.parametrize("tokens", (1, *(pytest.param(tokens, marks=pytest.mark.slow) for tokens in (7, 40))))
def test_routed_experts(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are defined, in all a model does with them: with biases, padding and experts elsewhere."""
    moe = MoEConfig(
        num_experts=8,
        experts_per_token=3,
        expert_width=128,
        sparse_layers=(True, True),
        norm_topk_prob=True,
        expert_bias=True,
    )
    config = replace(read_config(GOLDENS / "mixtral"), moe=moe)
    rng = np.random.default_rng(tokens)

    def normal(*shape: int, size: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * size, jnp.bfloat16)

    stack = ExpertWeights(
        normal(8, 128, 256, size=128**-0.5),
        normal(8, 128, 128, size=128**-0.5),
        normal(8, 256),
        normal(8, 128),
    )
    experts = jnp.asarray([rng.permutation(14)[:3] - 3 for _ in range(tokens)], jnp.int32)
    routing = Routing(experts, jnp.asarray(rng.uniform(size=experts.shape), jnp.float32))
    x, calls = normal(tokens, 128), []
    product = experts_gpu.grouped_product

    def counted(*arguments: Any, **named: Any) -> jax.Array:
        calls.append(arguments)
        return product(*arguments, **named)

    monkeypatch.setattr(experts_gpu, "grouped_product", counted)
    found = routed_experts(x, routing, stack, config, Backend("gpu", interpret=how()))
    assert len(calls) == 2
    wide = jax.tree.map(lambda one: one.astype(jnp.float32), stack)
    expected = reference_experts(x.astype(jnp.float32), routing, wide, config)
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()


@pytest.mark.slow
def test_experts_are_checked_before_they_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(selftest, "_CALLS", 1)
    monkeypatch.setattr(selftest, "_ROUNDS", 1)
    monkeypatch.setattr(products_selftest, "_EXPERTS_TOKENS", (3, 20))
    check = partial(
        products_selftest.experts_verdict,
        Backend("gpu", interpret=how()),
        Matrices(128, 128, "bfloat16"),
        jax.devices()[0],
    )
    found = check(tmp_path)
    assert found.right and "where XLA's grouped product takes" in str(found)
    what = "gpu products of experts, hidden 128, width 128, dtype bfloat16"
    assert check(tmp_path) == found and selftest.verdicts(tmp_path, jax.devices()[0]) == [(what, found)]
    product = experts_gpu.grouped_product
    monkeypatch.setattr(experts_gpu, "grouped_product", lambda *a, **named: 1.1 * product(*a, **named))
    assert not check(tmp_path / "wrong").right


# --- weights of 8 and 4 bits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "kind", "group"),
    (
        pytest.param(3, 640, 136, "int4", 128, id="int4"),
        pytest.param(9, 768, 128, "int8", 256, id="groups of two blocks, more than are in shared memory"),
        pytest.param(130, 128, 128, "int4", 64, id="half a block, many tokens", marks=pytest.mark.slow),
        pytest.param(2, 384, 256, "int8", 32, id="a quarter of a block", marks=pytest.mark.slow),
        pytest.param(1, 1152, 128, "fp8", 128, id="fp8, parts", marks=pytest.mark.slow),
        pytest.param(5, 384, 128, "int8", None, id="without scales", marks=pytest.mark.slow),
    ),
)
def test_quantized_product(tokens: int, inputs: int, outputs: int, kind: str, group: int | None) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(tokens, inputs)), jnp.bfloat16)
    values = {
        "int4": lambda: jnp.asarray(rng.integers(-8, 8, (outputs, inputs)), jnp.int4),
        "int8": lambda: jnp.asarray(rng.integers(-128, 128, (outputs, inputs)), jnp.int8),
        "fp8": lambda: jnp.asarray(rng.normal(size=(outputs, inputs)) * 16, jnp.float8_e4m3fn),
    }[kind]()
    wide = np.asarray(values.astype(jnp.float32))
    scales = None
    if group is not None:
        scales = jnp.asarray(rng.uniform(0.5, 2, (inputs // group, outputs)), jnp.bfloat16)
        wide = wide * np.repeat(np.asarray(scales, np.float32), group, axis=0).T
    found = quantized_gpu.quantized_product(x, values, scales, interpret=how(races=True))
    expected = np.asarray(x, np.float32) @ wide.T
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_a_model_in_int4_multiplies_by_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are those of XLA's products of the same weights, up to rounding in bfloat16."""
    product, calls = quantized_gpu.quantized_product, []

    def counted(*arguments: Any, **named: Any) -> jax.Array:
        calls.append(arguments)
        return product(*arguments, **named)

    monkeypatch.setattr(quantized_gpu, "quantized_product", counted)
    folder, prompt, found = grouped_llama.write(tmp_path), [at % 50 for at in range(70)], []
    for attention in ("xla", "gpu"):
        calls.clear()
        settings: Any = {"dtype": "bfloat16", "max_model_len": 128, "max_slots": 1, "quantize": "int4"}
        with LLM(folder, tp=1, attention=attention, **settings) as llm:
            found.append(llm.logits(prompt))
        assert bool(calls) == (attention == "gpu")
    assert np.abs(found[1] - found[0]).max() <= 0.02 * np.abs(found[0]).max()


# --- attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    (
        pytest.param(
            shape_of(lengths=(1, 0, 1), first=(170, 0, 3), heads=2, per_head=3, page_size=128), id="decode"
        ),
        pytest.param(
            shape_of(lengths=(1, 0, 1), first=(370, 0, 3), window=90, cyclic=True, sinks=True, softcap=2.0),
            id="window",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            shape_of(lengths=(3, 2), first=(62, 150), length=3, per_head=2, width=32, value_dim=48),
            id="drafts",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            shape_of(lengths=(64, 9, 0), first=(128, 64, 0), length=64, per_head=3, window=70),
            id="chunks",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            shape_of(
                lengths=(1, 0, 1), first=(170, 0, 3), heads=2, per_head=3, page_size=128, kv_dtype="int8"
            ),
            id="int8",
        ),
        pytest.param(
            shape_of(lengths=(64, 9, 0), first=(128, 64, 0), length=64, width=128, window=70, kv_dtype="fp8"),
            id="fp8 chunks",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            shape_of(
                lengths=(1, 1),
                first=(200, 63),
                width=256,
                value_dim=256,
                kv_dtype="fp8",
                dtype="float16",
                magnitude=1e-4,
            ),
            id="wide heads of small values in fp8 and float16",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            shape_of(lengths=(1, 1), first=(200, 63), width=256, value_dim=256, per_head=9),
            id="wide heads",
            marks=pytest.mark.slow,
        ),
    ),
)
def test_attention(shape: Shape) -> None:
    check(shape, interpret=how())


LLAMA3_8B = KernelShape(8, 4, 128, 128, False, (None,), None, False, 128, "bfloat16")
KERNEL_SHAPES = {
    "Llama-3-8B": LLAMA3_8B,
    "Gemma-2-9B": LLAMA3_8B._replace(per_head=2, width=256, value_dim=256, windows=(100, None), softcap=50.0),
    "gpt-oss-20b": LLAMA3_8B._replace(per_head=8, width=64, value_dim=64, windows=(100, None), sinks=True),
    "SmolLM2 at tp=3": LLAMA3_8B._replace(heads=1, per_head=3, width=64, value_dim=64),
    "Llama-3-8B in fp8": LLAMA3_8B._replace(kv_dtype="fp8"),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", KERNEL_SHAPES.values(), ids=KERNEL_SHAPES)
def test_self_test(shape: KernelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        for constant, value in {"_CONTEXT": 150, "_ROWS": 3, "_CALLS": 1, "_ROUNDS": 1}.items():
            monkeypatch.setattr(selftest, constant, value)
        shape = shape._replace(heads=1, windows=shape.windows[:1])
    verdict = selftest._check("gpu", shape, jax.devices()[0], how())
    print(verdict)
    assert verdict.right


@pytest.mark.slow
def test_self_test_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        for constant in ("_CALLS", "_ROUNDS"):
            monkeypatch.setattr(selftest, constant, 1)
        for constant in ("_INPUTS", "_OUTPUTS"):
            monkeypatch.setattr(products_selftest, constant, 256)
    verdict = products_selftest._check(Backend("gpu", interpret=how()), jax.devices()[0])
    print(verdict)
    assert verdict.right


@pytest.mark.slow
@pytest.mark.parametrize("name", ("gemma", "gemma3"))
def test_the_engine_generates_what_the_page_walk_does(name: str) -> None:
    """In bfloat16 tokens may differ where two are about as likely; logits are as close as rounding."""
    prompt = [at % 50 for at in range(150)]
    found = []
    for attention in ("xla", "gpu"):
        with LLM(GOLDENS / name, tp=1, dtype="bfloat16", max_model_len=256, attention=attention) as llm:
            found.append(llm.logits(prompt))
            assert len(llm.generate([prompt], temperature=0, max_tokens=3)[0].token_ids) == 3
    assert np.abs(found[1] - found[0]).max() <= 0.05 * np.abs(found[0]).max()


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    rows, length = draw(st.integers(1, 4)), draw(st.sampled_from((1, 1, 2, 3, 16, 64)))
    window = draw(st.none() | st.integers(1, 300))
    kv_dtype: KVDtype = draw(st.sampled_from(("auto", "auto", "int8", "fp8")))
    multiple = 16 if kv_dtype == "auto" else 32
    multiples = st.integers(1, 256 // multiple).map(lambda number: multiple * number)
    return Shape(
        lengths=tuple(draw(st.integers(0, length)) for _ in range(rows)),
        first=tuple(draw(st.integers(0, 400)) for _ in range(rows)),
        length=length,
        heads=draw(st.integers(1, 4)),
        per_head=draw(st.sampled_from((1, 2, 3, 4, 5, 8, 16))),
        width=draw(multiples),
        value_dim=draw(multiples),
        page_size=draw(st.sampled_from((64, 128))),
        window=window,
        cyclic=window is not None and draw(st.booleans()),
        softcap=draw(st.none() | st.just(3.0)),
        sinks=draw(st.booleans()),
        dtype=draw(st.sampled_from(("bfloat16", "bfloat16", "float16"))),
        kv_dtype=kv_dtype,
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=15, derandomize=True)
@given(shape=shapes(), seed=st.integers(0, 2**20))
def test_random_shapes(shape: Shape, seed: int) -> None:
    check(shape, seed, interpret=how(races=True))
