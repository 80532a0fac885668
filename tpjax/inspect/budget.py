"""The collective budget: what the design lets one call of a program move between devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tpjax.config import ModelConfig
from tpjax.inspect.collectives import Collective

KINDS = ("all-reduce", "reduce-scatter", "all-gather")


def collective_budget(
    config: ModelConfig,
    tp: int,
    *,
    tokens: int = 1,
    rows: int = 1,
    itemsize: int = 4,
    cut: bool = False,
) -> dict[str, Any]:
    """Two all-reduces of the residual a layer, one for the embedding, one small gather to draw a token.

    A layer whose attention and MLP stand side by side needs one; a norm over all heads one more, of two
    float32 numbers a token. Each device offers the best score of each row and its token, 8 bytes. Where the
    residual is cut over positions, an all-gather and a reduce-scatter take the place of a layer's all-reduce,
    a reduce-scatter that of the embedding's, and the last token's row is summed over the devices. On a CPU,
    XLA sums bfloat16 as float32: a program then moves twice the bytes.

    Args:
        config: the architecture.
        tp: devices.
        tokens: that pass through the layers: of all rows of a decode step, or of a chunk.
        rows: for which a token is drawn.
        itemsize: bytes of an element of the residual.
        cut: the residual is cut over positions.

    Returns:
        How many of each of ``KINDS`` and others, the bytes of their results on one device, and the rule in
        words.
    """
    if tp == 1:
        return {**measured(()), "rule": "tp=1: none"}
    layers, norms = config.num_layers, config.qk_norm == "projection"
    sums = 1 if config.parallel else 2
    token_bytes = config.hidden_size * itemsize
    reduces, reduced = norms * layers, tokens * norms * layers * 2 * 4
    scatters, gathers, gathered = 0, 1, tp * rows * 2 * 4
    if cut:
        moved = f"{sums} all-gathers and {sums} reduce-scatters × {layers} layers"
        reduces, reduced = reduces + 1, reduced + rows * token_bytes
        scatters = sums * layers + 1
        gathers, gathered = gathers + sums * layers, gathered + sums * layers * tokens * token_bytes
    else:
        moved = f"{sums + norms} × {layers} layers"
        reduces, reduced = reduces + sums * layers + 1, reduced + (sums * layers + 1) * tokens * token_bytes
    return {
        "all_reduces": reduces,
        "all_reduce_bytes": reduced,
        "reduce_scatters": scatters,
        "reduce_scatter_bytes": scatters * tokens * token_bytes // tp,
        "all_gathers": gathers,
        "all_gather_bytes": gathered,
        "others": 0,
        "rule": f"{moved} + 1 embedding{' + 1 last token' * cut}; sampling",
    }


def measured(collectives: Iterable[Collective]) -> dict[str, int]:
    """The same figures of a compiled program, of what runs whatever its requests ask for."""
    figures = {}
    always = [one for one in collectives if not one.conditional and one.group_size != 1]
    for kind in KINDS:
        alike = [one for one in always if one.kind == kind]
        name = kind.replace("-", "_")
        figures[f"{name}s"] = sum(one.count for one in alike)
        figures[f"{name}_bytes"] = sum(one.count * one.bytes for one in alike)
    figures["others"] = sum(one.count for one in always if one.kind not in KINDS)
    return figures
