"""Page groups: layers with a sliding window give back pages that no query sees, and nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS

from tpjax.cache import layer_places, num_entries, page_groups
from tpjax.checkpoints.load import load_replicas
from tpjax.checkpoints.opening import open_checkpoint, read_config
from tpjax.checkpoints.parameters import abstract_decoder
from tpjax.engine.block_manager import BlockManager, page_key, root_key
from tpjax.engine.engine import Engine
from tpjax.engine.page_groups import NO_PAGE, PageGroups
from tpjax.engine.request import Request
from tpjax.errors import RequestError
from tpjax.mesh import make_mesh, make_stage_meshes
from tpjax.planning.published import published_config
from tpjax.runtime.device_speed import split_layers
from tpjax.runtime.limits import ChunkShape, Limits
from tpjax.runtime.memory import DeviceMemory, plan_limits, windows_of
from tpjax.runtime.programs import ProgramSpec
from tpjax.runtime.runner import Runner
from tpjax.sampling_params import SamplingParams
from tpjax.windows import ONE_GROUP, Windows

PAGE, LONGEST = 4, 96
SHAPES = (ChunkShape(1, 4), ChunkShape(2, 8))
F32 = jnp.dtype("float32")


@pytest.mark.parametrize(
    ("name", "windows", "entries"),
    (
        ("llama-3-8b", ONE_GROUP, 32),
        ("gemma-3-4b", (None, *[1024] * 6), 5),
        ("gemma-3-27b", (None, *[1024] * 6), 10),
        ("gemma-2-27b", (None, 4096), 23),
        ("gpt-oss-20b", (None, 128), 12),
        ("mistral", (7,), 2),
        ("gemma3", (None, 9, 9), 1),
    ),
)
def test_groups_of_architectures(name: str, windows: Windows, entries: int) -> None:
    config = read_config(GOLDENS / name) if (GOLDENS / name).is_dir() else published_config(name)
    assert (page_groups(config), num_entries(config, windows)) == (windows, entries)
    places = layer_places(config, windows)
    assert len(set(places)) == config.num_layers  # no two layers in one place
    if windows != ONE_GROUP:
        for kind, place in zip(config.attention.layer_types, places, strict=True):
            assert windows[place.group] == config.attention.window_of(kind)


def test_short_contexts_have_one_group() -> None:
    """Where a sequence can hardly outgrow its window, nothing would be given back."""
    config = published_config("gemma-3-4b")
    assert windows_of(config, 2048) == ONE_GROUP and windows_of(config, 32768) == page_groups(config)


def test_too_few_pages_take_none() -> None:
    blocks = BlockManager(11, PAGE)
    groups = PageGroups(blocks, (None, 8), 16)
    with pytest.raises(RequestError, match="11 cache pages are needed, but 10 are free"):
        groups.start(groups.find(()), 28)
    assert blocks.free == 10
    pages = groups.start(groups.find(()), 16)
    before = [list(of_group) for of_group in pages]
    with pytest.raises(RequestError, match="4 cache pages are needed, but 2 are free"):
        groups.extend(pages, 24)
    assert pages == before and blocks.free == 2


def keys_of(count: int) -> list[bytes]:
    keys = [root_key("")]
    for number in range(count):
        keys.append(page_key(keys[-1], [number] * PAGE))
    return keys[1:]


def test_a_prefix_needs_the_pages_of_its_window_only() -> None:
    blocks = BlockManager(100, PAGE)
    groups, keys = PageGroups(blocks, (None, 9), step_tokens=8), keys_of(8)
    pages = groups.start(groups.find(()), 4 * PAGE)
    assert [len(of_group) for of_group in pages] == [4, 2]  # of a window, those of one step
    groups.extend(pages, 4 * PAGE)
    groups.insert(pages, 0, keys[:4])
    assert groups.unseen(pages, 16) and not groups.unseen(pages, 11)
    groups.give_back(pages, 16)  # tokens from 16 on see keys from 8 on
    assert pages[1][:2] == [NO_PAGE] * 2 and NO_PAGE not in pages[1][2:]
    assert not groups.unseen(pages, 19)
    found = groups.find(keys[:4])
    assert found.blocks == 4 and found.pages == [pages[0], [NO_PAGE, NO_PAGE, *pages[1][2:]]]

    held = blocks.allocate(blocks.free - 1)  # of the pages that were given back the later one is evicted
    assert groups.find(keys[:4]) == found and groups.find(keys[:3]).blocks == 1
    blocks.release(held)
    groups.release(pages)
    assert pages == [] and blocks.free == blocks.capacity


def test_a_prefix_is_shorter_where_a_page_of_its_window_is_gone() -> None:
    blocks = BlockManager(12, PAGE)
    groups, keys = PageGroups(blocks, (None, 5), step_tokens=64), keys_of(4)
    pages = groups.start(groups.find(()), 4 * PAGE)
    groups.insert(pages, 0, keys)
    window = pages[1]
    taken, window[3] = window[3], NO_PAGE
    blocks.release([taken])
    held = blocks.allocate(blocks.free)  # evicts it
    assert taken in held and groups.find(keys).blocks == 3


class Model:
    """An engine with small pages over a golden, in one piece or in stages."""

    def __init__(
        self,
        name: str,
        tp: int | tuple[int, ...],
        pages: int | None,
        windows: Windows | None = None,
        pp: int = 1,
    ) -> None:
        checkpoint, meshes = open_checkpoint(GOLDENS / name), make_stage_meshes(tp, 1, pp)
        config = checkpoint.config
        decoders = [
            abstract_decoder(config, mesh, F32, layers=part)
            for mesh, part in zip(meshes[0], split_layers(config, meshes[0], F32), strict=True)
        ]
        (models,) = load_replicas(checkpoint, [decoders], meshes, progress=False)
        limits = Limits(
            3,
            LONGEST,
            200,
            PAGE,
            SHAPES,
            SHAPES[:1],
            steps=4 if pp == 1 else 1,
            windows=windows or page_groups(config),
            stages=pp,
        )
        if pages is not None:
            limits = replace(limits, num_pages=limits.pages_held(LONGEST) + pages)
        self.engine = Engine(Runner.of_stages(models, meshes[0], limits, F32))
        self.vocab_size = config.vocab_size

    def run(self, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        requests = [
            Request(prompt, SamplingParams(max_tokens=tokens, temperature=0.8 * (seed % 2)), seed)
            for seed, prompt in enumerate(prompts)
        ]
        for request in requests:
            self.engine.add(request)
        while self.engine.busy:
            self.engine.step()
        assert all(request.error is None for request in requests)
        return [request.output_token_ids for request in requests]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tp", "pages", "pp"),
    (
        ("gemma3", 1, 6, 1),
        ("gpt_oss", 2, 6, 1),
        ("mistral", 3, 1, 1),
        ("cohere2", 3, 6, 1),
        ("gemma3", 1, 6, 3),
        ("gpt_oss", (2, 1), 6, 2),
        ("mistral", 1, 1, 2),
    ),
)
def test_the_same_tokens_and_logits(name: str, tp: int | tuple[int, ...], pages: int, pp: int) -> None:
    """With pages given back, few pages, preemptions and prefixes found: as with pages for everything.

    Also in stages, whose dispatches in flight write to pages while others are given back: as in one piece.
    """
    plain = Model(name, tp if isinstance(tp, int) else 1, None, ONE_GROUP)
    model = Model(name, tp, pages, pp=pp)
    rng = np.random.default_rng(0)
    common = rng.integers(0, plain.vocab_size, 24).tolist()
    prompts = [
        [*common[: int(rng.integers(0, 25))], *rng.integers(0, plain.vocab_size, int(length)).tolist()]
        for length in rng.integers(1, 40, 7)
    ]
    expected = plain.run(prompts, 32)
    assert model.run(prompts, 32) == expected
    longer = [[*prompt, *output] for prompt, output in zip(prompts, expected, strict=True)][:3]
    assert model.run(longer, 3) == plain.run(longer, 3)  # what is left of the answers is found again
    stats = model.engine.stats()
    assert stats.preemptions and not plain.engine.stats().preemptions
    # of one page nothing is left for others, and what a preempted request finds of itself is no hit
    assert (stats.prefix_hits > 0) == (pages > 1)
    assert stats.pages_in_use == 0
    np.testing.assert_allclose(
        model.engine.logits(longer[0]), plain.engine.logits(longer[0]), atol=2e-4, rtol=2e-3
    )
    assert model.engine.stats().pages_in_use == 0
    running = Request(prompts[0], SamplingParams(max_tokens=32, temperature=0), 0)
    model.engine.add(running)
    while not running.output_token_ids:
        model.engine.step()
    with pytest.raises(RequestError, match="cache pages are needed, but"):  # what runs goes on
        model.engine.logits([0] * LONGEST)
    while model.engine.busy:
        model.engine.step()
    assert running.output_token_ids == expected[0] and model.engine.stats().pages_in_use == 0


def test_a_program_donates_every_buffer_and_copies_none() -> None:
    config, mesh = read_config(GOLDENS / "gemma3"), make_mesh(2)
    limits = Limits(4, 4096, 300, 128, windows=page_groups(config))
    runner = Runner(abstract_decoder(config, mesh, F32), mesh, limits, F32)
    (entry,) = runner.abstract_state().cache.entries
    compiled: Any = runner.program(ProgramSpec("decode", 4, greedy=True))
    state = sum(
        leaf.size * leaf.dtype.itemsize // (2 if len(leaf.shape) == 4 else 1)
        for leaf in jax.tree.leaves(runner.abstract_state().cache)
    )
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= state
    buffer = entry.keys.size * entry.keys.dtype.itemsize // 2
    assert memory.temp_size_in_bytes < buffer  # no copy of one


def test_a_long_context_has_room_for_more_sequences() -> None:
    """Gemma 3 27B on chips of 32 GB, tp=8, 32,768 tokens a sequence: several times as many fit as without."""
    config = published_config("gemma-3-27b")
    memory = DeviceMemory(int(29e9), platform="tpu")
    sizes: Any = {"weight_bytes": 7 * 10**9, "memory": memory, "max_slots": 256}
    limits = plan_limits(config, 8, jnp.dtype("bfloat16"), max_model_len=32768, **sizes)
    page_tokens = limits.page_size * limits.num_pages
    whole = page_tokens // (len(limits.windows) * 32768)
    assert (limits.num_pages - 1) // limits.pages_held(32768) >= 3 * whole > 0
