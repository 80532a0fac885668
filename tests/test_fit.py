"""What fits is known before a weight is read: tpjax/runtime/memory.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tpjax.cache import PagedKVCache, page_bytes_per_device
from tpjax.checkpoints.parameters import abstract_decoder, parameters
from tpjax.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig
from tpjax.errors import ConfigError
from tpjax.mesh import make_mesh
from tpjax.runtime import memory as memory_module
from tpjax.runtime.limits import ChunkShape, Limits, chunk_shapes
from tpjax.runtime.memory import (
    DeviceMemory,
    MeshShare,
    max_histories,
    plan_limits,
    plan_stages,
    sampler_bytes,
    workspace_bytes,
)
from tpjax.runtime.programs import ProgramSpec
from tpjax.runtime.runner import Runner
from tpjax.runtime.state import DeviceState

F32 = jnp.dtype("float32")
MIB = 2**20
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=32_000,
    hidden_size=512,
    num_layers=2,
    max_position_embeddings=4096,
    attention=AttentionConfig(
        num_heads=8, num_kv_heads=4, head_dim=64, query_scale=0.125, layer_types=("full_attention",) * 2
    ),
    mlp=MLPConfig(intermediate_size=1536),
    norm=NormConfig(eps=1e-5),
)
PAGE = page_bytes_per_device(CONFIG, 1, 128, F32)  # 2 · 2 layers · 4 heads · 128 · 64 · 4 bytes
WORK = workspace_bytes(CONFIG, 1, F32, 4, 512) + sampler_bytes(CONFIG, 1, 4, 4)


def limits(
    free: int | None,
    cap: int | None = None,
    *,
    weights: int = 100 * MIB,
    platform: str = "cpu",
    **options: Any,
) -> Limits:
    options = {"max_model_len": None, "max_slots": 4, **options}
    memory = None if free is None else DeviceMemory(free, cap, platform)
    return plan_limits(CONFIG, 1, F32, weight_bytes=weights, memory=memory, **options)


def test_page_bytes() -> None:
    assert PAGE == 2 * 2 * 4 * 128 * 64 * 4 == 512 * 1024


def test_enough_memory_holds_every_slot_at_full_length() -> None:
    for plenty in (None, 2**40):
        got = limits(plenty)
        assert (got.max_model_len, got.num_pages) == (4096, 4 * 32 + 1)


def test_pages_fill_what_is_left() -> None:
    got = limits(100 * MIB + WORK + 51 * PAGE + PAGE // 2)
    assert (got.max_model_len, got.num_pages) == (4096, 51)  # the null page included
    tight = limits(100 * MIB + WORK + 11 * PAGE)
    assert (tight.max_model_len, tight.num_pages) == (1280, 11)  # the context shrinks to what one can have


def test_all_stages_have_the_pages_of_the_one_with_least_room() -> None:
    """Stages of unlike numbers of devices: what counts is each one's own weights and own pages."""
    parts = [CONFIG.of_layers([0]), CONFIG.of_layers([1])]
    shares = [MeshShare(parts[0], 2, 20 * MIB), MeshShare(parts[1], 1, 100 * MIB)]
    pages = [page_bytes_per_device(one.config, one.tp, 128, F32) for one in shares]
    assert 2 * pages[0] == pages[1]
    asked: Any = {"max_model_len": None, "max_slots": 4}
    work = workspace_bytes(parts[1], 1, F32, 4, 512) + sampler_bytes(CONFIG, 1, 4, 4)
    memory = DeviceMemory(100 * MIB + work + 9 * pages[1])
    got = plan_stages(CONFIG, shares, F32, memory=memory, **asked)
    assert (got.num_pages, got.stages, got.steps) == (9, 2, 1)
    with pytest.raises(ConfigError, match="does not fit: stage 2 of 2 at tp=1 in float32 each device needs"):
        plan_stages(CONFIG, shares, F32, memory=replace(memory, free=100 * MIB + work), **asked)


def test_a_cap_holds_unless_one_sequence_needs_more() -> None:
    assert limits(2**40, 40 * PAGE).num_pages == 41
    asked = limits(2**40, 10 * PAGE, max_model_len=4096)
    assert (asked.max_model_len, asked.num_pages) == (4096, 33)
    assert limits(2**40, 10 * PAGE).max_model_len == 1280


def test_refusal_has_the_sizes_and_what_would_fit() -> None:
    with pytest.raises(ConfigError) as error:
        limits(100 * MIB + WORK + 11 * PAGE, max_model_len=4000)
    assert str(error.value) == (
        "the model does not fit: at tp=1 in float32 each device needs 100 MiB for weights, "
        f"{memory_module.human_bytes(workspace_bytes(CONFIG, 1, F32, 4, 512))} for temporaries, "
        f"{memory_module.human_bytes(sampler_bytes(CONFIG, 1, 4, 4))} for penalties and masks and 16.5 MiB "
        "to cache max_model_len=4000, "
        f"together {memory_module.human_bytes(100 * MIB + WORK + 33 * PAGE)}, and has "
        f"{memory_module.human_bytes(100 * MIB + WORK + 11 * PAGE)}; "
        "what would fit: max_model_len=1280 or dtype=bfloat16"
    )
    with pytest.raises(ConfigError, match=r"to cache 128 tokens, .*; nothing smaller fits$"):
        limits(10 * MIB)


