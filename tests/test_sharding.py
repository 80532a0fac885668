"""The head plan for any model and tp, and the layouts of stored weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpjax.checkpoints.parameters import abstract_decoder, parameters
from tpjax.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig
from tpjax.errors import ConfigError
from tpjax.mesh import make_mesh
from tpjax.sharding import (
    HeadPlan,
    Segment,
    WeightLayout,
    o_proj_layout,
    pad_to_multiple,
    qkv_layout,
    tensor_layout,
    width_per_device,
)

QUICK = settings(max_examples=200, deadline=None, derandomize=True)


@st.composite
def plans(draw: st.DrawFn) -> HeadPlan:
    kv_heads = draw(st.integers(1, 128))
    per_group = draw(st.integers(1, 128 // kv_heads))
    return HeadPlan(kv_heads * per_group, kv_heads, draw(st.integers(1, 64)))


@QUICK
@given(plans())
def test_every_head_once_beside_its_own_kv_head(plan: HeadPlan) -> None:
    per_group = plan.num_heads // plan.num_kv_heads
    seen = []
    for kv_head, heads in plan.head_slots:
        real = [head for head in heads if head is not None]
        assert (kv_head is None) == (not real)  # no KV head is computed for nobody
        assert all(head // per_group == kv_head for head in real)
        seen += real
    assert sorted(seen) == list(range(plan.num_heads))
    assert {kv_head for kv_head, _ in plan.head_slots} - {None} == set(range(plan.num_kv_heads))


@QUICK
@given(plans())
def test_shapes_are_equal_on_every_device(plan: HeadPlan) -> None:
    assert len(plan.head_slots) == plan.num_head_slots == plan.tp * plan.head_slots_per_device
    assert {len(heads) for _, heads in plan.head_slots} == {plan.group_size}
    assert plan.num_padded_heads == plan.num_head_slots * plan.group_size


@QUICK
@given(plans())
def test_padding(plan: HeadPlan) -> None:
    assert plan.num_padded_heads >= plan.num_heads
    assert plan.num_head_slots >= plan.num_kv_heads
    assert plan.query_padding == pytest.approx((plan.num_padded_heads - plan.num_heads) / plan.num_heads)
    assert plan.kv_padding == pytest.approx((plan.num_head_slots - plan.num_kv_heads) / plan.num_kv_heads)
    if plan.num_kv_heads % plan.tp == 0:
        assert (plan.num_padded_heads, plan.num_head_slots) == (plan.num_heads, plan.num_kv_heads)
        assert (plan.query_padding, plan.kv_padding) == (0, 0)


@QUICK
@given(plans())
def test_no_uniform_arrangement_costs_less(plan: HeadPlan) -> None:
    """Against every (query heads per head slot, head slots per device) that holds all heads."""
    per_group = plan.num_heads // plan.num_kv_heads
    best = min(
        (slots * (2 * size + 2), slots)  # q and o per query head, k and v per head slot; then the cache
        for size in range(1, per_group + 1)
        for slots in range(1, plan.num_heads + 1)
        if slots * plan.tp >= plan.num_kv_heads * math.ceil(per_group / size)
    )
    assert (plan.head_slots_per_device * (2 * plan.group_size + 2), plan.head_slots_per_device) == best


# model: (H, K), then at tp = 2 to 16 the query heads and the KV heads computed over all devices
PINNED = {
    "Llama-3-8B": (
        (32, 8),
        (32, 36, 32, 40, 36, 42, 32, 36, 40, 44, 48, 52, 56, 60, 32),
        (8, 9, 8, 10, 18, 21, 8, 9, 10, 11, 12, 13, 14, 15, 16),
    ),
    "Qwen2.5-7B": (
        (28, 4),
        (28, 36, 28, 35, 42, 49, 32, 36, 40, 44, 36, 39, 42, 45, 32),
        (4, 9, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16),
    ),
    "Qwen2.5-0.5B": (
        (14, 2),
        (14, 21, 16, 20, 18, 21, 16, 18, 20, 22, 24, 26, 14, 15, 16),
        (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16),
    ),
    "SmolLM2": (
        (9, 3),
        (12, 9, 12, 15, 12, 14, 16, 9, 10, 11, 12, 13, 14, 15, 16),
        (4, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16),
    ),
    "Gemma-3-270M": (
        (4, 1),
        (4, 6, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16),
        (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16),
    ),
    "Phi-3-mini": (
        (32, 32),
        (32, 33, 32, 35, 36, 35, 32, 36, 40, 33, 36, 39, 42, 45, 32),
        (32, 33, 32, 35, 36, 35, 32, 36, 40, 33, 36, 39, 42, 45, 32),
    ),
}


@pytest.mark.parametrize("model", PINNED)
def test_pinned_paddings(model: str) -> None:
    (heads, kv_heads), padded_heads, head_slots = PINNED[model]
    plans = [HeadPlan(heads, kv_heads, tp) for tp in range(2, 17)]
    assert tuple(plan.num_padded_heads for plan in plans) == padded_heads
    assert tuple(plan.num_head_slots for plan in plans) == head_slots


def test_head_slots_of_smollm2_at_two() -> None:
    """Worked out by hand: three groups of three over four head slots."""
    plan = HeadPlan(9, 3, 2)
    assert plan.head_slots == (
        (0, (0, 1, 2)),
        (1, (3, 4, 5)),
        (2, (6, 7, 8)),
        (None, (None, None, None)),
    )


def test_head_slots_of_qwen_at_three() -> None:
    """One KV head in several head slots: its seven queries are split."""
    plan = HeadPlan(7, 1, 3)
    assert plan.head_slots == ((0, (0, 1, 2)), (0, (3, 4, 5)), (0, (6, None, None)))
    assert plan.query_padding == pytest.approx(2 / 7)
    assert plan.kv_padding == 2.0


def test_bad_plans() -> None:
    with pytest.raises(ConfigError, match=r"^num_kv_heads=4 is not a divisor of num_heads=10$"):
        HeadPlan(10, 4, 2)
    for name, arguments in (
        ("num_heads", (0, 1, 1)),
        ("num_kv_heads", (4, 0, 1)),
        ("tp", (4, 2, 0)),
        ("tp", (4, 2, -3)),
    ):
        value = min(arguments)
        with pytest.raises(ConfigError, match=rf"^{name}={value} is less than 1$"):
            HeadPlan(*arguments)


def test_widths_that_groups_of_inputs_divide() -> None:
    """As large a power of two, up to 128, as adds at most a 64th; others stay as they are."""
    shares = {(13824, 7): 1984, (11008, 3): 3712, (11008, 8): 1376, (14336, 8): 1792, (18944, 8): 2368}
    shares |= {(20, 3): 7, (96, 5): 20, (1536, 5): 312, (1, 8): 1}
    assert {key: width_per_device(*key) for key in shares} == shares
    layout = tensor_layout("down_proj.weight", (64, 13824), padded=7 * 1984, axis=1)
    assert layout.stored_group(1, 128, 7) == 64


@pytest.mark.parametrize(
    ("size", "of", "expected"), ((1, 8, 8), (8, 8, 8), (9, 8, 16), (7, 1, 7), (50, 8, 56))
)
def test_pad_to_multiple(size: int, of: int, expected: int) -> None:
    assert pad_to_multiple(size, of) == expected


# --- weight layouts ----------------------------------------------------------------------------------------


class Source:
    """Canonical tensors in memory; counts the elements read."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        rng = np.random.default_rng(0)
        self.tensors = {name: rng.uniform(1, 2, shape).astype(np.float32) for name, shape in shapes.items()}
        self.elements = 0

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor = self.tensors[name]
        assert len(index) == tensor.ndim
        for part, size in zip(index, tensor.shape, strict=True):
            assert 0 <= part.start <= part.stop <= size, f"{name}: {index} of {tensor.shape}"
        out = tensor[index]
        self.elements += out.size
        return out


