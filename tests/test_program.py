"""What the compiled programs hold: collectives, aliasing, copies, and how many programs there are."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS

from tpjax import LLM, SamplingParams
from tpjax.attention import Backend
from tpjax.checkpoints.opening import read_config
from tpjax.checkpoints.parameters import abstract_decoder
from tpjax.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig, SequenceParallel
from tpjax.inspect.budget import collective_budget, measured
from tpjax.inspect.collectives import find_collectives
from tpjax.mesh import make_mesh
from tpjax.runtime.limits import ChunkShape, Limits, chunk_shapes, mixed_chunk_shapes
from tpjax.runtime.programs import ProgramSpec
from tpjax.runtime.runner import Runner
from tpjax.sharding import REPLICATED, SEQUENCE_PARALLEL

# Large enough that a weight- or cache-sized buffer cannot be mistaken for an activation.
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=1000,
    hidden_size=96,
    num_layers=3,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    attention=AttentionConfig(
        num_heads=9, num_kv_heads=3, head_dim=32, query_scale=32**-0.5, layer_types=("full_attention",) * 3
    ),
    mlp=MLPConfig(intermediate_size=200),
    norm=NormConfig(eps=1e-5),
)
LIMITS = Limits(max_slots=4, max_model_len=2048, num_pages=65)


def abstract_runner(tp: int) -> Runner:
    mesh = make_mesh(tp)
    return Runner(abstract_decoder(CONFIG, mesh, jnp.dtype("float32")), mesh, LIMITS, jnp.dtype("float32"))


GREEDY_TOKENS = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
SAMPLED_TOKENS = SamplingParams(max_tokens=6, temperature=0.7, seed=1, ignore_eos=True)
DECODE = ProgramSpec("decode", 4)
GREEDY = ProgramSpec("decode", 4, greedy=True)
MIXED = ProgramSpec("step", 4, ChunkShape(2, 32))
PREFILL = ProgramSpec("step", 0, ChunkShape(1, 512))


@pytest.fixture(
    scope="module",
    params=((1, GREEDY), (3, DECODE), (8, GREEDY), (1, MIXED), (4, MIXED), (3, PREFILL)),
    ids=lambda case: f"tp{case[0]}-{case[1]}",
)
def program(request: pytest.FixtureRequest) -> tuple[int, ProgramSpec, jax.stages.Compiled]:
    tp, spec = request.param
    return tp, spec, abstract_runner(tp).program(spec)


def test_collective_budget(program: tuple[int, ProgramSpec, jax.stages.Compiled]) -> None:
    """Two all-reduces a layer, one for the embedding, one small gather to sample; nothing of size V."""
    tp, spec, compiled = program
    found = find_collectives(compiled.as_text())
    if tp == 1:
        assert not [one for one in found if one.group_size > 1]
        return
    budget = collective_budget(CONFIG, tp, tokens=spec.tokens, rows=spec.sampled_rows, greedy=spec.greedy)
    figures = measured(found)
    assert figures == {name: budget[name] for name in figures}
    assert not [one for one in found if one.conditional]
    residual = [one for one in found if one.bytes == spec.tokens * CONFIG.hidden_size * 4]
    assert [one.kind for one in residual] == ["all-reduce"] * (2 * CONFIG.num_layers + 1)
    # samplers that some requests ask for move O(B · 20 · tp) numbers
    assert max(one.bytes for one in found if one not in residual) <= spec.sampled_rows * 48 * tp * 4


@pytest.mark.parametrize(
    ("name", "of_a_layer"), (("cohere", [36]), ("gpt_neox", [36]), ("olmo2", [2, 36, 36]), ("gpt2", [36, 36]))
)
def test_collective_budget_of_other_blocks(name: str, of_a_layer: list[int]) -> None:
    """Numbers a token that each all-reduce sums: attention and MLP side by side share one."""
    mesh, float32 = make_mesh(4), jnp.dtype("float32")
    model = abstract_decoder(read_config(GOLDENS / name), mesh, float32)
    runner = Runner(model, mesh, Limits(max_slots=1, max_model_len=128, num_pages=2), float32)
    found = find_collectives(runner.program(ProgramSpec("decode", 1, greedy=True)).as_text())
    reduced = [one.bytes // 4 for one in found if one.kind == "all-reduce" and not one.conditional]
    assert sorted(reduced) == sorted([36, *of_a_layer * model.config.num_layers])
    assert len(reduced) == collective_budget(model.config, 4, greedy=True)["all_reduces"]


@pytest.mark.parametrize(
    ("name", "gathers_of_a_layer"),
    [("qwen3", 2), ("gemma2", 2), ("cohere", 1), ("gpt_neox", 2), ("mixtral", 2), ("deepseek_v3", 2)],
)
def test_prefill_with_the_residual_cut_over_positions(name: str, gathers_of_a_layer: int) -> None:
    """Each block gathers what it reads once, and moves nothing else of that size but its sum."""
    mesh, float32 = make_mesh(4), jnp.dtype("float32")
    model = abstract_decoder(read_config(GOLDENS / name), mesh, float32)
    limits = Limits(max_slots=1, max_model_len=128, num_pages=2)
    runner = Runner(model, mesh, limits, float32, sequence_parallel="on")
    spec = ProgramSpec("step", 0, ChunkShape(2, 32), greedy=True)
    assert runner.programs.residual_spec(spec) == SEQUENCE_PARALLEL
    found = [one for one in find_collectives(runner.program(spec).as_text()) if one.bytes > 2048]
    gathers = [one for one in found if one.kind == "all-gather"]
    assert sum(one.count for one in gathers) == gathers_of_a_layer * model.config.num_layers
    # XLA has no reduce-scatter on CPU: an all-reduce and a slice
    sums = [one for one in found if one.kind in ("all-reduce", "reduce-scatter")]
    assert sum(one.count for one in sums) == collective_budget(model.config, 4, greedy=True)["all_reduces"]
    assert len(found) == len(gathers) + len(sums)


def test_where_the_residual_is_cut() -> None:
    float32 = jnp.dtype("float32")
    mesh = make_mesh(3)

    def runner(sequence_parallel: SequenceParallel) -> Runner:
        return Runner(abstract_decoder(CONFIG, mesh, float32), mesh, LIMITS, float32, sequence_parallel)

    for spec in (PREFILL, MIXED):  # tp need not divide their tokens: they are padded
        assert runner("on").programs.residual_spec(spec) == SEQUENCE_PARALLEL
        assert runner("auto").programs.residual_spec(spec) == REPLICATED  # on a CPU
        assert runner("off").programs.residual_spec(spec) == REPLICATED
    assert runner("on").programs.residual_spec(DECODE) == REPLICATED


def test_profiles_name_the_phases_of_sampling() -> None:
    hlo = abstract_runner(1).program(DECODE).as_text()
    names = {name for name in re.findall(r'op_name="([^"]*)"', hlo) if "/sampling/" in name}
    for phase in ("penalties", "mask", "top_k", "top_p", "gumbel", "winner", "logprobs"):
        assert any(f"/{phase}/" in name for name in names), phase
    assert all(name.startswith("jit(decode)/") for name in names)


def test_cache_is_updated_in_place(program: tuple[int, ProgramSpec, jax.stages.Compiled]) -> None:
    tp, spec, compiled = program
    runner = abstract_runner(tp)
    state = runner.abstract_state()
    per_device = sum(
        int(np.prod(buffer.sharding.shard_shape(buffer.shape))) * buffer.dtype.itemsize
        for buffer in jax.tree.leaves(state)
    )
    analysis = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes == per_device  # every buffer of the state, the whole cache included
    one_buffer = state.cache.entries[0].keys
    cache_bytes = int(np.prod(one_buffer.sharding.shard_shape(one_buffer.shape))) * 4
    if not spec.chunks:
        assert analysis.temp_size_in_bytes < cache_bytes


def test_no_weight_or_cache_sized_copy(program: tuple[int, ProgramSpec, jax.stages.Compiled]) -> None:
    tp, _, compiled = program
    runner = abstract_runner(tp)
    big = set()
    for buffer in (*jax.tree.leaves(runner.abstract_state().cache), *runner.weights):
        if buffer.ndim > 1:
            big.add(tuple(sorted(buffer.sharding.shard_shape(buffer.shape))))
    assert copies_of(big, compiled.as_text()) == []


def test_copy_detector_sees_a_copy() -> None:
    """The test above must be able to fail."""
    copied = jax.jit(lambda x: (x.T + 0, x)).lower(jnp.zeros((96, 200))).compile().as_text()
    assert copies_of({(96, 200)}, copied)


def copies_of(shapes: set[tuple[int, ...]], hlo: str) -> list[str]:
    """Copies and transposes whose result has one of the shapes, in any order of dimensions."""
    found = []
    for match in re.finditer(r"^\s*\S+ = \w+\[([\d,]+)\]\S* (copy|transpose)\(.*$", hlo, re.MULTILINE):
        dims = tuple(sorted(int(n) for n in match[1].split(",")))
        if dims in shapes:
            found.append(match[0].strip())
    return found


@contextmanager
def backend_compiles() -> Iterator[list[str]]:
    """Every program XLA compiles inside the block, by JAX's own events: not by our counter."""
    events: list[str] = []

    def listen(name: str, duration: float, **_: object) -> None:
        if name.endswith("backend_compile_duration"):
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def tiny(tp: int) -> LLM:
    """At tp=1, where several tests use it, with a program less for each number of rows."""
    return LLM(GOLDENS / "llama", tp=tp, max_model_len=512, max_slots=2 if tp == 1 else 3)


