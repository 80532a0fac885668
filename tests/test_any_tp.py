"""Random architectures at a random tp, against tp=1 and against the reference in NumPy.

Heads, widths, vocabularies and the number of devices are sampled independently: few sizes divide each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from tpjax.cache import BatchMetadata, TokenGroup, allocate
from tpjax.checkpoints.canonical import CanonicalSource
from tpjax.checkpoints.load import load_decoder
from tpjax.checkpoints.opening import Checkpoint
from tpjax.checkpoints.parameters import abstract_decoder, parameters
from tpjax.checkpoints.source import TensorInfo
from tpjax.config import (
    Activation,
    AttentionConfig,
    Block,
    LatentConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    RopeParameters,
)
from tpjax.families.tensor_names import WeightMap
from tpjax.mesh import make_mesh

F32 = jnp.dtype("float32")
TOLERANCE = 1e-4  # of the largest logit, as DESIGN has it
EXAMPLES = 10
PAGE = 4
CHUNKS = ((0, 8), (8, 12), (12, 13))  # the first chunk, one with pages before it, and a decode step
LENGTH = CHUNKS[-1][1]


class Arrays:
    """A checkpoint in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays
        self.tensors = {name: TensorInfo(x.shape, x.dtype) for name, x in arrays.items()}

    def read(
        self, name: str, index: tuple[slice, ...] | None = None, memory: np.ndarray | None = None
    ) -> np.ndarray:
        return self._arrays[name][index or ()]


def random_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Returns weights that keep activations near 1; norms near 1, but not 1, at which they have no effect."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in canonical_shapes(config, 1).items():
        values = rng.normal(size=shape)
        if len(shape) == 1:
            weights[name] = 0.3 * values + (1 - config.norm.offset if "norm" in name else 0)
        else:
            weights[name] = values / math.sqrt(shape[-1])
    return {name: w.astype(np.float32) for name, w in weights.items()}