def assemble(layout: WeightLayout, source: Source) -> np.ndarray:
    """Builds the stored array element by element, straight from the segments."""
    out = np.zeros(layout.shape, np.float32)
    moved = np.moveaxis(out, layout.axis, 0)
    for segment in layout.segments:
        tensor = source.tensors[segment.source]
        tensor = tensor.T if layout.transposed else tensor
        for i in range(segment.size):
            moved[segment.offset + i] = np.moveaxis(tensor, layout.axis, 0)[segment.start + i]
    return out


def read_all(layout: WeightLayout, source: Source, dtype: type = np.float32) -> np.ndarray:
    return layout.read(source.read, (slice(None),) * len(layout.shape), np.dtype(dtype))


HEAD_DIM, HIDDEN = 2, 5


def qkv(plan: HeadPlan, kind: str = "weight") -> WeightLayout:
    return qkv_layout(plan, HEAD_DIM, HIDDEN if kind == "weight" else None)


def output(plan: HeadPlan) -> WeightLayout:
    return o_proj_layout(plan, HEAD_DIM, HIDDEN)


@st.composite
def small_plans(draw: st.DrawFn) -> HeadPlan:
    kv_heads = draw(st.integers(1, 5))
    return HeadPlan(kv_heads * draw(st.integers(1, 5)), kv_heads, draw(st.integers(1, 9)))


