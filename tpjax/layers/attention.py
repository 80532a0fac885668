"""Grouped-query attention over the paged cache.

``paged_attention`` walks the pages in use with an online softmax (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867; Dao et al. 2022, https://arxiv.org/abs/2205.14135): its cost follows the
longest context in the batch, or the window where that is shorter, and nothing is gathered whole.
``reference_attention`` is the definition it is held to.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tpjax.cache import BatchMetadata, LayerCache, Pages
from tpjax.config import ModelConfig
from tpjax.layers.linear import ColumnLinear, RowLinear, parameter
from tpjax.layers.norm import HeadScale, Norm, normalised
from tpjax.layers.rope import Rotation, rotate
from tpjax.sharding import (
    BIAS,
    HEADS,
    REPLICATED,
    HeadPlan,
    Segment,
    WeightLayout,
    column_layout,
    constrain,
    row_layout,
    tensor_layout,
)

_MASKED = -1e30  # finite, so that a page with no visible key gives no NaN
_QUERY_BLOCK = 128  # queries of a chunk that share one set of visible keys


class Attention(nnx.Module):
    """Fused column-parallel q, k and v; attention on whole heads; row-parallel output.

    The fused product's outputs lie slot by slot (see ``HeadPlan``): the slot's queries, its key, its value.
    """

    def __init__(self, config: ModelConfig, tp: int, dtype: jnp.dtype) -> None:
        self.plan = HeadPlan(config.num_heads, config.num_kv_heads, tp)
        hidden, head_dim = config.hidden_size, config.head_dim
        width = self.plan.num_slots * (self.plan.group_size + 2) * head_dim
        self.qkv_proj = ColumnLinear(
            column_layout(width, *_qkv_segments(self.plan, head_dim, "weight"), in_features=hidden),
            column_layout(width, *_qkv_segments(self.plan, head_dim, "bias"), in_features=None)
            if config.attention_bias
            else None,
            dtype,
        )
        self.o_proj = RowLinear(
            row_layout(
                self.plan.num_padded_heads * head_dim,
                _head_segments("o_proj.weight", _query_places(self.plan), head_dim),
                {"o_proj.weight": config.num_heads * head_dim},
                out_features=hidden,
            ),
            tensor_layout("o_proj.bias", (hidden,)) if config.attention_out_bias else None,
            dtype,
            shares=tp if config.parallel else None,
        )
        self.q_norm: Norm | HeadScale
        self.k_norm: Norm | HeadScale
        if config.qk_norm == "head":
            self.q_norm = Norm("q_norm", head_dim, config, dtype)
            self.k_norm = Norm("k_norm", head_dim, config, dtype)
        elif config.qk_norm != "none":
            places = {"q_norm.weight": _query_places(self.plan), "k_norm.weight": _key_places(self.plan)}
            counts = (config.num_heads, config.num_kv_heads)
            self.q_norm, self.k_norm = (
                HeadScale(
                    column_layout(
                        len(heads) * head_dim,
                        _head_segments(source, heads, head_dim),
                        {source: count * head_dim},
                        in_features=None,
                    ),
                    dtype,
                )
                for (source, heads), count in zip(places.items(), counts, strict=True)
            )
        self.sinks = (
            parameter(_sink_layout(self.plan), BIAS, jnp.dtype(jnp.float32))
            if config.attention_sinks
            else None
        )
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rotation: Rotation | None,
        cache: LayerCache,
        at: BatchMetadata,
        window: int | None,
    ) -> tuple[Float[Array, "*shares B S D"], LayerCache]:
        """Each device's share of the sum over heads, and the cache with the new keys and values."""
        config, group = self.config, self.plan.group_size
        x = constrain(x, REPLICATED)  # all-gather over tp where the residual is cut over positions
        qkv = self.qkv_proj(x).reshape(*x.shape[:2], self.plan.num_slots, group + 2, config.head_dim)
        qkv = constrain(qkv, HEADS)
        query, key, value = qkv[..., :group, :], qkv[..., group, :], qkv[..., group + 1, :]
        if config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        elif config.qk_norm == "each_head":
            query = self.q_norm(normalised(query, config)).astype(x.dtype)
            key = self.k_norm(normalised(key, config)).astype(x.dtype)
        elif config.qk_norm == "projection":
            by_query, by_key = _inverse_rms(qkv, self.plan, config.norm_eps)
            query, key = query.astype(jnp.float32), key.astype(jnp.float32)
            query = self.q_norm(query * by_query[..., None, None, None]).astype(x.dtype)
            key = self.k_norm(key * by_key[..., None, None]).astype(x.dtype)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        cache = cache.write(key, value, at)
        mixed = paged_attention(
            query,
            key,
            value,
            cache,
            at,
            scale=config.query_scale,
            window=window,
            softcap=config.attn_softcap,
            sinks=None if self.sinks is None else self.sinks[...].reshape(self.plan.num_slots, group),
        )
        return self.o_proj(mixed.reshape(*x.shape[:2], -1)), cache


