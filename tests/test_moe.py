"""Mixtures of experts against plain NumPy, with expert parallelism on and off; collectives of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from flax import nnx
from jax.sharding import NamedSharding

from tpjax.checkpoints.parameters import abstract_decoder, parameters
from tpjax.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig, NormConfig
from tpjax.errors import ConfigError
from tpjax.inspect.collectives import find_collectives
from tpjax.inspect.explain import explain_model
from tpjax.layers.experts import (
    ExpertWeights,
    Routing,
    gated_expert,
    ragged_experts,
    reference_experts,
    routed_experts,
    tiled_experts,
)
from tpjax.layers.moe import MoE
from tpjax.mesh import make_mesh
from tpjax.runtime.limits import Limits
from tpjax.runtime.programs import ProgramSpec
from tpjax.runtime.runner import Runner
from tpjax.sharding import REPLICATED

D, E, K, F = 24, 6, 2, 10
F32 = jnp.dtype("float32")
PLAIN = MoEConfig(
    num_experts=E, experts_per_token=K, expert_width=F, sparse_layers=(True,), norm_topk_prob=True
)
QWEN2 = replace(PLAIN, norm_topk_prob=False, shared_width=7, shared_gate=True)
GPT_OSS = replace(PLAIN, router_bias=True, expert_bias=True, swiglu_limit=1.5)
DEEPSEEK = replace(
    PLAIN,
    num_experts=12,
    experts_per_token=3,
    scoring="sigmoid",
    correction_bias=True,
    num_groups=4,
    groups_per_token=2,
    routed_scale=2.5,
    shared_width=9,
)
KINDS = {"plain": PLAIN, "qwen2": QWEN2, "gpt_oss": GPT_OSS, "deepseek": DEEPSEEK}


def model_config(moe: MoEConfig) -> ModelConfig:
    layers = len(moe.sparse_layers)
    return ModelConfig(
        model_type="test",
        vocab_size=40,
        hidden_size=D,
        num_layers=layers,
        max_position_embeddings=256,
        attention=AttentionConfig(
            num_heads=3,
            num_kv_heads=1,
            head_dim=8,
            query_scale=1.0,
            layer_types=("full_attention",) * layers,
        ),
        mlp=MLPConfig(intermediate_size=30),
        moe=moe,
        norm=NormConfig(eps=1e-5),
    )


# --- plain NumPy, one token and one expert at a time -------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    exp = np.exp(x - x.max())
    return exp / exp.sum()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def plain_route(moe: MoEConfig, w: dict[str, np.ndarray], token: np.ndarray) -> dict[int, float]:
    """The weight of each chosen expert."""
    logits = w["gate.weight"] @ token + w.get("gate.bias", 0.0)
    scores = softmax(logits) if moe.scoring == "softmax" else sigmoid(logits)
    routing_scores = scores + w.get("gate.e_score_correction_bias", 0.0)
    if moe.num_groups > 1:
        groups = routing_scores.reshape(moe.num_groups, -1)
        worth = np.sort(groups, axis=1)[:, -2:].sum(axis=1)
        groups[np.argsort(-worth)[moe.groups_per_token :]] = -np.inf  # a view of routing_scores
    chosen = np.argsort(-routing_scores)[: moe.experts_per_token]
    total = scores[chosen].sum() if moe.norm_topk_prob else 1.0
    return {int(e): float(scores[e] / total * moe.routed_scale) for e in chosen}


def plain_expert(moe: MoEConfig, w: dict[str, np.ndarray], name: str, token: np.ndarray) -> np.ndarray:
    def project(part: str, x: np.ndarray) -> np.ndarray:
        return w[f"{name}.{part}.weight"] @ x + w.get(f"{name}.{part}.bias", 0.0)

    gate, up = project("gate_proj", token), project("up_proj", token)
    if moe.swiglu_limit is None:
        return project("down_proj", gate * sigmoid(gate) * up)
    gate, up = np.minimum(gate, moe.swiglu_limit), np.clip(up, -moe.swiglu_limit, moe.swiglu_limit)
    return project("down_proj", (up + 1) * gate * sigmoid(moe.swiglu_alpha * gate))


def plain_moe(moe: MoEConfig, w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    out = np.zeros_like(x)
    for n, token in enumerate(x):
        for e, weight in plain_route(moe, w, token).items():
            out[n] += weight * plain_expert(moe, w, f"experts.{e}", token)
        if moe.shared_width:
            gate = sigmoid(w["shared_expert_gate.weight"] @ token) if moe.shared_gate else 1.0
            out[n] += gate * plain_expert(moe, w, "shared_expert", token)
    return out


# --- the layer on a mesh -----------------------------------------------------------------------------------


def canonical_weights(moe: MoEConfig) -> dict[str, np.ndarray]:
    """Random tensors under the names and of the shapes the layer declares."""
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape)
        for parameter in declared(moe, tp=1)
        for name, shape in parameter.layout.canonical_shapes().items()
    }


def declared(moe: MoEConfig, tp: int) -> list[Any]:
    """The layer's own parameters, as the loader sees them."""
    mesh = make_mesh(tp)
    decoder = abstract_decoder(model_config(moe), mesh, F32)
    return [p for p in parameters(decoder, mesh) if ".mlp." in p.name]