def canonical_shapes(config: ModelConfig, tp: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the canonical tensors that the model needs."""
    mesh = make_mesh(tp)
    return {
        parameter.canonical(source): shape
        for parameter in parameters(abstract_decoder(config, mesh, F32), mesh)
        for source, shape in parameter.layout.canonical_shapes().items()
    }


def decoder_logits(
    config: ModelConfig, weights: Mapping[str, np.ndarray], tokens: np.ndarray, tp: int
) -> np.ndarray:
    """Computes the logits [S, V] over the paged cache, through every kind of call that serving makes."""
    mesh = make_mesh(tp)
    checkpoint = Checkpoint(Path("random"), config, CanonicalSource(Arrays(weights), WeightMap(), config))
    graph, state = nnx.split(
        load_decoder(checkpoint, abstract_decoder(config, mesh, F32), mesh, progress=False)
    )
    blocks = -(-LENGTH // PAGE)
    cache = allocate(config, mesh, num_pages=blocks + 1, page_size=PAGE, dtype=F32)
    table, max_length = jnp.arange(blocks, 0, -1, dtype=jnp.int32)[None], jnp.array([LENGTH], jnp.int32)

    @jax.jit
    def run(state: Any, cache: Any, tokens: Any) -> Any:
        model = nnx.merge(graph, state)
        hidden = []
        for first, last in CHUNKS:
            positions = jnp.arange(first, last, dtype=jnp.int32)[None]
            group = TokenGroup(table, positions, max_length=max_length, chunks=last - first > 1)
            x, cache = model(tokens[first:last], cache, [BatchMetadata((group,))])
            hidden.append(x)
        return model.logits(jnp.concatenate(hidden))

    with jax.set_mesh(mesh):
        scores = np.asarray(run(state, cache, tokens))
    assert (scores[:, config.vocab_size :] == -np.inf).all()
    return scores[:, : config.vocab_size]


def sizes(most: int, least: int = 1) -> st.SearchStrategy[int]:
    return st.integers(least, most)


@st.composite
def ropes(draw: st.DrawFn, pairs: int) -> RopeParameters:
    """Draws a rotary embedding; its original context is shorter or longer than the test's sequence."""
    kind = draw(st.sampled_from(("default", "linear", "dynamic", "llama3", "yarn", "longrope")))
    theta, factor = draw(st.sampled_from((50.0, 10_000.0))), draw(st.sampled_from((2.0, 8.0)))
    divisors = st.lists(st.sampled_from((1.0, 1.5, 4.0)), min_size=pairs, max_size=pairs).map(tuple)
    return RopeParameters(
        theta=theta,
        kind=kind,
        factor=factor,
        original_max_position_embeddings=draw(st.sampled_from((8, 32))),
        divisors=draw(divisors) if kind == "longrope" else None,
        long_divisors=draw(divisors) if kind == "longrope" else None,
        beta_fast=2.0 if kind == "yarn" else 32.0,
        beta_slow=0.1 if kind == "yarn" else 1.0,
        truncate=draw(st.booleans()),
        attention_factor=draw(st.sampled_from((1.0, 1.2))),
    )


@st.composite
def latents(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Draws latent attention; the two parts of a key and the value may all differ in width."""
    heads, rotary_dim = draw(sizes(7)), 2 * draw(sizes(3))
    attention = {
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": rotary_dim + draw(sizes(6)),
        "latent": LatentConfig(
            q_lora_rank=draw(st.none() | sizes(9)),
            kv_lora_rank=draw(sizes(9)),
            v_head_dim=draw(sizes(7)),
        ),
    }
    return {"attention": attention, "rope": {"rotary_dim": rotary_dim}, "model": {}}


@st.composite
def grouped_queries(draw: st.DrawFn, layers: int, norm: str) -> dict[str, dict[str, Any]]:
    """Draws keys and values per head, or per group of heads."""
    kv_heads, pairs = draw(sizes(5)), draw(sizes(4))
    qk_norms = ("none", "head", "each_head", *(["projection"] if norm == "rms" else []))
    return {
        "attention": {
            "num_heads": kv_heads * draw(sizes(5)),
            "num_kv_heads": kv_heads,
            "head_dim": 2 * pairs,
            "qk_norm": draw(st.sampled_from(qk_norms)),
        },
        "rope": {
            "rotary_dim": draw(st.none() | sizes(pairs).map(lambda rotated_pairs: 2 * rotated_pairs)),
            "layers": draw(st.none() | st.tuples(*[st.booleans()] * layers)),
        },
        "model": {"position_embedding": draw(st.sampled_from(("rope", "rope", "learned")))},
    }


@st.composite
def mixtures(draw: st.DrawFn, layers: int) -> MoEConfig:
    """Draws a mixture of experts, with or without groups of experts."""
    scoring = draw(st.sampled_from(("softmax", "sigmoid")))
    groups = draw(sizes(3)) if scoring == "sigmoid" else 1
    per_group, groups_per_token = draw(sizes(4, 2)), draw(sizes(groups))
    shared_width = draw(st.integers(0, 9))
    return MoEConfig(
        num_experts=groups * per_group,
        experts_per_token=draw(sizes(groups_per_token * per_group if groups > 1 else per_group)),
        expert_width=draw(sizes(9)),
        sparse_layers=(False,) * (layers - 1) + (True,),
        scoring=scoring,
        norm_topk_prob=draw(st.booleans()),
        num_groups=groups,
        groups_per_token=groups_per_token,
        routed_scale=draw(st.sampled_from((1.0, 2.5))),
        router_bias=draw(st.booleans()),
        correction_bias=scoring == "sigmoid" and draw(st.booleans()),
        expert_bias=draw(st.booleans()),
        shared_width=shared_width,
        shared_gate=shared_width > 0 and draw(st.booleans()),
        swiglu_limit=draw(st.none() | st.just(0.5)),
        expert_parallel=draw(st.sampled_from(("auto", "off"))),
    )


@st.composite
def architectures(draw: st.DrawFn) -> ModelConfig:
    """Draws a decoder of one or two layers with small, unrelated sizes."""
    layers, norm = draw(sizes(2)), draw(st.sampled_from(("rms", "rms", "layer")))
    drawn = draw(grouped_queries(layers, norm) | latents())
    pairs = (drawn["rope"]["rotary_dim"] or drawn["attention"]["head_dim"]) // 2
    kinds = st.sampled_from(("full_attention", "sliding_attention"))
    return ModelConfig(
        model_type="llama",
        vocab_size=draw(sizes(40, 3)),
        hidden_size=draw(sizes(24, 4)),
        num_layers=layers,
        max_position_embeddings=64,
        block=draw(st.sampled_from(get_args(Block))),
        moe=draw(st.none() | mixtures(layers)),
        tie_word_embeddings=draw(st.booleans()),
        embedding_scale=draw(st.sampled_from((1.0, 3.0))),
        residual_scale=draw(st.sampled_from((1.0, 0.4))),
        logit_scale=draw(st.sampled_from((1.0, 0.2))),
        logit_softcap=draw(st.none() | st.just(1.5)),
        **drawn["model"],
        attention=AttentionConfig(
            **drawn["attention"],
            query_scale=draw(st.sampled_from((0.3, 1.0))),
            layer_types=tuple(draw(st.lists(kinds, min_size=layers, max_size=layers))),
            sliding_window=draw(sizes(LENGTH)),
            softcap=draw(st.none() | st.just(2.0)),
            bias=draw(st.booleans()),
            out_bias=draw(st.booleans()),
        ),
        rope=RopeConfig(full=draw(ropes(pairs)), sliding=draw(st.none() | ropes(pairs)), **drawn["rope"]),
        mlp=MLPConfig(
            intermediate_size=draw(sizes(24)),
            gated=draw(st.booleans()),
            activation=draw(st.sampled_from(get_args(Activation))),
            bias=draw(st.booleans()),
        ),
        norm=NormConfig(
            kind=norm,
            eps=draw(st.sampled_from((1e-5, 1e-2))),
            bias=draw(st.booleans()),
            offset=draw(st.sampled_from((0.0, 1.0))),
        ),
    )


# no family has a parallel block of latent attention and experts: both give partial sums, reduced once
PARALLEL_LATENT = ModelConfig(
    model_type="llama",
    vocab_size=12,
    hidden_size=8,
    num_layers=1,
    max_position_embeddings=64,
    block="parallel",
    tie_word_embeddings=False,
    attention=AttentionConfig(
        num_heads=3,
        num_kv_heads=3,
        head_dim=6,
        query_scale=0.3,
        out_bias=True,
        layer_types=("full_attention",),
        latent=LatentConfig(q_lora_rank=None, kv_lora_rank=8, v_head_dim=1),
    ),
    rope=RopeConfig(rotary_dim=2),
    mlp=MLPConfig(intermediate_size=24),
    moe=MoEConfig(
        num_experts=4, experts_per_token=2, expert_width=3, sparse_layers=(True,), norm_topk_prob=False
    ),
    norm=NormConfig(eps=1e-5),
)


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],  # each example compiles: shrinking one takes many minutes
)
@given(config=architectures(), tp=sizes(16, 2), seed=sizes(2**16))
@example(config=PARALLEL_LATENT, tp=3, seed=1)
def test_any_architecture_at_any_tp(config: ModelConfig, tp: int, seed: int) -> None:
    weights = random_weights(config, seed)
    assert canonical_shapes(config, tp) == {name: w.shape for name, w in weights.items()}
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, LENGTH).astype(np.int32)
    expected = reference.logits(config, weights, tokens)
    compute = functools.partial(decoder_logits, config, weights, tokens)
    with ThreadPoolExecutor(2) as pool:  # XLA compiles outside Python's lock: side by side
        one, many = pool.map(compute, (1, tp))
    scale = np.abs(expected).max()
    assert np.abs(one - expected).max() <= TOLERANCE * scale
    assert np.abs(many - expected).max() <= TOLERANCE * scale
    assert np.abs(many - one).max() <= TOLERANCE * scale