def _inverse_rms(
    qkv: Float[Array, "B S K places h"], plan: HeadPlan, eps: float
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """One over the root mean square of all queries as one vector, and of all keys; float32.

    Empty places hold zeros; a KV head with several slots counts in the first of them only.
    """
    counted = np.zeros((plan.num_slots, plan.group_size + 2, 2), np.float32)
    counted[:, : plan.group_size, 0] = 1
    keys = _key_places(plan)
    for head in range(plan.num_kv_heads):
        counted[keys.index(head), plan.group_size, 1] = 1
    squares = jnp.square(qkv.astype(jnp.float32))
    sums = jnp.einsum("bskph,kpt->bst", squares, counted)
    sums = constrain(sums, REPLICATED)  # all-reduce over tp, two numbers a token
    sizes = np.array([plan.num_heads, plan.num_kv_heads], np.float32) * qkv.shape[-1]
    inverse = jax.lax.rsqrt(sums / sizes + eps)
    return inverse[..., 0], inverse[..., 1]


class _Mix(NamedTuple):
    """An online softmax under way, for rows of queries.

    Attributes:
        best: highest score seen.
        total: sum of exp(score - best).
        values: sum of exp(score - best) times the value.
    """

    best: Float[Array, "B K rows 1"]
    total: Float[Array, "B K rows 1"]
    values: Float[Array, "B K rows v"]

    @classmethod
    def empty(cls, query: Float[Array, "B K rows h"], width: int) -> _Mix:
        rows = query.shape[:-1]
        return cls(
            jnp.full((*rows, 1), _MASKED, jnp.float32),
            jnp.zeros((*rows, 1), jnp.float32),
            jnp.zeros((*rows, width), jnp.float32),
        )

    def attend(
        self,
        query: Float[Array, "B K rows h"],
        keys: Float[Array, " B #K T h"],
        values: Float[Array, " B #K T v"],
        visible: Bool[Array, "B 1 rows T"],
        scale: float,
        softcap: float | None,
    ) -> _Mix:
        """Takes in more keys and values.

        A row that sees none of them while it has seen none before gathers weights of 1: they vanish as soon
        as it sees a key, and every row sees its own in the end.
        """
        scores = jnp.einsum("bkqh,bkth->bkqt", query, keys, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(visible, soft_capped(scores, softcap), _MASKED)
        best = jnp.maximum(self.best, scores.max(axis=-1, keepdims=True))
        weights, keep = jnp.exp(scores - best), jnp.exp(self.best - best)
        mixed = jnp.einsum(
            "bkqt,bkth->bkqh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        return _Mix(best, self.total * keep + weights.sum(axis=-1, keepdims=True), self.values * keep + mixed)

    def sink(self, scores: Float[Array, "1 K rows 1"]) -> _Mix:
        """Takes in one more key, of these scores, whose value is nothing."""
        best = jnp.maximum(self.best, scores)
        keep = jnp.exp(self.best - best)
        return _Mix(best, self.total * keep + jnp.exp(scores - best), self.values * keep)


def soft_capped(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """Bounds values smoothly to (-cap, cap); ``None`` leaves them as they are."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def paged_attention(
    query: Float[Array, "B S K G h"],
    key: Float[Array, "B S #K h"],
    value: Float[Array, "B S #K v"],
    cache: Pages,
    at: BatchMetadata,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Float[Array, "K G"] | None = None,
) -> Float[Array, "B S K G v"]:
    """Causal attention of each query to the keys at or before its position.

    A single token walks all its pages, its own key's included. A chunk walks the pages before it, then
    attends to its own keys directly, a block of queries at a time and only to the keys such a block can see:
    half the work of treating the chunk's keys as pages.

    Args:
        query: G query heads for each of the K KV heads.
        key: of the same tokens; already in the cache. K may be 1 in keys and values, for all heads alike.
        value: likewise; may be of another width.
        cache: holds the keys of every position up to the queries' own.
        at: pages of each sequence, and the queries' positions.
        scale: multiplies query-key products.
        window: keys a query sees, its own included; ``None``: all.
        softcap: bounds the scaled products smoothly; ``None``: not.
        sinks: of each query head, the score of a key without a value, float32; ``None``: there is none
            (Xiao et al. 2023, https://arxiv.org/abs/2309.17453).

    Returns:
        The mixed values, in the query's dtype; softmax and sums are float32.
    """
    batch, length, heads, group, head_dim = query.shape
    rows = query.swapaxes(1, 2).reshape(batch, heads, length * group, head_dim)
    row_positions = jnp.repeat(at.positions, group, axis=1)[:, None, :, None]
    # one token finds its own key in the cache; a chunk takes its own keys from its arguments, below
    stop = at.positions[:, 0] + (1 if length == 1 else 0)
    mix = _walk(rows, row_positions, cache, at, stop, scale, window, softcap, value.shape[-1])
    if length > 1:
        keys, values = key.swapaxes(1, 2), value.swapaxes(1, 2)
        blocks = []
        for start in range(0, length, _QUERY_BLOCK):
            end = min(start + _QUERY_BLOCK, length)
            seen = slice(0 if window is None else max(0, start - window + 1), end)
            mine = slice(start * group, end * group)
            visible = _visible(row_positions[:, :, mine], at.positions[:, None, None, seen], window)
            part = _Mix(*(x[:, :, mine] for x in mix))
            blocks.append(
                part.attend(rows[:, :, mine], keys[:, :, seen], values[:, :, seen], visible, scale, softcap)
            )
        mix = _Mix(*(jnp.concatenate(parts, axis=2) for parts in zip(*blocks, strict=True)))
    if sinks is not None:
        mix = mix.sink(jnp.tile(sinks, (1, length))[None, :, :, None])
    mixed = (mix.values / mix.total).astype(query.dtype)
    return mixed.reshape(batch, heads, length, group, -1).swapaxes(1, 2)


def _walk(
    rows: Float[Array, "B K rows h"],
    row_positions: Int[Array, "B 1 rows 1"],
    cache: Pages,
    at: BatchMetadata,
    stop: Int[Array, " B"],
    scale: float,
    window: int | None,
    softcap: float | None,
    width: int,
) -> _Mix:
    """Attends to the cached positions before ``stop``, each row from the first page that its window reaches.

    Rows walk side by side, each over pages of its own: a step of the walk is one page of every row, so that
    rows far apart, or rows that do not exist (at position 0), do not make each other's walk longer.
    """
    page_size = cache.page_size
    first, tables = jnp.zeros_like(stop), at.block_tables
    if window is not None:
        first = jnp.maximum(at.positions[:, 0] - (window - 1), 0) // page_size
        # past its end a row's table repeats the last page, in which the row sees nothing
        reached = first[:, None] + jnp.arange(tables.shape[1])
        tables = jnp.take_along_axis(tables, reached, axis=1, mode="clip")

    def page(step: Int[Array, ""], mix: _Mix) -> _Mix:
        pages = jax.lax.dynamic_index_in_dim(tables, step, axis=1, keepdims=False)
        keys, values = cache.read(pages)
        positions = ((first + step)[:, None] * page_size + jnp.arange(page_size))[:, None, None, :]
        # a sequence that starts earlier than the batch's latest must not see its own chunk here already
        written = positions < stop[:, None, None, None]
        visible = _visible(row_positions, positions, window) & written
        # what an earlier user left behind may not be a number, and 0 times that is not 0
        values = jnp.where(written.swapaxes(2, 3), values, 0)
        return mix.attend(rows, keys, values, visible, scale, softcap)

    most = jnp.max(-(-stop // page_size) - first)
    return jax.lax.fori_loop(0, most, page, _Mix.empty(rows, width))


def _visible(
    query_at: Int[Array, " ..."], key_at: Int[Array, " ..."], window: int | None
) -> Bool[Array, " ..."]:
    causal = key_at <= query_at
    return causal if window is None else causal & (key_at > query_at - window)


def reference_attention(
    query: Float[Array, "B S K G h"],
    keys: Float[Array, "B T K h"],
    values: Float[Array, "B T K v"],
    positions: Int[Array, "B S"],
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Float[Array, "K G"] | None = None,
) -> Float[Array, "B S K G v"]:
    """What :func:`paged_attention` computes, written as the definition: one softmax over contiguous keys."""
    scores = jnp.einsum("bskgh,btkh->bkgst", query, keys, preferred_element_type=jnp.float32) * scale
    visible = _visible(positions[:, :, None], jnp.arange(keys.shape[1]), window)
    scores = jnp.where(visible[:, None, None], soft_capped(scores, softcap), -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(sinks[None, :, :, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, column], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : keys.shape[1]]
    return jnp.einsum("bkgst,btkh->bskgh", weights, values, preferred_element_type=jnp.float32).astype(
        query.dtype
    )


def _qkv_segments(plan: HeadPlan, head_dim: int, kind: str) -> tuple[list[Segment], dict[str, int]]:
    q, k, v = (f"{name}_proj.{kind}" for name in "qkv")
    segments = []
    for slot, (kv_head, heads) in enumerate(plan.slots):
        at = slot * (plan.group_size + 2) * head_dim
        segments += [
            Segment(q, head * head_dim, head_dim, at + place * head_dim)
            for place, head in enumerate(heads)
            if head is not None
        ]
        if kv_head is not None:
            segments += [
                Segment(name, kv_head * head_dim, head_dim, at + (plan.group_size + part) * head_dim)
                for part, name in enumerate((k, v))
            ]
    sizes = {q: plan.num_heads * head_dim, k: plan.num_kv_heads * head_dim, v: plan.num_kv_heads * head_dim}
    return segments, sizes


def _query_places(plan: HeadPlan) -> list[int | None]:
    """The query head of each place, slot by slot."""
    return [head for _, heads in plan.slots for head in heads]


def _key_places(plan: HeadPlan) -> list[int | None]:
    """The KV head of each slot."""
    return [kv_head for kv_head, _ in plan.slots]


def _head_segments(source: str, heads: list[int | None], head_dim: int) -> list[Segment]:
    return [
        Segment(source, head * head_dim, head_dim, place * head_dim)
        for place, head in enumerate(heads)
        if head is not None
    ]


def _sink_layout(plan: HeadPlan) -> WeightLayout:
    places, name = _query_places(plan), "self_attn.sinks"
    return column_layout(
        len(places), _head_segments(name, places, 1), {name: plan.num_heads}, in_features=None
    )