def stored_width(segment: Segment) -> range:
    return range(segment.offset, segment.offset + segment.size)


@settings(QUICK, max_examples=60)
@given(small_plans(), st.sampled_from((qkv, functools.partial(qkv, kind="bias"), output)), st.data())
def test_any_slice_is_the_slice_of_the_whole(
    plan: HeadPlan, build: Callable[[HeadPlan], WeightLayout], data: st.DataObject
) -> None:
    layout = build(plan)
    source = Source(layout.canonical_shapes())
    expected = assemble(layout, source)
    np.testing.assert_array_equal(read_all(layout, source), expected)

    index, stored = [], 1
    for axis, size in enumerate(layout.shape):
        start = data.draw(st.integers(0, size))
        stop = data.draw(st.integers(start, size))
        index.append(slice(start, stop))
        stored *= stop - start if axis != layout.axis else 1
    source.elements = 0
    part = layout.read(source.read, tuple(index), np.dtype(np.float32))
    np.testing.assert_array_equal(part, expected[tuple(index)])
    along = index[layout.axis]
    filled = sum(
        len(range(max(s.offset, along.start), min(s.offset + s.size, along.stop))) for s in layout.segments
    )
    assert source.elements == filled * stored  # not one element beyond what the slice holds


@settings(QUICK, max_examples=60)
@given(small_plans())
def test_segments_do_not_overlap_and_padding_is_zero(plan: HeadPlan) -> None:
    for layout in (qkv(plan), output(plan)):
        taken: set[int] = set()
        for segment in layout.segments:
            places = set(stored_width(segment))
            assert not places & taken
            taken |= places
        source = Source(layout.canonical_shapes())
        stored = np.moveaxis(read_all(layout, source), layout.axis, 0)
        empty = sorted(set(range(layout.shape[layout.axis])) - taken)
        assert not stored[empty].any()
        assert stored[sorted(taken)].all()  # the sources hold no zeros
        replicas = len(taken) * math.prod(layout.shape) // layout.shape[layout.axis] - sum(
            tensor.size for tensor in source.tensors.values()
        )
        assert layout.padding == len(empty) * stored[0].size + replicas