@functools.cache
def after_warm_up(tp: int) -> list[list[int]]:
    """The tokens of various requests to a model that was warmed up first: none of them compiles anything."""
    llm = tiny(tp)
    with backend_compiles() as events:
        llm.warm_up()
    assert len(events) >= llm.runner.compile_count > 0  # the listener hears compilations
    count = llm.runner.compile_count
    with backend_compiles() as events:
        tokens = various_requests(llm)
    assert events == []
    assert llm.runner.compile_count == count
    return tokens


@pytest.mark.parametrize("tp", (1, pytest.param(4, marks=pytest.mark.slow)))
def test_nothing_compiles_after_warm_up(tp: int) -> None:
    assert all(after_warm_up(tp))


def various_requests(llm: LLM) -> list[list[int]]:
    """The tokens of requests of all lengths, alone and together, greedy and sampled."""
    rng, tokens = np.random.default_rng(0), []
    for length in (1, 2, 31, 32, 33, 100, 127, 128, 129, 300, 480):
        prompts = [rng.integers(0, 131, max(1, length - 7 * i)).tolist() for i in range(length % 4 + 1)]
        params = [
            SamplingParams(
                max_tokens=1 + (length + i) % 9,
                temperature=i % 2,
                top_k=i,
                logprobs=i,
                presence_penalty=i / 2,
                seed=i,
            )
            for i in range(len(prompts))
        ]
        tokens += [completion.token_ids for completion in llm.generate(prompts, params)]
    return tokens


