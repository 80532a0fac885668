"""The TPU kernel, interpreted on a CPU, against the definition: over random shapes, and inside the engine."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from tpjax import LLM
from tpjax.attention import Backend, Verdict, choose_backend, reference, selftest, tpu
from tpjax.cache import NULL_PAGE, StoredPages, TokenGroup
from tpjax.checkpoints.load import read_config
from tpjax.errors import ConfigError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as small as these shapes: several of pages, queries and heads."""
    monkeypatch.setattr(tpu, "_BLOCK_KEYS", 16)
    monkeypatch.setattr(tpu, "_ROWS_PER_HEAD", 16)
    monkeypatch.setattr(tpu, "_MOST_HEADS", 2)


class Shape(NamedTuple):
    """Shape of a call.

    Attributes:
        lengths: tokens of each row that are not padding.
        first: position of the first token of each row.
        length: tokens of each row, padding included.
        heads: KV heads.
        per_head: query heads of each.
        width: of keys.
        value_dim: of values; ``None``: the beginning of each key is the value.
        page_size: positions per page.
        window: keys that a query sees.
        cyclic: whether block tables are.
        softcap: bounds the scores.
        sinks: whether there are sinks.
        dtype: of everything.
    """

    lengths: tuple[int, ...]
    first: tuple[int, ...]
    length: int = 1
    heads: int = 1
    per_head: int = 1
    width: int = 16
    value_dim: int | None = 16
    page_size: int = 8
    window: int | None = None
    cyclic: bool = False
    softcap: float | None = None
    sinks: bool = False
    dtype: str = "float32"