@settings(QUICK, max_examples=40)
@given(small_plans())
def test_attention_through_the_layouts_is_attention(plan: HeadPlan) -> None:
    """qkv @ x, then o over the head slots, equals the canonical products head by head."""
    fused, out = qkv(plan), output(plan)
    source = Source({**fused.canonical_shapes(), **out.canonical_shapes()})
    per_group = plan.num_heads // plan.num_kv_heads
    x = np.random.default_rng(1).normal(size=HIDDEN).astype(np.float32)
    head_slots = (read_all(fused, source) @ x).reshape(plan.num_head_slots, plan.group_size + 2, HEAD_DIM)
    # any function of a query and its own key and value will do in place of a softmax
    outputs = head_slots[:, :-2] * head_slots[:, -2:-1] + head_slots[:, -1:]
    result = read_all(out, source) @ outputs.reshape(-1)

    q, k, v = (
        (source.tensors[f"{name}_proj.weight"] @ x).reshape(-1, HEAD_DIM).repeat(repeats, axis=0)
        for name, repeats in (("q", 1), ("k", per_group), ("v", per_group))
    )
    expected = source.tensors["o_proj.weight"] @ (q * k + v).reshape(-1)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


def test_canonical_shapes() -> None:
    plan = HeadPlan(6, 2, 4)
    assert qkv(plan).canonical_shapes() == {
        "q_proj.weight": (12, HIDDEN),  # [out, in], as Hugging Face keeps it
        "k_proj.weight": (4, HIDDEN),
        "v_proj.weight": (4, HIDDEN),
    }
    assert qkv(plan, "bias").canonical_shapes() == {
        "q_proj.bias": (12,),
        "k_proj.bias": (4,),
        "v_proj.bias": (4,),
    }
    assert output(plan).canonical_shapes() == {"o_proj.weight": (HIDDEN, 12)}
    assert tensor_layout("norm.weight", (7,)).canonical_shapes() == {"norm.weight": (7,)}
    padded = tensor_layout("embed_tokens.weight", (50, 7), padded=56)
    assert padded.shape == (56, 7)
    assert padded.canonical_shapes() == {"embed_tokens.weight": (50, 7)}
    assert padded.padding == 6 * 7


def test_read_converts_to_the_dtype_asked_for() -> None:
    layout = tensor_layout("embed_tokens.weight", (5, 3), padded=8)
    source = Source(layout.canonical_shapes())
    half = layout.read(source.read, (slice(2, 8), slice(0, 2)), np.dtype(np.float16))
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half[:3], source.tensors["embed_tokens.weight"][2:, :2].astype(np.float16))
    np.testing.assert_array_equal(half[3:], np.zeros((3, 2)))


# --- what an abstract model declares -----------------------------------------------------------------------

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=50,
    hidden_size=12,
    num_layers=2,
    max_position_embeddings=64,
    attention=AttentionConfig(
        num_heads=6,
        num_kv_heads=2,
        head_dim=4,
        query_scale=0.5,
        layer_types=("full_attention",) * 2,
        bias=True,
        out_bias=True,
    ),
    mlp=MLPConfig(intermediate_size=20, bias=True),
    norm=NormConfig(eps=1e-5),
)
CANONICAL = {
    "embed_tokens.weight": (50, 12),
    "lm_head.weight": (50, 12),
    "norm.weight": (12,),
    **{
        f"layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {
            "input_layernorm.weight": (12,),
            "post_attention_layernorm.weight": (12,),
            "self_attn.q_proj.weight": (24, 12),
            "self_attn.q_proj.bias": (24,),
            "self_attn.k_proj.weight": (8, 12),
            "self_attn.k_proj.bias": (8,),
            "self_attn.v_proj.weight": (8, 12),
            "self_attn.v_proj.bias": (8,),
            "self_attn.o_proj.weight": (12, 24),
            "self_attn.o_proj.bias": (12,),
            "mlp.gate_proj.weight": (20, 12),
            "mlp.gate_proj.bias": (20,),
            "mlp.up_proj.weight": (20, 12),
            "mlp.up_proj.bias": (20,),
            "mlp.down_proj.weight": (12, 20),
            "mlp.down_proj.bias": (12,),
        }.items()
    },
}