def build(moe: MoEConfig, tp: int, weights: dict[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """The layer with these canonical weights."""
    mesh = make_mesh(tp)
    with jax.set_mesh(mesh):
        layer = MoE(model_config(moe), tp, F32)
        graph, state = nnx.split(layer)
        for _, variable in nnx.to_flat_state(state):
            layout = variable.get_metadata("layout")
            stored = layout.read(
                lambda name, box: weights[name][box], (slice(None),) * len(layout.shape), np.dtype(np.float32)
            )
            variable.set_value(jax.device_put(stored, variable.get_value().sharding))

        @jax.jit
        def run(state: Any, x: jax.Array, present: jax.Array) -> jax.Array:
            return nnx.merge(graph, state)(x, present)

    def call(x: np.ndarray, present: np.ndarray | None = None) -> np.ndarray:
        with jax.set_mesh(mesh):
            x32 = jax.device_put(x.astype(np.float32), NamedSharding(mesh, REPLICATED))
            return np.asarray(run(state, x32, np.ones(len(x), bool) if present is None else present))

    return call


@pytest.mark.parametrize(
    ("tp", "sharding"),
    [(1, "auto"), (2, "on"), (3, "on"), (3, "off"), (4, "auto"), (5, "off"), (8, "auto")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_layer_equals_plain_numpy(kind: str, tp: int, sharding: Any) -> None:
    """Few rows as in decoding; at two tp also more rows than a tile."""
    moe = replace(KINDS[kind], expert_parallel=sharding)
    weights = canonical_weights(moe)
    layer = build(moe, tp, weights)
    x = np.random.default_rng(1).normal(size=(150 if tp in (3, 4) else 3, D))
    expected = plain_moe(moe, weights, x)
    assert np.abs(layer(x) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("tp", "sharding"), [(1, "auto"), (2, "on"), (3, "off")])
def test_padding_takes_no_expert(tp: int, sharding: Any) -> None:
    """Whatever the rows of padding hold, they get nothing, and the others what they get alone."""
    moe = replace(KINDS["plain"], expert_parallel=sharding)
    layer = build(moe, tp, canonical_weights(moe))
    x = np.random.default_rng(2).normal(size=(6, D))
    present = np.array([True, False, True, True, False, False])
    out = layer(x, present)
    assert (out[~present] == 0).all()
    np.testing.assert_allclose(out[present], layer(x)[present], atol=1e-6)


def test_router_weights_are_those_of_transformers() -> None:
    """Scores worked out by hand: a softmax over all that is not normalised again keeps its size."""
    weights = {"gate.weight": np.zeros((E, D))}
    weights["gate.weight"][:, 0] = np.log([1, 2, 4, 8, 16, 1])
    token = np.eye(D)[0]
    assert plain_route(PLAIN, weights, token) == pytest.approx({4: 16 / 24, 3: 8 / 24})
    assert plain_route(replace(PLAIN, norm_topk_prob=False), weights, token) == pytest.approx(
        {4: 0.5, 3: 0.25}
    )
    sigmoids = replace(PLAIN, scoring="sigmoid", correction_bias=True, routed_scale=3.0)
    weights["gate.e_score_correction_bias"] = np.array([9.0, 0, 0, 0, 0, 0])  # chosen, at its small weight
    half, most = 1 / 2, 16 / 17
    expected = {0: 3 * half / (half + most), 4: 3 * most / (half + most)}
    assert plain_route(sigmoids, weights, token) == pytest.approx(expected)


# --- the grouped products ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack() -> ExpertWeights:
    rng = np.random.default_rng(2)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return ExpertWeights(normal(E, D, 2 * F), normal(E, F, D), normal(E, 2 * F), normal(E, D))


ROWS = {
    "spread": [3, 0, 5, 1, 0, 7],
    "one expert has all": [0, 16, 0, 0, 0, 0],
    "exact tiles": [4, 4, 0, 8, 0, 0],
    "some are another device's": [0, 2, 0, 0, 3, 0],
    "none": [0] * E,
}


@pytest.mark.parametrize("group_sizes", ROWS.values(), ids=ROWS)
def test_grouped_products_equal_one_expert_at_a_time(stack: ExpertWeights, group_sizes: list[int]) -> None:
    config = model_config(GPT_OSS)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(16, D)), jnp.float32)
    owners = np.repeat(np.arange(E), group_sizes)
    expected = [
        gated_expert(row[None], stack.of(jnp.int32(e), row[None]), config)[0]
        for row, e in zip(x, owners, strict=False)
    ]
    counts = jnp.asarray(group_sizes, jnp.int32)
    for out in (
        tiled_experts(x, counts, stack, config=config, tile=4),
        ragged_experts(x, counts, stack, config=config),
    ):
        assert out.shape == x.shape
        for row, one in zip(out, expected, strict=False):
            assert np.abs(row - one).max() <= 1e-5 * np.abs(one).max()


def test_routed_experts_equal_the_reference(stack: ExpertWeights) -> None:
    """Also where tokens pick experts of another device, which have numbers outside of the stack."""
    config = model_config(GPT_OSS)
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(130, D)), jnp.float32)
    experts = jnp.asarray([rng.permutation(E + 4)[:K] - 2 for _ in x], jnp.int32)
    routing = Routing(experts, jnp.asarray(rng.uniform(size=experts.shape), jnp.float32))
    expected = reference_experts(x, routing, stack, config)
    out = jax.jit(lambda x, routing, stack: routed_experts(x, routing, stack, config))(x, routing, stack)
    assert np.abs(out - expected).max() <= 1e-5 * np.abs(expected).max()


