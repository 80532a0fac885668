"""The collective budget: what the design lets one call of a program move between devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tpjax.config import ModelConfig
from tpjax.inspect.collectives import Collective


def collective_budget(
    config: ModelConfig, tp: int, *, tokens: int = 1, rows: int = 1, itemsize: int = 4
) -> dict[str, Any]:
    """Two all-reduces of the residual a layer, one for the embedding, one small gather to draw a token.

    A layer whose attention and MLP stand side by side needs one; a norm over all heads one more, of two
    float32 numbers a token. Each device offers the best score of each row and its token, 8 bytes. On a CPU,
    XLA sums bfloat16 as float32: a program then moves twice the bytes.

    Args:
        config: the architecture.
        tp: devices.
        tokens: that pass through the layers: of all rows of a decode step, or of a chunk.
        rows: for which a token is drawn.
        itemsize: bytes of an element of the residual.

    Returns:
        How many all-reduces, all-gathers and others, the bytes of their results on one device, and the
        rule in words.
    """
    if tp == 1:
        return {**measured(()), "rule": "tp=1: none"}
    layers, norms = config.num_layers, config.qk_norm == "projection"
    sums = (1 if config.parallel else 2) * layers + 1
    a_layer = (1 if config.parallel else 2) + norms
    count = a_layer * layers + 1
    return {
        "all_reduces": count,
        "all_reduce_bytes": tokens * (sums * config.hidden_size * itemsize + norms * layers * 2 * 4),
        "all_gathers": 1,
        "all_gather_bytes": tp * rows * 2 * 4,
        "others": 0,
        "rule": f"{a_layer} × {layers} layers + 1 embedding; sampling",
    }


def measured(collectives: Iterable[Collective]) -> dict[str, int]:
    """The same figures of a compiled program, of what runs whatever its requests ask for."""
    figures = {}
    always = [one for one in collectives if not one.conditional and one.group_size != 1]
    for kind in ("all-reduce", "all-gather"):
        alike = [one for one in always if one.kind == kind]
        name = kind.replace("-", "_")
        figures[f"{name}s"] = sum(one.count for one in alike)
        figures[f"{name}_bytes"] = sum(one.count * one.bytes for one in alike)
    figures["others"] = sum(one.count for one in always) - figures["all_reduces"] - figures["all_gathers"]
    return figures