@pytest.mark.parametrize("tp", (1, 3, 7, 8))
def test_a_model_needs_the_canonical_tensors_at_every_tp(tp: int) -> None:
    mesh = make_mesh(tp)
    declared = parameters(abstract_decoder(CONFIG, mesh, jnp.dtype("float32")), mesh)
    needed = {
        parameter.canonical(source): shape
        for parameter in declared
        for source, shape in parameter.layout.canonical_shapes().items()
    }
    assert needed == CANONICAL
    for parameter in declared:
        assert isinstance(parameter.sharding, jax.sharding.NamedSharding)
        parameter.sharding.shard_shape(parameter.layout.shape)  # raises where tp does not divide


@pytest.mark.parametrize("tp", (1, 3, 7, 8))
def test_gate_and_up_lie_together_on_each_device(tp: int) -> None:
    mesh = make_mesh(tp)
    declared = {p.name: p for p in parameters(abstract_decoder(CONFIG, mesh, jnp.dtype("float32")), mesh)}
    for kind in ("weight", "bias"):
        layout = declared[f"layers.0.mlp.gate_up_proj.{kind}"].layout
        source = Source(layout.canonical_shapes())
        share = pad_to_multiple(20, tp) // tp
        assert layout.shape[0] == 2 * share * tp
        stored = read_all(layout, source).T.reshape(-1, tp, 2, share)
        for part, name in enumerate(("gate_proj", "up_proj")):
            features = stored[:, :, part].reshape(-1, share * tp)
            tensor = source.tensors[f"{name}.{kind}"].T.reshape(-1, 20)
            np.testing.assert_array_equal(features[:, :20], tensor)
            assert not features[:, 20:].any()
        # a device's slice asks for no other device's features
        width = layout.shape[0] // tp
        for device in range(tp):
            source.elements = 0
            index = (slice(device * width, (device + 1) * width), *[slice(None)] * (len(layout.shape) - 1))
            part = layout.read(source.read, index, np.dtype(np.float32))
            np.testing.assert_array_equal(part, read_all(layout, Source(layout.canonical_shapes()))[index])
            mine = max(0, min(share, 20 - device * share))
            assert source.elements == 2 * mine * (12 if kind == "weight" else 1)


def test_specs_of_a_model() -> None:
    """What DESIGN section 3 says of each weight, read back from the declarations."""
    mesh = make_mesh(3)
    declared = {p.name: p for p in parameters(abstract_decoder(CONFIG, mesh, jnp.dtype("float32")), mesh)}
    specs = {name: tuple(p.sharding.spec) for name, p in declared.items() if not name.startswith("layers.1.")}
    assert specs == {
        "embed_tokens.weight": ("tp", None),
        "lm_head.weight": ("tp", None),
        "norm.weight": (),
        "layers.0.input_layernorm.weight": (),
        "layers.0.post_attention_layernorm.weight": (),
        "layers.0.self_attn.qkv_proj.weight": ("tp", None),
        "layers.0.self_attn.qkv_proj.bias": ("tp",),
        "layers.0.self_attn.o_proj.weight": (None, "tp"),
        "layers.0.self_attn.o_proj.bias": (),
        "layers.0.mlp.gate_up_proj.weight": ("tp", None),
        "layers.0.mlp.gate_up_proj.bias": ("tp",),
        "layers.0.mlp.down_proj.weight": (None, "tp"),
        "layers.0.mlp.down_proj.bias": (),
    }
    shards = {name: p.sharding.shard_shape(p.layout.shape) for name, p in declared.items()}
    assert shards["embed_tokens.weight"] == (17, 12)
    assert shards["layers.0.mlp.down_proj.weight"] == (12, 7)
