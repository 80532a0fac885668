"""Random architectures at a random tp: the numbers of tp=1, and of the plain reference.

Nothing here divides anything, except by chance: heads, widths and vocabularies are drawn freely, and so
is the number of devices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tpjax.cache import Placement, allocate
from tpjax.checkpoints.load import Checkpoint, abstract_decoder, load_decoder, parameters
from tpjax.checkpoints.source import TensorInfo
from tpjax.config import LatentConfig, ModelConfig, RopeConfig
from tpjax.mesh import make_mesh

F32 = jnp.dtype("float32")
TOLERANCE = 1e-4  # of the largest logit, as DESIGN has it
EXAMPLES = 20
PAGE = 4
CHUNKS = ((0, 8), (8, 12), (12, 13))  # the first chunk, one with pages before it, and a decode step
LENGTH = CHUNKS[-1][1]


class Arrays:
    """A checkpoint in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays
        self.tensors = {name: TensorInfo(x.shape, x.dtype) for name, x in arrays.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self._arrays[name][index or ()]


def random_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Of a size that keeps activations near 1; norms near 1, but never at it, where they would not show."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in canonical_shapes(config, 1).items():
        values = rng.normal(size=shape)
        if len(shape) == 1:
            weights[name] = 0.3 * values + (1 - config.norm_offset if "norm" in name else 0)
        else:
            weights[name] = values / math.sqrt(shape[-1])
    return {name: w.astype(np.float32) for name, w in weights.items()}


def canonical_shapes(config: ModelConfig, tp: int) -> dict[str, tuple[int, ...]]:
    """What the model asks of a checkpoint."""
    mesh = make_mesh(tp)
    return {
        parameter.canonical(source): shape
        for parameter in parameters(abstract_decoder(config, mesh, F32), mesh)
        for source, shape in parameter.layout.canonical_shapes().items()
    }


def decoder_logits(
    config: ModelConfig, weights: Mapping[str, np.ndarray], tokens: np.ndarray, tp: int
) -> np.ndarray:
    """Scores [S, V] over the paged cache, through every kind of call that serving makes."""
    mesh = make_mesh(tp)
    checkpoint = Checkpoint(Path("random"), config, Arrays(weights))
    graph, state = nnx.split(
        load_decoder(checkpoint, abstract_decoder(config, mesh, F32), mesh, progress=False)
    )
    blocks = -(-LENGTH // PAGE)
    cache = allocate(config, mesh, num_pages=blocks + 1, page_size=PAGE, dtype=F32)
    table = jnp.arange(blocks, 0, -1, dtype=jnp.int32)[None]

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster
    def run(state: Any, cache: Any, tokens: Any) -> Any:
        model = nnx.merge(graph, state)
        hidden = []
        for first, last in CHUNKS:
            at = Placement(table, jnp.arange(first, last, dtype=jnp.int32)[None])
            x, cache = model(tokens[None, first:last], cache, at)
            hidden.append(x[0])
        return model.logits(jnp.concatenate(hidden))

    with jax.set_mesh(mesh):
        scores = np.asarray(run(state, cache, tokens))
    assert (scores[:, config.vocab_size :] == -np.inf).all()
    return scores[:, : config.vocab_size]


def sizes(most: int, least: int = 1) -> st.SearchStrategy[int]:
    return st.integers(least, most)


ROPES = (
    RopeConfig(),
    RopeConfig(theta=100.0, kind="linear", factor=3.0),
    RopeConfig(theta=50.0, kind="llama3", factor=8.0, original_max_position_embeddings=32),
)


@st.composite
def latents(draw: st.DrawFn) -> dict[str, Any]:
    """Latent attention; a key's two parts and the value's may all differ in width."""
    heads, turning = draw(sizes(7)), 2 * draw(sizes(3))
    return {
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": turning + draw(sizes(6)),
        "rotary_dim": turning,
        "latent": LatentConfig(
            q_lora_rank=draw(st.none() | sizes(9)),
            kv_lora_rank=draw(sizes(9)),
            v_head_dim=draw(sizes(7)),
        ),
    }


@st.composite
def grouped_queries(draw: st.DrawFn) -> dict[str, Any]:
    """Keys and values per head, or group of heads."""
    kv_heads = draw(sizes(5))
    return {
        "num_heads": kv_heads * draw(sizes(5)),
        "num_kv_heads": kv_heads,
        "head_dim": 2 * draw(sizes(4)),
        "qk_norm": draw(st.booleans()),
    }


@st.composite
def architectures(draw: st.DrawFn) -> ModelConfig:
    """A decoder of one or two layers, all sizes small and unrelated."""
    layers = draw(sizes(2))
    kinds = st.sampled_from(("full_attention", "sliding_attention"))
    return ModelConfig(
        model_type="llama",
        vocab_size=draw(sizes(40, 3)),
        hidden_size=draw(sizes(24, 4)),
        intermediate_size=draw(sizes(24)),
        num_layers=layers,
        max_position_embeddings=64,
        norm_eps=draw(st.sampled_from((1e-6, 1e-2))),
        rope=draw(st.sampled_from(ROPES)),
        rope_sliding=draw(st.none() | st.sampled_from(ROPES)),
        layer_types=tuple(draw(st.lists(kinds, min_size=layers, max_size=layers))),
        sliding_window=draw(sizes(LENGTH)),
        tie_word_embeddings=draw(st.booleans()),
        activation=draw(st.sampled_from(("silu", "gelu_tanh"))),
        sandwich_norms=draw(st.booleans()),
        norm_offset=draw(st.sampled_from((0.0, 1.0))),
        embedding_scale=draw(st.sampled_from((1.0, 3.0))),
        query_scale=draw(st.sampled_from((0.3, 1.0))),
        attention_bias=draw(st.booleans()),
        attention_out_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        **draw(grouped_queries() | latents()),
    )


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(config=architectures(), tp=sizes(16, 2), seed=sizes(2**16))
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
