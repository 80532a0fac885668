"""Paged attention against the reference, and which cache entries a write changes."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from tpjax.attention import XLA, Backend, cache_writer, paged_attention, tpu, xla
from tpjax.attention.reference import reference_attention
from tpjax.cache import NULL_PAGE, LayerCache, TokenGroup
from tpjax.inspect.collectives import find_collectives
from tpjax.mesh import make_mesh
from tpjax.sharding import PAGES

PAGE, BLOCKS, PAGES_IN_ALL = 8, 5, 24
HEADS_KV, GROUP, HEAD_DIM = 3, 2, 4
SCALE = 0.7
TRIALS = 4

paged = jax.jit(paged_attention, static_argnames=("scale", "window", "backend"))
refer = jax.jit(reference_attention, static_argnames=("scale", "window"))
write = jax.jit(LayerCache.write, static_argnums=4)
KERNEL = Backend("tpu", interpret=True)
ON_TPU = Backend("xla", walk_pages=3, short_chunk_pages=3, in_rows=True)
BLOCKWISE = Backend("xla", walk_pages=2, short_chunk_pages=2, fixed_trips=True)


def tables(rng: np.random.Generator, batch: int, used: list[int]) -> np.ndarray:
    """Assigns pages in random order, none shared; entries past the end of a sequence are arbitrary."""
    order = rng.permutation(np.arange(1, PAGES_IN_ALL))
    table = rng.integers(0, PAGES_IN_ALL, (batch, BLOCKS))
    for row in range(batch):
        table[row, : used[row]] = order[row * BLOCKS : row * BLOCKS + used[row]]
    return table.astype(np.int32)


def case(
    rng: np.random.Generator, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, LayerCache, LayerCache, TokenGroup]:
    """Returns queries, dense keys and values, and two caches that hold them among different garbage."""
    batch, length = positions.shape
    contexts = positions.max(axis=1) + 1
    table = tables(rng, batch, [-(-int(n) // PAGE) for n in contexts])
    query = rng.normal(size=(batch, length, HEADS_KV, GROUP, HEAD_DIM)).astype(np.float32)
    dense = rng.normal(size=(2, batch, BLOCKS * PAGE, HEADS_KV, HEAD_DIM)).astype(np.float32)
    caches = []
    for _ in range(2):
        # larger than any real score: if one of these counted, it would decide the softmax
        filled_pages = rng.uniform(-1e4, 1e4, (2, PAGES_IN_ALL, HEADS_KV, PAGE, HEAD_DIM)).astype(np.float32)
        for row, context in enumerate(contexts):
            for at in range(context):
                filled_pages[:, table[row, at // PAGE], :, at % PAGE] = dense[:, row, at]
        caches.append(LayerCache(jnp.asarray(filled_pages[0]), jnp.asarray(filled_pages[1])))
    metadata = TokenGroup(jnp.asarray(table), jnp.asarray(positions, jnp.int32), chunks=length > 1)
    return query, dense[0], dense[1], caches[0], caches[1], metadata


def own(dense: np.ndarray, metadata: TokenGroup) -> np.ndarray:
    """Returns the keys or values of the batch's own tokens."""
    return np.take_along_axis(dense, np.asarray(metadata.positions)[:, :, None, None], axis=1)


def attend(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    cache: LayerCache,
    metadata: TokenGroup,
    window: int | None,
    backend: Backend = XLA,
) -> jax.Array:
    own_keys, own_values = own(keys, metadata), own(values, metadata)
    return paged(query, own_keys, own_values, cache, metadata, scale=SCALE, window=window, backend=backend)