class Pages(NamedTuple):
    """Buffers, as :class:`tpjax.cache.Pages` presents them."""

    stored: StoredPages
    value_dim: int

    @property
    def page_size(self) -> int:
        return self.stored.keys.shape[2]

    def read(self, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys, values = self.stored
        return keys[pages], (keys[..., : self.value_dim] if values is None else values)[pages]


def case(shape: Shape, seed: int) -> tuple[jax.Array, Pages, TokenGroup, jax.Array | None]:
    """Returns random queries, pages, their tables and sinks. Whatever no query may read is not a number."""
    rng, batch, page = np.random.default_rng(seed), len(shape.first), shape.page_size
    window = max(shape.first) + 1 if shape.window is None else shape.window
    stops = [at + count if count else 0 for at, count in zip(shape.first, shape.lengths, strict=True)]
    firsts = [max(at - window + 1, 0) // page for at in shape.first]
    columns = 1 + max(max(shape.first) + shape.length - 1, 0) // page
    if shape.cyclic:
        columns = -(-(window + shape.length - 2) // page) + 1
    needed = [range(first, -(-stop // page)) for first, stop in zip(firsts, stops, strict=True)]
    num_pages = 2 + sum(map(len, needed))
    order = iter(rng.permutation(np.arange(1, num_pages)))
    table = rng.integers(0, num_pages, (batch, columns))
    if shape.cyclic:
        table[:] = NULL_PAGE
    widths = [shape.width] if shape.value_dim is None else [shape.width, shape.value_dim]
    heads = 1 if shape.value_dim is None else shape.heads
    buffers = [np.full((num_pages, heads, page, width), np.nan, np.float32) for width in widths]
    for row, blocks in enumerate(needed):
        for block in blocks:
            at = table[row, block % columns] = next(order)
            count = min(stops[row] - block * page, page)
            for buffer in buffers:
                buffer[at, :, :count] = rng.normal(size=(heads, count, buffer.shape[3]))
    dtype = jnp.dtype(shape.dtype)
    value_dim = shape.width // 2 if shape.value_dim is None else shape.value_dim
    parts = [jnp.asarray(buffer, dtype) for buffer in buffers]
    pages = Pages(StoredPages(parts[0], parts[1] if shape.value_dim else None), value_dim)
    query = rng.normal(size=(batch, shape.length, shape.heads, shape.per_head, shape.width)) * 2
    positions = np.asarray(shape.first)[:, None] + np.arange(shape.length)
    group = TokenGroup(
        jnp.asarray(table, jnp.int32),
        jnp.asarray(positions, jnp.int32),
        jnp.asarray(shape.lengths, jnp.int32),
        chunks=shape.length > 1,
        cyclic=shape.cyclic,
    )
    sinks = jnp.asarray(rng.normal(size=(shape.heads, shape.per_head)), jnp.float32) if shape.sinks else None
    return jnp.asarray(query, dtype), pages, group, sinks


def check(shape: Shape, seed: int = 0, *, races: bool = False) -> None:
    query, pages, group, sinks = case(shape, seed)
    scoring: dict[str, Any] = {"window": shape.window, "softcap": shape.softcap, "sinks": sinks}
    scoring["scale"] = shape.width**-0.5
    interpret = pltpu.InterpretParams(detect_races=True) if races else True
    found = tpu.paged_attention(query, pages.value_dim, pages.stored, group, interpret=interpret, **scoring)
    assert not races or not interpret_pallas_call.races.races_found
    assert found.dtype == query.dtype
    clean = StoredPages(*(x if x is None else jnp.nan_to_num(x).astype(jnp.float32) for x in pages.stored))
    keys, values = (jnp.zeros((*query.shape[:2], 1, width)) for width in (shape.width, pages.value_dim))
    exact = Pages(clean, pages.value_dim)
    expected = reference.paged_attention(query.astype(jnp.float32), keys, values, exact, group, **scoring)
    result, present = np.asarray(found, np.float32), np.asarray(group.present)
    assert np.isfinite(result).all()
    assert not result[~present.any(axis=1)].any()  # rows without a token
    tolerance = 2e-2 if shape.dtype == "bfloat16" else 2e-5
    np.testing.assert_allclose(result[present], np.asarray(expected)[present], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "shape",
    (
        pytest.param(Shape((1, 0, 1), (17, 0, 3), heads=2, per_head=3), id="decode"),
        pytest.param(
            Shape((1, 0, 1), (37, 0, 3), window=9, cyclic=True, sinks=True, softcap=2.0), id="window"
        ),
        pytest.param(Shape((1, 1), (9, 30), heads=4, width=24, value_dim=None), id="latents"),
        pytest.param(Shape((3, 2), (6, 15), length=3, per_head=2, dtype="bfloat16"), id="drafts"),
    ),
)
def test_kernel(shape: Shape) -> None:
    check(shape)


def test_large_block_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read in several calls, of some rows each."""
    monkeypatch.setattr(tpu, "_TABLE_ENTRIES", 256)
    check(Shape((1, 0, 1), (17, 0, 3), heads=2, per_head=3, sinks=True))


def test_blocks() -> None:
    shape = Shape((16, 9, 0), (24, 8, 0), length=16, heads=3, per_head=4, window=11)
    assert tpu.choose_tiling(3, 4, 16, 8, (16, 16), 4) == (1, 4, 2)
    check(shape)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    rows = draw(st.integers(1, 4))
    length = draw(st.sampled_from((1, 1, 2, 3, 8, 16)))
    page_size = draw(st.sampled_from((8, 16)))
    latent = draw(st.booleans())
    window = draw(st.none() | st.integers(1, 40))
    width = draw(st.sampled_from((8, 16, 24)))
    return Shape(
        lengths=tuple(draw(st.integers(0, length)) for _ in range(rows)),
        first=tuple(draw(st.integers(0, 40)) for _ in range(rows)),
        length=length,
        heads=draw(st.integers(1, 4)),
        per_head=1 if latent else draw(st.integers(1, 4)),
        width=width,
        value_dim=None if latent else draw(st.sampled_from((8, 16, 24))),
        page_size=page_size,
        window=window,
        cyclic=window is not None and draw(st.booleans()),
        softcap=draw(st.none() | st.just(3.0)),
        sinks=draw(st.booleans()),
        dtype=draw(st.sampled_from(("float32", "float32", "bfloat16"))),
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes(), seed=st.integers(0, 2**20))
@example(shape=Shape((0, 0), (0, 0)), seed=0)  # nothing but padding
def test_random_shapes(shape: Shape, seed: int) -> None:
    check(shape, seed, races=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("llama", "gemma2", "gpt_oss", "deepseek_v3"))
def test_the_engine_generates_the_same_tokens(name: str) -> None:
    prompts = [[at % 50 for at in range(length)] for length in (150, 3)]
    texts = []
    for attention in ("xla", "tpu", "reference"):
        with LLM(GOLDENS / name, tp=2, max_model_len=256, max_slots=2, attention=attention) as llm:
            done = llm.generate(prompts, temperature=0, max_tokens=5, ignore_eos=True)
            texts.append([one.token_ids for one in done])
    assert texts[1] == texts[2] == texts[0]


# --- which backend is used ---------------------------------------------------------------------------------

F32, RIGHT = np.dtype("float32"), Verdict("TPU v5 lite", 0.001, 0.02, 0.2, 1.5)


@pytest.mark.parametrize(
    ("verdict", "name", "why"),
    (
        (None, "xla", "the kernel (--attention tpu) is used unasked only where it was checked"),
        (RIGHT, "tpu", "the kernel is right on TPU v5 lite, and takes 0.2 ms where the page walk takes 1.5"),
        (
            replace(RIGHT, kernel_ms=2.0),
            "xla",
            "the kernel is right on TPU v5 lite, but takes 2 ms where the page walk takes 1.5",
        ),
        (
            replace(RIGHT, error=float("inf")),
            "xla",
            "the kernel is wrong on TPU v5 lite: off by inf, 0.02 allowed",
        ),
    ),
)
def test_auto_on_a_tpu(verdict: Verdict | None, name: str, why: str) -> None:
    verify = None if verdict is None else lambda: verdict
    assert choose_backend("auto", "tpu", F32, verify) == Backend(name, why)


def test_other_choices() -> None:
    assert choose_backend("auto", "cpu", F32).name == choose_backend("auto", "gpu", F32).name == "xla"
    assert choose_backend("auto", "tpu", np.dtype("float16"), lambda: RIGHT).name == "xla"
    assert choose_backend("tpu", "tpu", F32) == Backend("tpu", "asked for")
    assert choose_backend("tpu", "cpu", F32).interpret


@pytest.mark.parametrize(
    ("asked", "platform", "dtype", "message"),
    (
        ("gpu", "gpu", F32, "attention='gpu' is not supported: use auto, reference, xla or tpu"),
        ("tpu", "gpu", F32, "attention='tpu' needs TPUs, and the devices are of platform 'gpu'"),
        ("tpu", "tpu", np.dtype("float16"), "attention='tpu' supports bfloat16 and float32, not float16"),
    ),
)
def test_backends_that_do_not_run(asked: Any, platform: str, dtype: np.dtype, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose_backend(asked, platform, dtype)
    assert str(error.value) == message


@pytest.fixture
def short_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_CONTEXT": 20, "_ROWS": 3, "_CALLS": 1, "_ROUNDS": 1}.items():
        monkeypatch.setattr(selftest, name, value)


def verdict_of(name: str, folder: Path) -> Verdict:
    device = jax.devices()[0]
    return selftest.verdict(read_config(GOLDENS / name), 2, F32, 8, device, folder, interpret=True)


def test_a_verdict_is_kept(short_check: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The interpreted kernel is right. The next start knows; of another shape it does not."""
    found = verdict_of("llama", tmp_path)
    assert found.right and found.error < 1e-5
    assert selftest.verdicts(tmp_path) == [found]
    monkeypatch.setattr(selftest, "_check", lambda *_: pytest.fail("checked again"))
    assert verdict_of("llama", tmp_path) == found
    with pytest.raises(pytest.fail.Exception):
        verdict_of("gpt_oss", tmp_path)


@pytest.mark.parametrize("wrong", (0.0, np.nan))
def test_a_wrong_kernel_is_found(
    wrong: float, short_check: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def attend(query: jax.Array, value_dim: int, *_: Any, **__: Any) -> jax.Array:
        return jnp.full((*query.shape[:-1], value_dim), wrong, query.dtype)

    monkeypatch.setattr(tpu, "paged_attention", attend)
    found = verdict_of("llama", tmp_path)
    assert not found.right and not found.use_kernel


def test_a_kernel_that_hangs_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(selftest.os, "_exit", lambda code: ended.set())
    with selftest._watchdog(0.01):
        assert ended.wait(10)
    assert "start again with --attention xla" in capsys.readouterr().err