def test_an_expert_without_rows_is_not_read(stack: ExpertWeights) -> None:
    """Weights that are not numbers would show in a product with them, even times zero."""
    config = model_config(PLAIN)
    chosen = jnp.asarray([[0, 3], [3, 4]], jnp.int32)
    poisoned = jax.tree.map(lambda w: w.at[jnp.array([1, 2, 5])].set(jnp.nan), stack)
    x = jnp.ones((2, D), jnp.float32)
    out = routed_experts(x, Routing(chosen, jnp.ones((2, 2), jnp.float32)), poisoned, config)
    assert np.isfinite(out).all()


# --- what is where, and what a step moves ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tp", "sharding", "shard"),
    [
        (2, "auto", (3, D, 2 * F)),
        (2, "off", (E, D, F)),
        (4, "auto", (E, D, 2 * 3)),  # F=10 over 4 devices is padded to 12
        (6, "auto", (1, D, 2 * F)),
    ],
)
def test_what_a_device_holds(tp: int, sharding: Any, shard: tuple[int, ...]) -> None:
    (gate_up,) = (
        p for p in declared(replace(PLAIN, expert_parallel=sharding), tp) if p.name.endswith("gate_up_proj")
    )
    assert gate_up.sharding.shard_shape(gate_up.layout.shape) == shard


