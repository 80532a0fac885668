"""Keys and values in 8 bits: rounded as NumPy does, read by every backend, and the same tokens however."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDENS

from tpjax import LLM, SamplingParams
from tpjax.attention import Backend, KernelShape, Verdict, gpu, paged_attention, selftest, tpu
from tpjax.attention.reference import reference_attention
from tpjax.cache import NULL_PAGE, LayerCache, TokenGroup, cache_layout, page_bytes_per_device
from tpjax.cache_quantization import QuantizedBuffer, QuantizedDtype, dequantized, part_width, quantized
from tpjax.checkpoints.opening import read_config
from tpjax.checkpoints.parameters import abstract_decoder
from tpjax.cli.app import main
from tpjax.config import KVDtype
from tpjax.engine.engine import Engine
from tpjax.engine.request import Request
from tpjax.errors import ConfigError
from tpjax.hardware import HARDWARE
from tpjax.inspect.explain import explain_model
from tpjax.mesh import make_mesh
from tpjax.planning.cost_model import CostModel
from tpjax.planning.published import published_config
from tpjax.planning.workload import Workload
from tpjax.runtime.counts import Counts
from tpjax.runtime.limits import PAGE_SIZE, Limits
from tpjax.runtime.memory import DeviceMemory, plan_limits
from tpjax.runtime.programs import ProgramSpec
from tpjax.runtime.runner import Runner
from tpjax.windows import ONE_GROUP

KINDS: tuple[QuantizedDtype, ...] = ("int8", "fp8")
F32 = jnp.dtype("float32")
PAGE, BLOCKS, HEADS, WIDTH = 8, 5, 3, 16


def rounded(x: np.ndarray, kind: QuantizedDtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stored numbers and scales of vectors, and the vectors that these stand for, by NumPy and ml_dtypes."""
    x = np.asarray(x, np.float32)
    scales = np.abs(x).max(axis=-1) * np.float32(1 / 127 if kind == "int8" else 1 / 448)
    if kind == "int8":
        stored = np.rint(x / scales[..., None]).astype(np.int8)
        wide = stored.astype(np.float32)
    else:
        float8 = (x / scales[..., None]).astype(ml_dtypes.float8_e4m3fn)
        stored, wide = float8.view(np.uint8), float8.astype(np.float32)
    return stored, scales, wide * scales[..., None]


def vectors(seed: int, *shape: int) -> np.ndarray:
    """Vectors of very different magnitudes."""
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.normal(size=(*shape[:-1], 1)) * 3)
    return (rng.normal(size=shape) * scales).astype(np.float32)


# --- one vector --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_rounded_as_numpy_rounds_them(kind: QuantizedDtype) -> None:
    x = vectors(0, 4000, WIDTH)
    stored, scales, expected = rounded(x, kind)
    found, found_scales = jax.jit(quantized, static_argnums=1)(x, kind)
    np.testing.assert_array_equal(found, stored)
    np.testing.assert_array_equal(found_scales, scales)
    np.testing.assert_array_equal(dequantized(found, found_scales, F32), expected)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    error = np.abs(expected - x)
    assert (error <= largest * (0.5 / 127 if kind == "int8" else 16 / 448) * 1.001).all()
    assert error.max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_what_is_not_a_number(kind: QuantizedDtype) -> None:
    """Zeros stay zeros; a NaN or an infinity is not hidden: the request that it belongs to has to fail."""
    x = np.zeros((4, WIDTH), np.float32)
    x[1, 3], x[2, 5], x[3, 0] = np.nan, np.inf, 1e-38
    found = np.asarray(dequantized(*quantized(jnp.asarray(x), kind), F32))
    assert not found[0].any() and np.isfinite(found[3]).all()
    assert np.isnan(found[1]).any() and not np.isfinite(found[2]).all()


# --- the cache ---------------------------------------------------------------------------------------------


