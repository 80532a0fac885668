"""Latent attention: both of its forms are the same sums, and what a decode step of it moves and copies."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_program import LIMITS, copies_of

from tpjax.attention.reference import reference_attention
from tpjax.cache import LatentCache, cache_layout, page_bytes_per_device
from tpjax.checkpoints.parameters import abstract_decoder, parameters
from tpjax.config import (
    AttentionConfig,
    ConfigError,
    LatentConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
)
from tpjax.inspect.collectives import find_collectives
from tpjax.inspect.explain import explain
from tpjax.layers.latent_attention import KeyValueProjection
from tpjax.mesh import make_mesh
from tpjax.runtime.programs import ProgramSpec
from tpjax.runtime.runner import Runner

F32 = jnp.dtype("float32")
HEADS, NOPE, ROPE, RANK, VALUE = 9, 16, 8, 40, 24

# Large enough that a weight- or cache-sized buffer cannot be mistaken for an activation.
CONFIG = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=1000,
    hidden_size=96,
    num_layers=2,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    attention=AttentionConfig(
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=NOPE + ROPE,
        query_scale=0.2,
        layer_types=("full_attention",) * 2,
        latent=LatentConfig(q_lora_rank=56, kv_lora_rank=RANK, v_head_dim=VALUE),
    ),
    rope=RopeConfig(rotary_dim=ROPE),
    mlp=MLPConfig(intermediate_size=200),
    norm=NormConfig(eps=1e-5),
)


def random(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_absorbed_equals_expanded() -> None:
    """Attention to expanded keys and values, and to the latents themselves with absorbed projections."""
    with jax.set_mesh(make_mesh(1)):
        project = KeyValueProjection(CONFIG, HEADS, F32)
    state = nnx.state(project)
    nnx.update(project, jax.tree.map(lambda w: jnp.asarray(random(*w.shape, seed=w.shape[0])), state))
    latents, query = random(2, 1, 7, RANK + ROPE, seed=1), random(2, 3, HEADS, 1, NOPE + ROPE, seed=2)
    latents, query = jnp.asarray(latents), jnp.asarray(query)
    positions = jnp.array([[4, 5, 6], [0, 1, 2]])

    keys, values = project.expand(latents)
    assert keys.shape == (2, HEADS, 7, NOPE + ROPE) and values.shape == (2, HEADS, 7, VALUE)
    naive = reference_attention(
        query, keys.swapaxes(1, 2), values.swapaxes(1, 2), positions, scale=0.2, window=None
    )
    absorbed = jnp.concatenate([project.absorb(query[..., :NOPE]), query[..., NOPE:]], axis=-1)
    every_head = np.repeat(latents.swapaxes(1, 2), HEADS, axis=2)
    weighted = reference_attention(
        absorbed, every_head, every_head[..., :RANK], positions, scale=0.2, window=None
    )
    np.testing.assert_allclose(project.project_values(weighted), naive, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=(1, 4))
def decode(request: pytest.FixtureRequest) -> tuple[int, Runner, jax.stages.Compiled]:
    mesh = make_mesh(request.param)
    runner = Runner(abstract_decoder(CONFIG, mesh, F32), mesh, LIMITS, F32)
    return request.param, runner, runner.program(ProgramSpec("decode", 4, greedy=True))


def test_collective_budget(decode: tuple[int, Runner, jax.stages.Compiled]) -> None:
    """As other attention: two all-reduces a layer, one for the embedding, nothing else of their size."""
    tp, _, program = decode
    always = [one for one in find_collectives(program.as_text()) if not one.conditional]
    residual = [one for one in always if one.bytes == 4 * CONFIG.hidden_size * 4]
    expected = [] if tp == 1 else ["all-reduce"] * (2 * CONFIG.num_layers + 1)
    assert [one.kind for one in residual if one.group_size > 1] == expected
    assert all(one.bytes <= tp * 2 * 4 * 4 for one in always if one not in residual)  # sampling


def test_decode_copies_neither_weights_nor_cache(decode: tuple[int, Runner, jax.stages.Compiled]) -> None:
    _, runner, program = decode
    state = runner.abstract_state()
    shards = {
        tuple(sorted(buffer.sharding.shard_shape(buffer.shape)))
        for buffer in (*jax.tree.leaves(state.cache), *runner.weights)
        if buffer.ndim > 1
    }
    assert copies_of(shards, program.as_text()) == []
    per_device = sum(
        int(np.prod(buffer.sharding.shard_shape(buffer.shape))) * buffer.dtype.itemsize
        for buffer in jax.tree.leaves(state)
    )
    assert program.memory_analysis().alias_size_in_bytes == per_device


@pytest.mark.parametrize("tp", (1, 4, 16))
def test_cache_does_not_grow_with_heads(tp: int) -> None:
    layout = cache_layout(CONFIG, tp, 5, 128)
    assert (layout.layer, layout.count, layout.shape) == (LatentCache, 1, (5, 1, 128, RANK + ROPE))
    assert page_bytes_per_device(CONFIG, tp, 128, F32) == 2 * 128 * (RANK + ROPE) * 4


@pytest.mark.parametrize("tp", (1, 4))
def test_padding_is_what_heads_add(tp: int) -> None:
    """Nine heads over four devices are twelve; the one stored matrix is the checkpoint's in two parts."""
    mesh = make_mesh(tp)
    layouts = {p.name: p.layout for p in parameters(abstract_decoder(CONFIG, mesh, F32), mesh)}
    extra = 0 if tp == 1 else 3
    assert layouts["layers.0.self_attn.kv_b_proj.key"].padding == extra * NOPE * RANK
    assert layouts["layers.0.self_attn.kv_b_proj.value"].padding == extra * VALUE * RANK
    assert layouts["layers.0.self_attn.o_proj.weight"].padding == extra * VALUE * 96
    assert layouts["layers.0.self_attn.a_proj.weight"].padding == 0


def test_explain(decode: tuple[int, Runner, jax.stages.Compiled]) -> None:
    tp, runner, _ = decode
    report = explain(runner, "tiny")
    assert (report.heads["padded_heads"], report.heads["kv_padding"]) == ((9, 0) if tp == 1 else (12, 3))
    assert "one latent per token" in report.heads["summary"]
    assert (report.cache["spec"], report.cache["buffers"]) == ("replicated", CONFIG.num_layers)
    assert report.cache["bytes_per_token_per_device"] == CONFIG.num_layers * (RANK + ROPE) * 4


def test_bad_sizes() -> None:
    for name in ("q_lora_rank", "kv_lora_rank", "v_head_dim"):
        sizes = {"q_lora_rank": 1, "kv_lora_rank": 1, "v_head_dim": 1, name: 0}
        with pytest.raises(ConfigError, match=f"{name}=0 is not a whole number"):
            LatentConfig(**sizes)


def test_what_latent_attention_has_not() -> None:
    message = "=.* is not supported with latent attention"
    with pytest.raises(ConfigError, match=f"qk_norm{message}"):
        replace(CONFIG.attention, qk_norm="head")
    with pytest.raises(ConfigError, match=f"position_embedding{message}"):
        replace(CONFIG, position_embedding="learned")
    with pytest.raises(ConfigError, match=f"rope_layers{message}"):
        replace(CONFIG, rope=replace(CONFIG.rope, layers=(True, False)))