def test_more_devices_that_fit_are_named() -> None:
    """Of faked devices more have no more memory together."""
    free = 60 * MIB + workspace_bytes(CONFIG, 3, F32, 4, chunk_shapes("tpu")[-1].tokens)
    with pytest.raises(ConfigError, match=r"; what would fit: tp=3$"):
        limits(free, weights=120 * MIB, platform="tpu")
    with pytest.raises(ConfigError, match=r"; what would fit: dtype=bfloat16$"):
        limits(free, weights=120 * MIB)


def test_rounding_that_fits_is_named() -> None:
    """The mildest, and only if weights can be rounded."""
    free = 30 * MIB + WORK + 2 * PAGE
    sizes = {"int8": 25 * MIB, "int4": 13 * MIB}
    with pytest.raises(ConfigError, match=r"; what would fit: dtype=bfloat16 or quantize='int8'$"):
        limits(free, weights=40 * MIB, quantized_bytes=sizes.__getitem__)
    with pytest.raises(ConfigError, match=r"quantize='int4'$"):
        limits(free - 10 * MIB, weights=100 * MIB, quantized_bytes=sizes.__getitem__)
    with pytest.raises(ConfigError, match=r"; what would fit: dtype=bfloat16$"):
        limits(free, weights=40 * MIB)


def test_fewer_slots_that_fit_are_named() -> None:
    """Where it is not the model that is too large, but what so many sequences need at once."""
    free = 100 * MIB + WORK + 11 * PAGE
    with pytest.raises(ConfigError, match=r"; what would fit: .*max_slots=(\d+)") as error:
        limits(free, max_slots=100_000)
    fewer = int(str(error.value).partition("max_slots=")[2].partition(" ")[0])
    assert limits(free, max_slots=fewer).max_slots == fewer
    with pytest.raises(ConfigError):
        limits(free, max_slots=2 * fewer)


def test_what_is_said_to_fit_does() -> None:
    free = 100 * MIB + WORK + 11 * PAGE
    assert limits(free, max_model_len=1280).num_pages == 11
    with pytest.raises(ConfigError):
        limits(free, max_model_len=1281)


def test_shapes_of_decode_steps() -> None:
    """Where programs are for so many blocks of eight pages: a fourth each, down from what the cache holds."""

    def blocks(slots: int, length: int, pages: int) -> list[tuple[int, int]]:
        sizes = Limits(max_slots=slots, max_model_len=length, num_pages=pages)
        return [tuple(shape) for shape in sizes.decode_shapes(8)]

    assert blocks(8, 8192, 513) == [(1, 1), (4, 4), (8, 16), (8, 64)]
    assert blocks(256, 8192, 2049) == [(8, 8), (32, 32), (128, 128), (256, 512), (256, 2048)]
    # only sequences that share pages reach the last: it finds out how many blocks there are
    assert blocks(256, 131072, 2049) == [(8, 8), (32, 32), (128, 128), (256, 512), (256, 0)]
    assert blocks(1, 100, 2) == [(1, 1)]


@pytest.mark.parametrize("tp", (1, 4))
def test_workspace_covers_what_the_compiler_says(tp: int) -> None:
    """Of the largest programs; and it is no wild guess."""
    mesh = make_mesh(tp)
    decoder = abstract_decoder(CONFIG, mesh, F32)
    runner = Runner(decoder, mesh, Limits(max_slots=4, max_model_len=2048, num_pages=33), F32)
    specs = ProgramSpec("step", 4, ChunkShape(1, 512)), ProgramSpec("decode", 4)
    programs = [runner.program(spec) for spec in specs]
    used = max(program.memory_analysis().temp_size_in_bytes for program in programs)
    predicted = workspace_bytes(CONFIG, tp, F32, 4, 512)
    assert used <= predicted <= 6 * used  # 30 layers reuse less of it than these, jax 0.12 more than 0.10
    arguments = programs[1].memory_analysis().argument_size_in_bytes
    weights = sum(p.bytes_per_device for p in parameters(decoder, mesh))
    cache = 33 * page_bytes_per_device(CONFIG, tp, 128, F32)
    assert weights + cache == pytest.approx(arguments, rel=0.02)


def test_accelerators_say_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"bytes_limit": 100 * MIB, "bytes_in_use": 20 * MIB}
    device = type("Device", (), {"platform": "gpu", "memory_stats": lambda self: stats})()
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    found = memory_module.device_memory(8)
    assert found == DeviceMemory(int(80 * MIB * 0.92), None, "gpu")  # each has its own: tp divides nothing
    monkeypatch.setattr(device, "memory_stats", lambda: None, raising=False)
    assert memory_module.device_memory(8) is None