def cache_of(
    seed: int, pages: int, kind: QuantizedDtype, part: int | None = None
) -> tuple[LayerCache, list[np.ndarray]]:
    """A cache, and the vectors that its pages stand for."""
    content = [vectors(seed + n, pages, HEADS, PAGE, WIDTH) for n in range(2)]
    cache = LayerCache(*(QuantizedBuffer.of(jnp.asarray(x), kind, part) for x in content))
    return cache, [rounded(x, kind)[2] for x in content]


@pytest.mark.parametrize(("kind", "part"), (("int8", None), ("fp8", None), ("int8", 12)))
@pytest.mark.parametrize(
    ("length", "chunks"), ((1, False), (3, False), (4, True), (8, True), (16, True)), ids=str
)
def test_writes_change_their_own_vectors_alone(
    kind: QuantizedDtype, part: int | None, length: int, chunks: bool
) -> None:
    """Tokens anywhere, parts of a page, whole pages; the second of three rows is padding."""
    cache, pages = cache_of(0, 3 * BLOCKS + 1, kind, part)
    table = np.random.default_rng(length).permutation(3 * BLOCKS).reshape(3, BLOCKS).astype(np.int32) + 1
    first = np.array([16, 0, 8 if chunks else 6])
    table[1] = NULL_PAGE
    positions = first[:, None] + np.arange(length)
    new = [vectors(7 + n, 3, length, HEADS, WIDTH) for n in range(2)]
    lengths = jnp.asarray([length, 0, length], jnp.int32)
    group = TokenGroup(jnp.asarray(table), jnp.asarray(positions), lengths, chunks=chunks)
    written = jax.jit(LayerCache.write)(cache, *new, group)
    every = jnp.arange(3 * BLOCKS + 1)
    for number, found in enumerate(written.read(every)):
        expected = pages[number]
        for row in (0, 2):
            for i, at in enumerate(positions[row]):
                expected[table[row, at // PAGE], :, at % PAGE] = rounded(new[number][row, i], kind)[2]
        np.testing.assert_array_equal(found[1:], expected[1:])
        returned = cache.returned(*map(jnp.asarray, new))[number]
        np.testing.assert_array_equal(returned, rounded(new[number], kind)[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ("reference", "xla"))
@pytest.mark.parametrize(("length", "window"), ((1, None), (1, 11), (8, None)), ids=str)
def test_attention_reads_what_is_stored(
    kind: QuantizedDtype, backend: Any, length: int, window: int | None
) -> None:
    """Against the definition over the rounded vectors; what no query may read has scales that are NaN."""
    rng, first = np.random.default_rng(length), np.array([[24], [0], [16]]) + (1 if length == 1 else 0)
    positions = (first + np.arange(length)).astype(np.int32)
    dense = [vectors(n, 3, BLOCKS * PAGE, HEADS, WIDTH) / 8 for n in range(2)]
    table = rng.permutation(3 * BLOCKS).reshape(3, BLOCKS).astype(np.int32) + 1
    pages = np.full((2, 3 * BLOCKS + 1, HEADS, PAGE, WIDTH), np.nan, np.float32)
    for row, last in enumerate(positions[:, -1]):
        for at in range(last + 1):
            for part, content in zip(pages, dense, strict=True):
                part[table[row, at // PAGE], :, at % PAGE] = content[row, at]
    cache = LayerCache(*(QuantizedBuffer.of(jnp.asarray(part), kind) for part in pages))
    query = jnp.asarray(rng.normal(size=(3, length, HEADS, 2, WIDTH)), F32)
    group = TokenGroup(jnp.asarray(table), jnp.asarray(positions), chunks=length > 1)
    own = [content[np.arange(3)[:, None], positions] for content in dense]
    attend = functools.partial(paged_attention, scale=0.3, window=window, backend=Backend(backend))
    found = jax.jit(attend)(query, *cache.returned(*map(jnp.asarray, own)), cache, group)
    keys, values = (jnp.asarray(rounded(content, kind)[2]) for content in dense)
    expected = reference_attention(query, keys, values, group.positions, scale=0.3, window=window)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_no_program_widens_or_copies_a_cache(kind: QuantizedDtype) -> None:
    """Every buffer is donated; nothing of a buffer's shape is made, whatever its dtype."""
    config, mesh = read_config(GOLDENS / "llama"), make_mesh(2)
    limits = Limits(4, 512, 41, PAGE_SIZE)
    runner = Runner(abstract_decoder(config, mesh, F32), mesh, limits, F32, kv_dtype=kind)
    buffers = jax.tree.leaves(runner.abstract_state().cache)
    sizes = {buffer.sharding.shard_shape(buffer.shape) for buffer in buffers}
    shapes = "|".join(",".join(map(str, size)) for size in sizes)
    for spec in (
        ProgramSpec("decode", 4, greedy=True),
        ProgramSpec("step", 4, limits.mixed_chunk_shapes[-1], greedy=True),
    ):
        compiled: Any = runner.program(spec)
        memory, text = compiled.memory_analysis(), compiled.as_text()
        stored = sum(buffer.size * buffer.dtype.itemsize for buffer in buffers) // 2
        assert memory.alias_size_in_bytes >= stored
        made = re.findall(rf"= (\w+)\[(?:{shapes})\]\S* (convert|copy|transpose|bitcast-convert)\(", text)
        assert not made


# --- the engine --------------------------------------------------------------------------------------------


def run(
    llm: LLM, prompts: Sequence[Sequence[int]], tokens: int, budget: int | None, pages: int | None = None
) -> tuple[list[list[int]], Engine]:
    """Runs requests side by side on an engine of its own: a token budget cuts chunks, few pages preempt."""
    engine = Engine(llm.runner, budget)
    if pages is not None:
        engine.scheduler.pages.blocks._free_list = engine.scheduler.pages.blocks._free_list[-pages:]
    requests = [Request(list(ids), SamplingParams(tokens, 0, ignore_eos=True), 0) for ids in prompts]
    for request in requests:
        engine.add(request)
    while engine.busy:
        engine.step()
    return [request.output_token_ids for request in requests], engine


@pytest.mark.parametrize(
    ("name", "kind", "tps"),
    (
        ("llama", "int8", (2,)),
        pytest.param("llama", "fp8", (1, 8), marks=pytest.mark.slow),
        pytest.param("gemma3", "int8", (1, 4), marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "int8", (1, 3), marks=pytest.mark.slow),
    ),
)
def test_the_same_tokens_however_they_are_computed(
    name: str, kind: QuantizedDtype, tps: tuple[int, ...]
) -> None:
    """At every tp: in chunks of any size, with prefixes found, and preempted for want of pages."""
    common = np.random.default_rng(0).integers(3, 50, 140).tolist()
    prompts = [common + np.random.default_rng(n).integers(3, 50, n).tolist() for n in (3, 40, 130)]
    expected: list[list[int]] = []
    for tp in tps:
        llm = LLM(GOLDENS / name, tp=tp, max_model_len=512, max_slots=3, kv_dtype=kind)
        alone = [run(llm, [prompt], 120, None)[0][0] for prompt in prompts]
        expected = expected or alone
        assert alone == expected
        if tp != tps[-1]:  # of several, the others are what the last is held to
            llm.close()
            continue
        assert run(llm, prompts[1:], 120, 128)[0] == expected[1:]
        few, engine = run(llm, prompts, 120, 32, pages=4 * len(llm.runner.limits.windows))
        assert few == expected
        assert engine.scheduler.preemptions and engine.stats().prefix_hits
        llm.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ("llama", "deepseek_v3"))
def test_greedy_tokens_at_any_tp(name: str, kind: QuantizedDtype) -> None:
    prompt, found = np.random.default_rng(1).integers(3, 50, 20).tolist(), []
    for tp in (1, 3, 8):
        with LLM(GOLDENS / name, tp=tp, max_model_len=128, max_slots=1, kv_dtype=kind) as llm:
            (one,) = llm.generate([prompt], max_tokens=48, temperature=0, ignore_eos=True)
        found.append(one.token_ids)
    assert found == found[:1] * 3 and len(set(found[0])) > 8


@pytest.mark.slow
def test_with_quantised_weights_replicas_stages_and_scores() -> None:
    """Replicas and stages generate what one model does; scores of a prompt are those of its logits."""
    prompts = [np.random.default_rng(n).integers(3, 50, 40 * n + 150).tolist() for n in range(3)]
    options: dict[str, Any] = {"max_model_len": 512, "max_slots": 2, "quantize": "int8", "kv_dtype": "int8"}
    asked = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, prompt_logprobs=1)
    found = []
    for layout in ({"tp": 1}, {"tp": 3}, {"tp": 1, "dp": 2}, {"tp": 1, "pp": 2}):
        with LLM(GOLDENS / "llama", **layout, **options) as llm:
            found.append(llm.generate(prompts, asked))
            logits = llm.logits(prompts[0])
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for done in found:
        assert [one.token_ids for one in done] == [one.token_ids for one in found[0]]
        scores = [entry.logprob for entry in (done[0].prompt_logprobs or [])[1:] if entry is not None]
        expected = logprobs[np.arange(len(prompts[0]) - 1), prompts[0][1:]]
        np.testing.assert_allclose(scores, expected, atol=1e-4)


# --- bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ("llama", "gemma3", "deepseek_v3"))
def test_one_count_of_the_bytes(name: str, kind: QuantizedDtype) -> None:
    """The fit into memory, explain, plan and the buffers themselves."""
    config = read_config(GOLDENS / name)
    limits = plan_limits(
        config,
        2,
        F32,
        weight_bytes=0,
        memory=DeviceMemory(2**30),
        max_model_len=256,
        max_slots=2,
        kv_dtype=kind,
    )
    runner = Runner(abstract_decoder(config, make_mesh(2), F32), make_mesh(2), limits, F32, kv_dtype=kind)
    held = sum(
        int(np.prod(buffer.sharding.shard_shape(buffer.shape))) * buffer.dtype.itemsize
        for buffer in jax.tree.leaves(runner.abstract_state().cache)
    )
    page = page_bytes_per_device(config, 2, PAGE_SIZE, F32, "cpu", limits.windows, kind)
    assert held == page * limits.num_pages
    for chip in ("h200", "v5e"):  # whose rows are padded
        plan = CostModel(Counts("", config), HARDWARE[chip], 2, Workload(cache_dtype=kind))
        on_chip = page_bytes_per_device(
            config, 2, PAGE_SIZE, F32, plan.hardware.platform, limits.windows, kind
        )
        assert plan.page_bytes(limits.windows) == on_chip
    wide = page_bytes_per_device(config, 2, PAGE_SIZE, F32, "cpu", ONE_GROUP)
    assert page_bytes_per_device(config, 2, PAGE_SIZE, F32, "cpu", ONE_GROUP, kind) < 0.6 * wide


def test_explain_and_the_runner_agree() -> None:
    report = explain_model(str(GOLDENS / "llama"), tp=2, kv_dtype="int8", max_model_len=256)
    assert report.kv_dtype == "int8"
    assert "float32 with int8 keys and values" in str(report.__rich__().renderables[0])
    given = report.weight_bytes_per_device + report.cache["bytes_per_device"] + report.state_bytes_per_device
    assert report.steps[0].argument_bytes == pytest.approx(given, rel=0.01)
    devices = report.cache["devices"]
    page = report.cache["page_bytes_per_device"]
    each = devices[0].held + devices[0].copied + devices[0].zeros
    assert each == page * report.cache["num_pages"]


@pytest.mark.parametrize(("name", "heads", "width"), (("gemma-3-1b", 8, 256), ("deepseek-v3", 1, 640)))
def test_a_tpu_stores_wide_vectors_in_parts(name: str, heads: int, width: int) -> None:
    """Of 128 elements, the last one padded; its scales are a vector's as elsewhere."""
    config = published_config(name)
    stored = page_bytes_per_device(config, 8, PAGE_SIZE, F32, "tpu", kv_dtype="int8")
    layout = cache_layout(config, 8, 1, PAGE_SIZE)
    wide = QuantizedBuffer.abstract(
        layout.shape, "int8", F32, part_width(layout.shape[-1], "tpu"), None, None
    )
    assert wide.values.shape == (1, heads * width // 128, PAGE_SIZE, 128)
    assert (wide.shape, wide.scales.shape) == (layout.shape, (heads, 1, PAGE_SIZE))
    devices = heads  # each has one head, or all of the latents
    buffers = layout.count * config.num_layers
    assert stored == buffers * PAGE_SIZE * heads // devices * (width + 4)


# --- what is asked for -------------------------------------------------------------------------------------


def test_bad_dtypes(capsys: pytest.CaptureFixture[str]) -> None:
    wrong: Any = "int4"
    for call in (
        lambda: LLM(GOLDENS / "llama", kv_dtype=wrong),
        lambda: explain_model(str(GOLDENS / "llama"), kv_dtype=wrong),
    ):
        with pytest.raises(ConfigError, match=r"^kv_dtype='int4' is not supported: use auto, int8 or fp8$"):
            call()
    assert main(["generate", "hi", str(GOLDENS / "llama"), "--kv-dtype", "int4"]) == 2
    assert "'int4' is not one of" in capsys.readouterr().err


@pytest.mark.parametrize("kind", (KINDS[0], pytest.param(KINDS[1], marks=pytest.mark.slow)))
@pytest.mark.parametrize(
    "name",
    (
        "llama",
        pytest.param("gpt_oss", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", marks=pytest.mark.slow),
    ),
)
def test_the_kernel_is_checked_with_its_cache(
    name: str, kind: QuantizedDtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for constant, value in {"_CONTEXT": 20, "_ROWS": 3, "_CALLS": 1, "_ROUNDS": 1}.items():
        monkeypatch.setattr(selftest, constant, value)
    monkeypatch.setattr(tpu, "_BLOCK_KEYS", 16)
    monkeypatch.setattr(tpu, "_MOST_HEADS", 2)
    config, device = read_config(GOLDENS / name), jax.devices()[0]

    def check(kv_dtype: KVDtype) -> Verdict:
        shape = KernelShape.of(config, 2, F32, 8, kv_dtype)
        return selftest.verdict("tpu", shape, device, tmp_path, interpret=True)

    assert check(kind).right
    monkeypatch.setattr(selftest, "_check", lambda *_: pytest.fail("checked again"))
    assert check(kind).error < 1e-5
    with pytest.raises(pytest.fail.Exception):
        check("auto")  # of a cache that is not quantised nothing is known


def test_blocks_fit_into_the_shared_memory_of_a_hopper_gpu() -> None:
    """Of 227 KiB; each buffer begins at a multiple of 1,024 bytes, and barriers took 2,216 beside them.

    Compiled ahead of time, heads of 192 and 256 in float8 exceeded it by 1,192.
    """

    def aligned(size: int) -> int:
        return -(-size // 1024) * 1024

    for widths in itertools.product(range(32, 257, 32), repeat=2):
        for rows in (1, 16, 64):
            tiling = gpu.choose_tiling(1, 3, rows, 1024, widths, 2, quantized=True)
            assert tiling.stages >= 2
            blocks = sum(aligned(tiling.stages * 64 * width) for width in widths)
            wide = sum(aligned(64 * width * 2) for width in widths)
            others = aligned(64 * widths[0] * 2) + 2 * 1024 + 2 * aligned(tiling.stages * 64 * 4)
            assert max(blocks, 64 * widths[1] * 4) + wide + others + 2216 <= 227 << 10, widths