def test_router_stays_float32() -> None:
    mesh = make_mesh(2)
    decoder = abstract_decoder(model_config(DEEPSEEK), mesh, jnp.dtype("bfloat16"))
    dtypes = {
        p.name.removeprefix("layers.0.mlp."): p.dtype for p in parameters(decoder, mesh) if ".mlp." in p.name
    }
    assert {name: str(dtype) for name, dtype in dtypes.items()} == {
        "gate.weight": "float32",
        "gate.correction_bias": "float32",
        "experts.gate_up_proj": "bfloat16",
        "experts.down_proj": "bfloat16",
        "shared_expert.gate_up_proj": "bfloat16",
        "shared_expert.down_proj": "bfloat16",
    }


@pytest.mark.parametrize(("tp", "kind"), [(2, "qwen2"), (4, "gpt_oss"), (3, "deepseek")])
def test_collective_budget(tp: int, kind: str) -> None:
    """As in a dense model: two all-reduces a layer, shared expert and all, and one for the embedding."""
    moe = replace(KINDS[kind], sparse_layers=(True, False, True))
    config = model_config(moe)
    mesh = make_mesh(tp)
    runner = Runner(
        abstract_decoder(config, mesh, F32), mesh, Limits(max_slots=4, max_model_len=256, num_pages=3), F32
    )
    found = [
        one
        for one in find_collectives(runner.program(ProgramSpec("decode", 4, greedy=True)).as_text())
        if not one.conditional
    ]
    residual = [one for one in found if one.bytes == 4 * D * 4]
    assert [one.kind for one in residual] == ["all-reduce"] * (2 * 3 + 1)
    assert [one.kind for one in found if one not in residual] == ["all-gather"]  # to sample


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_experts": 0}, "num_experts=0 is not a whole number, 1 or more"),
        ({"experts_per_token": 7}, "experts_per_token=7 is over num_experts=6"),
        ({"scoring": "tanh"}, "scoring='tanh' is not supported: use softmax or sigmoid"),
        (
            {"num_groups": 2},
            "correction_bias=False and num_groups=2 need scoring='sigmoid', but it is 'softmax'",
        ),
        (
            {"scoring": "sigmoid", "num_groups": 4},
            "num_groups=4 does not split num_experts=6 into equal groups of 2 or more",
        ),
        (
            {"scoring": "sigmoid", "num_groups": 3, "experts_per_token": 3},
            "groups_per_token=1 of num_groups=3 hold 2 experts, but experts_per_token=3",
        ),
        ({"shared_gate": True}, "shared_gate=True needs a shared expert, but shared_width=0"),
        ({"shared_width": -1}, "shared_width=-1 is not a whole number, 1 or more"),
        ({"swiglu_limit": 0.0}, "swiglu_limit=0.0 is not a positive number"),
        (
            {"expert_parallel": "rows"},
            "expert_parallel='rows' is not supported: use auto, on or off",
        ),
    ],
)
def test_wrong_configuration(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        replace(PLAIN, **wrong)
    assert str(error.value) == message


def test_expert_parallel_needs_a_tp_that_divides_the_experts() -> None:
    with pytest.raises(ConfigError) as error:
        replace(PLAIN, expert_parallel="on").sharded_axis(4)
    assert str(error.value) == (
        "expert_parallel='on' needs a tp that divides num_experts=6, but tp=4: use auto or off"
    )


def test_sharding_of_experts_needs_experts() -> None:
    config = model_config(PLAIN)
    assert config.with_expert_parallel("off").moe == replace(PLAIN, expert_parallel="off")
    dense = replace(config, moe=None)
    assert dense.with_expert_parallel("auto") == dense
    with pytest.raises(ConfigError) as error:
        dense.with_expert_parallel("off")
    assert str(error.value) == (
        "expert_parallel='off' needs a mixture of experts, and this test model has none"
    )


def test_sparse_layers_are_as_many_as_layers() -> None:
    with pytest.raises(ConfigError) as error:
        replace(model_config(PLAIN), moe=replace(PLAIN, sparse_layers=(True, True)))
    assert str(error.value) == "sparse_layers has 2 entries, but num_layers=1"


# --- explain -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tp", "sharding", "summary"),
    [
        (
            "gpt_oss",
            2,
            "auto",
            "experts: 2 of 6 compute a token; each device has 3 of its own, as tp=2 divides 6 experts",
        ),
        (
            "mixtral",
            5,
            "off",
            "experts: 2 of 5 compute a token; each device has 3 of every expert's 12 features "
            "(padded to 15), as expert_parallel='off' asks for it",
        ),
        (
            "mixtral",
            3,
            "auto",
            "experts: 2 of 5 compute a token; each device has 4 of every expert's 12 features, "
            "as tp=3 does not divide 5 experts",
        ),
    ],
)
def test_explain_says_how_experts_are_sharded(name: str, tp: int, sharding: Any, summary: str) -> None:
    report = explain_model(str(GOLDENS / name), tp=tp, expert_parallel=sharding)
    assert report.experts is not None
    assert report.experts["summary"] == summary
    assert report.experts["sparse_layers"] == 2
    rows = {row.name: row for row in report.tensors}
    assert rows["layers.*.mlp.gate.weight"].replicated
    assert rows["layers.*.mlp.experts.down_proj"].spec == (
        "(tp, -, -)" if report.experts["sharded_by"] == "experts" else "(-, tp, -)"
    )


