"""The layouts of stored projections: fused, padded, and in the order of the head plan."""

from __future__ import annotations

from collections.abc import Sequence

from tpjax.sharding.head_plan import HeadPlan
from tpjax.sharding.weight_layout import (
    Segment,
    WeightLayout,
    column_layout,
    row_layout,
    tensor_layout,
    width_per_device,
)


def qkv_layout(plan: HeadPlan, head_dim: int, in_features: int | None) -> WeightLayout:
    """Returns the layout of q, k and v fused: for each head slot its queries, its key and its value.

    Args:
        plan: the head plan.
        head_dim: elements of a head.
        in_features: inputs of the weight; ``None``: the layout of the biases.
    """
    segments, sizes = qkv_segments(plan, head_dim, "bias" if in_features is None else "weight")
    width = plan.num_head_slots * (plan.group_size + 2) * head_dim
    return column_layout(width, segments, sizes, in_features=in_features)


def qkv_segments(plan: HeadPlan, head_dim: int, kind: str) -> tuple[list[Segment], dict[str, int]]:
    """Returns the segments of fused q, k and v, and the outputs of each canonical tensor.

    Args:
        plan: the head plan.
        head_dim: elements of a head.
        kind: ``weight`` or ``bias``.
    """
    q, k, v = (f"{name}_proj.{kind}" for name in "qkv")
    segments = []
    for head_slot, (kv_head, heads) in enumerate(plan.head_slots):
        start = head_slot * (plan.group_size + 2) * head_dim
        segments += head_segments(q, heads, head_dim, start)
        for part, name in enumerate((k, v)):
            segments += head_segments(name, [kv_head], head_dim, start + (plan.group_size + part) * head_dim)
    kv_width = plan.num_kv_heads * head_dim
    return segments, {q: plan.num_heads * head_dim, k: kv_width, v: kv_width}


def o_proj_layout(plan: HeadPlan, head_dim: int, out_features: int) -> WeightLayout:
    """Returns the layout of the output projection, whose inputs are the query heads of each head slot."""
    name, heads = "o_proj.weight", plan.stored_query_heads
    segments, sizes = head_segments(name, heads, head_dim), {name: plan.num_heads * head_dim}
    return row_layout(len(heads) * head_dim, segments, sizes, out_features=out_features)


def query_heads_layout(name: str, plan: HeadPlan, size: int, in_features: int | None = None) -> WeightLayout:
    """Returns the layout of a tensor with ``size`` outputs per query head, in the order of the head slots.

    Args:
        name: the canonical tensor.
        plan: the head plan.
        size: elements of the tensor per head.
        in_features: inputs, if the tensor is a matrix; ``None``: it is a vector.
    """
    return _heads_layout(name, plan.stored_query_heads, plan.num_heads, size, in_features)


def key_heads_layout(name: str, plan: HeadPlan, size: int) -> WeightLayout:
    """Returns the layout of a vector with ``size`` elements per KV head, in the order of the head slots."""
    return _heads_layout(name, plan.stored_kv_heads, plan.num_kv_heads, size, None)


def _heads_layout(
    name: str, heads: Sequence[int | None], count: int, size: int, in_features: int | None
) -> WeightLayout:
    segments = head_segments(name, heads, size)
    return column_layout(len(heads) * size, segments, {name: count * size}, in_features=in_features)


def head_segments(source: str, heads: Sequence[int | None], head_dim: int, start: int = 0) -> list[Segment]:
    """Returns segments that store one head after the other from ``start`` on; ``None`` leaves zeros."""
    return [
        Segment(source, head * head_dim, head_dim, start + index * head_dim)
        for index, head in enumerate(heads)
        if head is not None
    ]


def latent_heads_layout(
    name: str, heads: int, padded_heads: int, *, rows: range, per_head: int, rank: int
) -> WeightLayout:
    """Returns the layout [padded_heads * rows, rank] of some rows of each head of a projection from a latent.

    Args:
        name: the canonical tensor, [heads * per_head, rank].
        heads: heads of the checkpoint.
        padded_heads: heads over all devices, padding included.
        rows: rows of each head.
        per_head: rows of a head in the canonical tensor.
        rank: width of the latent.
    """
    size = len(rows)
    segments = tuple(Segment(name, head * per_head + rows.start, size, head * size) for head in range(heads))
    return WeightLayout((padded_heads * size, rank), 0, segments, ((name, heads * per_head),))


def concatenated_layout(sizes: dict[str, int], in_features: int | None) -> WeightLayout:
    """Returns the layout of several projections of one input, one after the other along the outputs.

    Args:
        sizes: outputs of each module, in the order stored.
        in_features: inputs of the weights; ``None``: the layout of the biases.
    """
    kind = "bias" if in_features is None else "weight"
    segments, start = [], 0
    for name, size in sizes.items():
        segments.append(Segment(f"{name}.{kind}", 0, size, start))
        start += size
    tensors = {f"{name}.{kind}": size for name, size in sizes.items()}
    return column_layout(start, segments, tensors, in_features=in_features)


def gate_up_layout(modules: Sequence[str], width: int, tp: int, in_features: int | None) -> WeightLayout:
    """Returns the layout of fused tensors of width F, outputs in the order [tp, tensors, F / tp].

    A device holds the same features of each.

    Args:
        modules: canonical modules: gate and up, or up alone.
        width: F; padded with zeros: :func:`width_per_device`.
        tp: devices that F is sharded over.
        in_features: inputs of the weights; ``None``: the layout of the biases.
    """
    kind = "bias" if in_features is None else "weight"
    names = [f"{module}.{kind}" for module in modules]
    shard = width_per_device(width, tp)
    segments = [
        Segment(name, start, min(shard, width - start), len(names) * start + part * shard)
        for start in range(0, width, shard)
        for part, name in enumerate(names)
    ]
    return column_layout(
        len(names) * shard * tp, segments, dict.fromkeys(names, width), in_features=in_features
    )


def down_layout(name: str, width: int, tp: int, out_features: int) -> WeightLayout:
    """Returns the layout [out, F] of the down projection of an MLP or an expert.

    Args:
        name: the canonical tensor.
        width: F; padded with zeros: :func:`width_per_device`.
        tp: devices that F is sharded over.
        out_features: outputs.
    """
    padded = tp * width_per_device(width, tp)
    return tensor_layout(name, (out_features, width), padded=padded, axis=1)