def test_no_request_waits_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the rest compiles in the background, the first programs stand in for it: with the same tokens."""
    expected, llm = after_warm_up(1), tiny(1)
    compile_others = Runner._compile_others
    monkeypatch.setattr(Runner, "_compile_others", lambda self: None)  # as slow as can be
    llm.warm_up(background=True)
    programs = llm.runner.programs
    assert set(programs.compiled) == set(programs.first()) < set(programs.serving())
    assert programs.progress == (len(programs.first()), len(programs.serving()))
    with backend_compiles() as events:
        assert various_requests(llm) == expected
    assert events == [] and set(programs.compiled) == set(programs.first())
    compile_others(llm.runner)
    assert set(programs.compiled) == set(programs.serving()) and programs.progress == (0, 0)
    with backend_compiles() as events:
        assert various_requests(llm) == expected
    assert events == []


def test_two_threads_that_need_a_program_compile_it_once() -> None:
    runner, spec = abstract_runner(1), ProgramSpec("set_history")
    with backend_compiles() as events, ThreadPoolExecutor(4) as pool:
        one, *others = pool.map(runner.programs.get, [spec] * 4)
    assert all(other is one for other in others) and len(events) == 1
    for _ in range(2):  # one that cannot be compiled keeps nobody waiting
        with pytest.raises(AttributeError), ThreadPoolExecutor(2) as pool:
            list(pool.map(runner.programs.get, [ProgramSpec("nothing")] * 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("platform", ("cpu", "tpu", "gpu"))
@pytest.mark.parametrize("slots", (1, 8, 64, 256))
def test_there_are_few_programs(platform: str, slots: int) -> None:
    mesh, float32 = make_mesh(1), jnp.dtype("float32")
    shapes = {"chunk_shapes": chunk_shapes(platform), "mixed_shapes": mixed_chunk_shapes(platform)}
    limits = Limits(max_slots=slots, max_model_len=2048, num_pages=17, **shapes)
    backend = Backend("xla", walk_pages=8, short_chunk_pages=8, fixed_trips=platform == "gpu")
    decoder = abstract_decoder(CONFIG, mesh, float32, backend=backend)
    runner = Runner(decoder, mesh, limits, float32)
    specs = runner.programs.serving()
    assert len(set(specs)) == len(specs) <= 24
    assert set(runner.programs.first()) <= set(specs)  # nothing is compiled first that serving never calls
    # every number of rows and every prompt has a program
    for rows in (1, slots):
        for tokens in (1, 2048):
            shape = runner.decode_shapes_for([tokens] * rows)[0]
            assert ProgramSpec.decode(shape, greedy=True) in specs and shape.rows >= rows
    assert {spec.batch for spec in specs if spec.kind == "step"} >= {0, slots}


def test_what_is_prepared_is_all_that_a_prompt_needs() -> None:
    llm = tiny(1)
    for length, params in ((5, GREEDY_TOKENS), (40, GREEDY_TOKENS), (300, SAMPLED_TOKENS)):
        prompt = [1 + i % 100 for i in range(length)]
        llm.prepare(prompt, params)
        count = llm.runner.compile_count
        assert len(list(llm.stream(prompt, params))) > 1
        assert llm.runner.compile_count == count


@pytest.mark.slow
def test_two_thousand_asynchronous_steps_at_tp8() -> None:
    """What deadlocks jax 0.10.2 with faked devices and a small thread pool; in a process of its own."""
    program = """
import tpjax
tpjax.fake_devices(8)
from tpjax import LLM, SamplingParams
from tpjax.config import SequenceParallel
from dataclasses import replace
from tpjax.runtime.rows import Chunk, Row
llm = LLM({path!r}, tp=8, max_model_len=256, max_slots=1)
row = Row(0, 5, [[1, 2]], SamplingParams(temperature=0), seed=0)
llm.runner.step([], [Chunk(replace(row, position=0), [5, 6, 7, 8, 9])])
for _ in range(2000):
    sampled = llm.runner.decode([row], 1)  # never waited for
print("done", int(sampled.tokens[0, 0]))
"""
    source = program.format(path=str(GOLDENS / "llama"))
    out = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=480)
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.startswith("done")