def test_tiles_on_a_device_with_some_of_the_experts() -> None:
    """Tiles are as high as an expert has rows, whatever part of all experts is here."""
    from tpjax.layers.experts_gpu import lay_out

    assigned = np.random.default_rng(0).integers(0, 32, 256)
    local = np.where(assigned < 4, assigned, 4)
    tiles = lay_out(jnp.asarray(local)[:, None], 4, 32)
    experts, places, sources = (np.asarray(x) for x in (tiles.experts, tiles.places[:, 0], tiles.sources))
    size = tiles.size
    assert size == 16
    here = np.flatnonzero(local < 4)
    np.testing.assert_array_equal(experts[places[here] // size], local[here])
    np.testing.assert_array_equal(sources[places[here]], here)
    assert (experts < 4).sum() == sum(-(-np.bincount(local[here]) // size))


@pytest.mark.parametrize(("batch", "flops"), ((8, 6.5), (64, 2.1), (256, 1.3)))
def test_what_the_kernel_for_gpus_does_of_what_routing_needs(batch: int, flops: float) -> None:
    """Qwen3-30B-A3B's decode, on one of eight H200 with 16 of 128 experts; each token picks 8 at random.

    A product of the tensor cores has 8 rows at least: one row of an expert costs as much as eight.
    """
    from tpjax.layers.experts_gpu import tile_rows, work

    rng, size = np.random.default_rng(0), tile_rows(8 * batch, 128)
    moved, done, read, needed, least = 0, 0, 0, 0, 0
    for _ in range(100):
        picks = np.concatenate([rng.permutation(128)[:8] for _ in range(batch)])
        sizes = np.bincount(picks, minlength=128)[:16]
        for inner, columns in ((2048, 2 * 768), (768, 2048)):
            found = work(sizes.tolist(), size, inner, columns)
            moved, done = moved + found.bytes, done + found.flops
            read += 2 * (np.count_nonzero(sizes) * inner * columns + sizes.sum() * (inner + columns))
            needed += 2 * sizes.sum() * inner * columns
            least += 2 * (-(-sizes // 8) * 8).sum() * inner * columns
    assert 1 < moved / read < 1.3
    assert 1 <= done / least < 1.01
    assert done / needed < flops