def random_positions(rng: np.random.Generator, batch: int, length: int, trial: int) -> np.ndarray:
    """Draws positions: single tokens anywhere; chunks that start together at a page boundary."""
    if length == 1:
        last = rng.integers(0, BLOCKS * PAGE, batch)
        boundaries = (0, PAGE - 1, PAGE, 2 * PAGE - 1, BLOCKS * PAGE - 1)
        last[0] = boundaries[trial % len(boundaries)]  # every batch has a context up to a boundary
        return last[:, None]
    first = rng.integers(0, BLOCKS - -(-length // PAGE) + 1) * PAGE
    return first + np.tile(np.arange(length), (batch, 1))


def check(case_: tuple[Any, ...], window: int | None, backend: Backend = XLA) -> None:
    query, keys, values, cache, other, metadata = case_
    expected = refer(query, keys, values, metadata.positions, scale=SCALE, window=window)
    found = attend(query, keys, values, cache, metadata, window, backend)
    assert found.dtype == jnp.float32 and found.shape == query.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # bitwise: nothing beyond a context is read, neither from other pages nor from the rest of its last one
    np.testing.assert_array_equal(found, attend(query, keys, values, other, metadata, window, backend))


@pytest.mark.parametrize(
    "backend",
    (
        XLA,
        Backend("xla", walk_pages=3, short_chunk_pages=3),
        Backend("xla", short_chunk_pages=3),
        Backend("reference"),
    ),
    ids=("xla", "blocks", "blocks then pages", "reference"),
)
@pytest.mark.parametrize("window", (None, 3, 17))
@pytest.mark.parametrize(("batch", "length"), ((1, 1), (3, 1), (1, 4), (2, 8), (3, 16)))
def test_paged_attention_equals_the_reference(
    batch: int, length: int, window: int | None, backend: Backend
) -> None:
    rng = np.random.default_rng((batch, length, window or 0))
    for trial in range(TRIALS + (length == 1)):
        check(case(rng, random_positions(rng, batch, length, trial)), window, backend)


@pytest.mark.parametrize("further", (0, 5))
@pytest.mark.parametrize(("batch", "length"), ((1, 1), (4, 1), (3, 2)))
def test_blocks_of_all_sequences(
    batch: int, length: int, further: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there are, and more, three in an iteration; what is left of the last one is of nobody."""
    monkeypatch.setattr(xla, "_BLOCK_BYTES", 3 * 2 * PAGE * 2 * HEADS_KV * HEAD_DIM * 4)
    rng = np.random.default_rng((batch, length, further))
    for trial in range(TRIALS):
        positions = random_positions(rng, batch, 1, trial) + np.arange(length)
        positions = np.minimum(positions, BLOCKS * PAGE - length + np.arange(length))
        query, keys, values, *caches, group = case(rng, positions)
        blocks = int(sum(-(-(positions[:, -1] + 1) // (2 * PAGE))))
        group = replace(group, chunks=False, walk=blocks + further)
        attend = jax.jit(functools.partial(paged_attention, scale=SCALE, window=None, backend=BLOCKWISE))
        found = [attend(query, own(keys, group), own(values, group), cache, group) for cache in caches]
        expected = refer(query, keys, values, group.positions, scale=SCALE, window=None)
        np.testing.assert_allclose(found[0], expected, atol=1e-5)
        np.testing.assert_array_equal(*found)  # what others left behind does not count


@pytest.mark.parametrize("walk", (0, 9))
def test_rows_of_fewer_tokens(walk: int) -> None:
    """Where the others would be is what an earlier user left behind, which may not be a number."""
    rng = np.random.default_rng(0)
    query, keys, values, cache, _, group = case(rng, np.array([[13, 14, 15], [9, 10, 11]]))
    parts = [np.array(part) for part in (cache.keys, cache.values)]
    for row, first in ((0, 14), (1, 10)):  # beyond the first token of each
        for part in parts:
            part[np.asarray(group.block_tables)[row, 1], :, first % PAGE :] = np.nan
    lengths = jnp.asarray([1, 1], jnp.int32)
    group = replace(group, lengths=lengths, chunks=False, walk=walk)
    attend = jax.jit(functools.partial(paged_attention, scale=SCALE, window=None, backend=BLOCKWISE))
    cache = LayerCache(*map(jnp.asarray, parts))
    found = attend(query, own(keys, group), own(values, group), cache, group)
    expected = refer(query, keys, values, group.positions, scale=SCALE, window=None)
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-5)


@pytest.mark.parametrize("length", (1, 16))
def test_sinks(length: int) -> None:
    """A key without a value in every softmax: against the definition, and worked out for the first token."""
    rng = np.random.default_rng(length)
    query, keys, values, cache, _, metadata = case(rng, random_positions(rng, 2, length, 0))
    sinks = jnp.asarray(rng.normal(size=(HEADS_KV, GROUP)) * 3, jnp.float32)
    expected = refer(query, keys, values, metadata.positions, scale=SCALE, window=None, sinks=sinks)
    found = paged(
        query,
        own(keys, metadata),
        own(values, metadata),
        cache,
        metadata,
        scale=SCALE,
        window=None,
        sinks=sinks,
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    first = int(metadata.positions[0, 0])
    scores = np.einsum("kgh,tkh->kgt", query[0, 0], keys[0, : first + 1]) * SCALE
    weights = np.exp(scores) / (np.exp(scores).sum(-1, keepdims=True) + np.exp(sinks)[..., None])
    np.testing.assert_allclose(
        found[0, 0], np.einsum("kgt,tkh->kgh", weights, values[0, : first + 1]), atol=1e-5
    )


@pytest.mark.parametrize("window", (None, 17))
def test_chunks_of_a_batch_may_start_at_different_pages(window: int | None) -> None:
    rng = np.random.default_rng(1)
    first = np.array([[0], [24], [8]])
    check(case(rng, first + np.arange(16)), window)


@pytest.mark.parametrize("window", (None, 9))
@pytest.mark.parametrize("block", (5, 8))
def test_chunks_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch, block: int, window: int | None) -> None:
    """A long chunk attends to itself block by block; here the blocks are small instead."""
    rng = np.random.default_rng((block, window or 0))
    query, keys, values, cache, _, metadata = case(rng, np.arange(16) + np.full((2, 1), 8))
    monkeypatch.setattr(xla, "_QUERY_BLOCK", block)
    arguments = (query, own(keys, metadata), own(values, metadata), cache, metadata)
    found = jax.jit(functools.partial(paged_attention, scale=SCALE, window=window))(*arguments)
    expected = refer(query, keys, values, metadata.positions, scale=SCALE, window=window)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_reference_attention_by_hand() -> None:
    """Two positions, one head, written out."""
    query = jnp.array([1.0, 2.0]).reshape(1, 2, 1, 1, 1)
    keys = jnp.array([0.5, -1.0]).reshape(1, 2, 1, 1)
    values = jnp.array([10.0, 20.0]).reshape(1, 2, 1, 1)
    positions = jnp.array([[0, 1]])
    out = reference_attention(query, keys, values, positions, scale=2.0, window=None).reshape(-1)
    weights = np.exp([2 * 2 * 0.5, 2 * 2 * -1.0])
    np.testing.assert_allclose(out, [10.0, weights @ [10, 20] / weights.sum()], rtol=1e-5)
    near = reference_attention(query, keys, values, positions, scale=2.0, window=1).reshape(-1)
    np.testing.assert_allclose(near, [10.0, 20.0], rtol=1e-6)


@pytest.mark.parametrize("window", (None, 3))
def test_one_token_at_a_time_equals_a_chunk(window: int | None) -> None:
    rng = np.random.default_rng(5)
    positions = np.array([[8 + i for i in range(16)]])
    query, keys, values, cache, _, metadata = case(rng, positions)
    together = attend(query, keys, values, cache, metadata, window)
    for i in range(16):
        one = TokenGroup(metadata.block_tables, metadata.positions[:, i : i + 1])
        alone = attend(query[:, i : i + 1], keys, values, cache, one, window)
        np.testing.assert_allclose(alone[:, 0], together[:, i], atol=1e-6)


def test_large_scores_do_not_overflow() -> None:
    """The online softmax subtracts the running maximum: rising scores force it to rescale."""
    rng = np.random.default_rng(6)
    query, keys, values, _, _, metadata = case(rng, np.array([[BLOCKS * PAGE - 1]]))
    keys = keys * 300 * np.linspace(0, 1, BLOCKS * PAGE, dtype=np.float32)[:, None, None]
    cache = LayerCache(*(jnp.zeros((PAGES_IN_ALL, HEADS_KV, PAGE, HEAD_DIM)) for _ in range(2)))
    pages = [np.array(part) for part in (cache.keys, cache.values)]
    for part, dense in zip(pages, (keys, values), strict=True):
        for position in range(BLOCKS * PAGE):
            part[np.asarray(metadata.block_tables)[0, position // PAGE], :, position % PAGE] = dense[
                0, position
            ]
    found = attend(query, keys, values, LayerCache(*map(jnp.asarray, pages)), metadata, None)
    expected = refer(query, keys, values, metadata.positions, scale=SCALE, window=None)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, atol=1e-5)


# --- writes ------------------------------------------------------------------------------------------------


def filled(rng: np.random.Generator) -> tuple[LayerCache, np.ndarray, np.ndarray]:
    shape = (PAGES_IN_ALL, HEADS_KV, PAGE, HEAD_DIM)
    keys, values = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    return LayerCache(jnp.asarray(keys), jnp.asarray(values)), keys.copy(), values.copy()


def new(rng: np.random.Generator, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    shape = (batch, length, HEADS_KV, HEAD_DIM)
    return rng.normal(size=shape).astype(np.float32), rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("backend", (XLA, ON_TPU, KERNEL), ids=("xla", "xla on tpu", "tpu"))
@pytest.mark.parametrize("batch", (1, 3))
def test_token_writes(batch: int, backend: Backend) -> None:
    rng = np.random.default_rng(batch)
    for trial in range(TRIALS):
        cache, keys, values = filled(rng)
        positions = random_positions(rng, batch, 1, trial)
        table = tables(rng, batch, [BLOCKS] * batch)
        new_keys, new_values = new(rng, batch, 1)
        group = TokenGroup(jnp.asarray(table), jnp.asarray(positions))
        written = write(cache, new_keys, new_values, group, cache_writer(backend))
        for row, at in enumerate(positions[:, 0]):
            page = table[row, at // PAGE]
            keys[page, :, at % PAGE], values[page, :, at % PAGE] = new_keys[row, 0], new_values[row, 0]
        np.testing.assert_array_equal(written.keys, keys)
        np.testing.assert_array_equal(written.values, values)


def test_rows_that_do_not_exist_write_to_the_null_page() -> None:
    rng = np.random.default_rng(9)
    cache, keys, values = filled(rng)
    table = tables(rng, 3, [BLOCKS] * 3)
    table[1] = NULL_PAGE
    positions = np.array([[11], [0], [39]])
    new_keys, new_values = new(rng, 3, 1)
    written = write(cache, new_keys, new_values, TokenGroup(jnp.asarray(table), jnp.asarray(positions)))
    for row in (0, 2):
        page, offset = table[row, positions[row, 0] // PAGE], positions[row, 0] % PAGE
        keys[page, :, offset], values[page, :, offset] = new_keys[row, 0], new_values[row, 0]
    np.testing.assert_array_equal(written.keys[1:], keys[1:])
    np.testing.assert_array_equal(written.values[1:], values[1:])


@pytest.mark.parametrize("backend", (XLA, KERNEL), ids=("xla", "tpu"))
@pytest.mark.parametrize(("batch", "length"), ((1, 4), (2, 8), (2, 24)))
def test_chunk_writes(batch: int, length: int, backend: Backend) -> None:
    """Whole pages; a chunk shorter than a page fills its beginning; what exceeds the table goes to page 0."""
    rng, writer = np.random.default_rng(length), cache_writer(backend)
    for _ in range(TRIALS):
        cache, keys, values = filled(rng)
        table = tables(rng, batch, [BLOCKS] * batch)
        first = rng.integers(0, BLOCKS, batch) * PAGE  # may run over the end of the table
        positions = first[:, None] + np.arange(length)
        new_keys, new_values = new(rng, batch, length)
        group = TokenGroup(jnp.asarray(table), jnp.asarray(positions), chunks=True)
        written = write(cache, new_keys, new_values, group, writer)
        for row in range(batch):
            for i, at in enumerate(positions[row]):
                if at < BLOCKS * PAGE:
                    page = table[row, at // PAGE]
                    keys[page, :, at % PAGE], values[page, :, at % PAGE] = (
                        new_keys[row, i],
                        new_values[row, i],
                    )
        np.testing.assert_array_equal(written.keys[1:], keys[1:])
        np.testing.assert_array_equal(written.values[1:], values[1:])


# --- sharded over devices ----------------------------------------------------------------------------------


def write_and_attend(
    cache: LayerCache,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    metadata: TokenGroup,
    window: int | None,
    backend: Backend,
) -> tuple[jax.Array, LayerCache]:
    cache = cache.write(keys, values, metadata, cache_writer(backend))
    attend = functools.partial(paged_attention, scale=SCALE, window=window, backend=backend)
    return attend(query, keys, values, cache, metadata), cache


@pytest.mark.parametrize("backend", (XLA, ON_TPU, KERNEL), ids=("xla", "xla on tpu", "tpu"))
@pytest.mark.parametrize(("length", "window"), ((1, None), (16, 17)))
def test_sharded_over_three_devices_is_the_same(
    length: int, window: int | None, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tpu, "_BLOCK_KEYS", 2 * PAGE)  # the kernel has a copy of each page of a block
    rng = np.random.default_rng(length)
    query, _, _, cache, _, metadata = case(rng, random_positions(rng, 2, length, 1))
    keys, values = new(rng, 2, length)
    expected, expected_cache = jax.jit(functools.partial(write_and_attend, window=window, backend=XLA))(
        cache, query, keys, values, metadata
    )
    step = jax.jit(functools.partial(write_and_attend, window=window, backend=backend))

    mesh: Mesh = make_mesh(3)
    sharded = LayerCache(
        *(jax.device_put(part, NamedSharding(mesh, PAGES)) for part in (cache.keys, cache.values))
    )
    on_mesh = jax.device_put(query, NamedSharding(mesh, jax.P(None, None, "tp", None, None)))
    new_on_mesh = [
        jax.device_put(part, NamedSharding(mesh, jax.P(None, None, "tp", None))) for part in (keys, values)
    ]
    with jax.set_mesh(mesh):
        program = step.lower(sharded, on_mesh, *new_on_mesh, metadata).compile()
        found, found_cache = program(sharded, on_mesh, *new_on_mesh, metadata)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for name in ("keys", "values"):
        part = getattr(found_cache, name)
        np.testing.assert_array_equal(part, getattr(expected_cache, name))
        assert part.sharding.shard_shape(part.shape)[1] == 1  # still one KV head a device
    assert find_collectives(program.as_text()) == []  # heads are whole on a device: nothing moves