def test_rows_of_a_tpu_are_of_128_numbers() -> None:
    """Heads of 64 take twice the room there, and the cache has half the pages."""
    assert page_bytes_per_device(CONFIG, 1, 128, F32, "tpu") == 2 * PAGE
    wide = replace(CONFIG, attention=replace(CONFIG.attention, head_dim=256))
    assert page_bytes_per_device(wide, 1, 128, F32, "tpu") == 4 * PAGE
    work = workspace_bytes(CONFIG, 1, F32, 64)
    options: dict[str, Any] = {"weight_bytes": 0, "max_model_len": None, "max_slots": 64}
    for platform, pages in (("gpu", 64), ("tpu", 32)):
        memory = DeviceMemory(work + 64 * PAGE, platform=platform)
        histories = max_histories(CONFIG, 1, 64, memory)
        memory = replace(memory, free=memory.free + sampler_bytes(CONFIG, 1, 64, histories))
        assert max_histories(CONFIG, 1, 64, memory) == histories == 8  # 1% of it has room for three
        assert plan_limits(CONFIG, 1, F32, memory=memory, **options).num_pages == pages


@pytest.mark.parametrize(("tp", "histories"), ((1, 4), (1, 2), (3, 4)))
def test_sampler_bytes_are_those_of_the_state(tp: int, histories: int) -> None:
    limits = Limits(max_slots=4, max_model_len=1024, num_pages=33, max_histories=histories)
    no_layers = PagedKVCache((), ())
    history = DeviceState.abstract(no_layers, CONFIG.vocab_size, make_mesh(tp), limits).history
    shards = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(history)]
    held = sum(math.prod(shape) * itemsize for shape, itemsize in shards)
    assert sampler_bytes(CONFIG, tp, 4, histories) == held


def test_how_many_sequences_may_have_penalties() -> None:
    """1% of 16 GB has room for 66 rows of 262,144 tokens, one of them spare; on eight devices for all."""
    gemma = replace(CONFIG, vocab_size=262_144)
    chip = DeviceMemory(16 * 10**9, platform="tpu")
    assert max_histories(gemma, 1, 256, chip) == 66
    assert max_histories(gemma, 8, 256, chip) == 256
    assert max_histories(gemma, 1, 32, chip) == 32
    assert max_histories(gemma, 1, 256, DeviceMemory(2**30)) == 8
    assert max_histories(gemma, 1, 4, DeviceMemory(2**30)) == 4
    assert max_histories(gemma, 1, 256, None) == 256
    # ten bytes for each token and slot were 674 MB
    assert sampler_bytes(gemma, 1, 256, 66) == 67 * 262_144 * 9 + 257 * 8193 * 4 < 167e6
    limits = plan_limits(gemma, 1, F32, weight_bytes=0, memory=chip, max_model_len=1024, max_slots=256)
    assert limits.history_rows == 66


@pytest.mark.parametrize(
    ("gibibytes", "options", "expected"),
    (
        (4, {}, 256),  # 2 GiB of pages for 1,024 tokens each, 0.3 for logits
        (2, {}, 128),
        (1, {}, 64),
        (2, {"weight_bytes": 1536 * MIB}, 32),
        (2, {"max_model_len": 128}, 256),
        (2, {"max_model_len": 4096}, 128),
        (1, {"max_slots": 100}, 100),
        (1024, {}, 256),
        (1024, {"platform": "gpu"}, 256),
        (1024, {"platform": "cpu"}, 8),
        (None, {}, 8),
    ),
)
def test_slots_that_a_chip_has_room_for(
    gibibytes: int | None, options: dict[str, Any], expected: int
) -> None:
    """A page takes a mebibyte."""
    config = replace(CONFIG, attention=replace(CONFIG.attention, head_dim=128))
    assert page_bytes_per_device(config, 1, 128, F32, "tpu") == MIB
    options = {"weight_bytes": 0, "max_model_len": None, "max_slots": None, **options}
    platform = options.pop("platform", "tpu")
    memory = None if gibibytes is None else DeviceMemory(gibibytes * 2**30, platform=platform)
    assert plan_limits(config, 1, F32, memory=memory, **options).max_slots == expected


def test_faked_devices_share_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "_host_memory", lambda: 800 * MIB)
    found = memory_module.device_memory(4)
    assert found is not None and found.free == 200 * MIB
    assert replace(found, free=0).cache_cap == 2**30 // 4


def test_host_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "memory.max").write_text(str(300 * MIB))
    (tmp_path / "memory.current").write_text(str(250 * MIB))
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {100 * MIB}\n")
    monkeypatch.setattr(memory_module, "_CGROUP", tmp_path)
    assert memory_module._host_memory() == 150 * MIB
    (tmp_path / "memory.max").write_text("max")
    free = memory_module._host_memory()
    assert free is not None and free > 300 * MIB
