"""Attention over pages in random shapes: what the tests of every kernel hold it to the definition on."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpjax.attention import kernels, reference
from tpjax.cache import NULL_PAGE, Buffer, StoredPages, TokenGroup
from tpjax.cache_quantization import QuantizedBuffer
from tpjax.config import KVDtype


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
        dtype: of everything but a quantised cache.
        kv_dtype: what keys and values are kept in; ``auto``: ``dtype``.
        part: elements of a part of a vector in 8 bits; ``None``: vectors are whole.
        magnitude: of values, which are drawn; the tolerance is as large.
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
    kv_dtype: KVDtype = "auto"
    part: int | None = None
    magnitude: float = 1.0


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
    buffers[-1] *= shape.magnitude
    dtype = jnp.dtype(shape.dtype)
    value_dim = shape.width // 2 if shape.value_dim is None else shape.value_dim
    parts: list[Buffer] = [jnp.asarray(buffer, dtype) for buffer in buffers]
    if shape.kv_dtype != "auto":
        parts = [QuantizedBuffer.of(jnp.asarray(one, dtype), shape.kv_dtype, shape.part) for one in buffers]
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


def exact_numbers(buffer: Buffer) -> jax.Array:
    """What a buffer holds, in float32, and zeros for what is not a number."""
    wide = buffer.vectors if isinstance(buffer, QuantizedBuffer) else buffer
    return jnp.nan_to_num(wide).astype(jnp.float32)


def check(kernel: ModuleType, shape: Shape, seed: int = 0, *, interpret: Any = None) -> None:
    """Holds a kernel to the definition."""
    query, pages, group, sinks = case(shape, seed)
    scoring: dict[str, Any] = {"window": shape.window, "softcap": shape.softcap, "sinks": sinks}
    scoring["scale"] = shape.width**-0.5
    attend = functools.partial(kernels.paged_attention, kernel, interpret=interpret, **scoring)
    found = jax.jit(attend, static_argnums=1)(query, pages.value_dim, pages.stored, group)
    assert found.dtype == query.dtype
    clean = StoredPages(*(x if x is None else exact_numbers(x) for x in pages.stored))
    keys, values = (jnp.zeros((*query.shape[:2], 1, width)) for width in (shape.width, pages.value_dim))

    def define(query: jax.Array, stored: StoredPages, group: TokenGroup) -> jax.Array:
        exact = Pages(stored, pages.value_dim)
        return reference.paged_attention(query, keys, values, exact, group, **scoring)

    with jax.default_matmul_precision("highest"):
        expected = jax.jit(define)(query.astype(jnp.float32), clean, group)
    result, present = np.asarray(found, np.float32), np.asarray(group.present)
    assert np.isfinite(result).all()
    assert not result[~present.any(axis=1)].any()  # rows without a token
    tolerance = 2e-5 if shape.dtype == "float32" else 2e-2
    atol = tolerance * shape.magnitude
    np.testing.assert_allclose(result[present], np.asarray(expected)[present], atol=atol, rtol=tolerance)
