"""The collective budget: the bytes that the design lets one call of a program move between devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tpjax.config import ModelConfig
from tpjax.inspect.collectives import Collective
from tpjax.sampling import ThresholdSearch
from tpjax.sampling_params import MAX_LOGPROBS
from tpjax.sharding import pad_to_multiple

BUDGETED_KINDS = ("all-reduce", "reduce-scatter", "all-gather")


def collective_budget(
    config: ModelConfig,
    tp: int,
    *,
    tokens: int = 1,
    rows: int = 1,
    itemsize: int = 4,
    sequence_parallel: bool = False,
    greedy: bool = False,
    platform: str = "cpu",
    embeds: bool = True,
    samples: bool = True,
    hands_on_whole: bool = False,
) -> dict[str, Any]:
    """Computes the collectives of one call.

    A layer takes two all-reduces of the residual, the embedding takes one, and sampling a few small ones. A
    layer whose attention and MLP are parallel takes one all-reduce; a norm over all heads adds one, of two
    float32 numbers a token. With sequence parallelism, an all-gather and a reduce-scatter replace each
    all-reduce of a layer, a reduce-scatter replaces that of the embedding, and the sampled rows take an
    all-reduce. On a CPU, XLA sums bfloat16 as float32, which doubles the bytes.

    To sample greedily, each device contributes the best score of each row and its token, 8 bytes, to one
    all-gather. Other sampling adds to it what log-probabilities need, and takes four all-reduces: of the
    highest scores, of the mass that top-p is a part of, and of a round's sums in the searches of top-k and of
    top-p. How many rounds there are is known when they run: they count as one.

    Args:
        config: the architecture; of a pipeline's stage, with its layers only.
        tp: number of devices.
        tokens: tokens that pass through the layers, padding included.
        rows: rows that a token is sampled for.
        itemsize: bytes of an element of the residual.
        sequence_parallel: whether the residual is sharded over tokens.
        greedy: whether the program has the plain variant of :func:`tpjax.sampling.sample`.
        platform: the kind of device, which decides how top-k and top-p are searched for.
        embeds: whether it embeds tokens: all but the first stage of a pipeline take hidden states.
        samples: whether it samples, or is of a stage before the last.
        hands_on_whole: whether the next stage has another number of devices: what is sharded over tokens is
            gathered for it.

    Returns:
        The number of each of ``BUDGETED_KINDS`` and of others, the bytes of their results on one device, and
        the rule in words.
    """
    if tp == 1:
        return {**measured(()), "rule": "tp=1: none"}
    layers, norms = config.num_layers, config.attention.qk_norm == "projection"
    sums = 1 if config.parallel else 2
    token_bytes = config.hidden_size * itemsize
    reduces, reduced = norms * layers, tokens * norms * layers * 2 * 4
    scatters, gathers, gathered = 0, int(samples), samples * tp * rows * 2 * 4
    if samples and not greedy:
        search = ThresholdSearch.on(platform)
        listed = min(MAX_LOGPROBS, pad_to_multiple(config.vocab_size, tp) // tp)
        gathered += tp * rows * (3 + 2 * listed) * 4
        rounds = 2 * (search.rounds if search.fixed else 1)
        reduces, reduced = reduces + 2 + rounds, reduced + rows * (2 + rounds * search.sums) * 4
    if sequence_parallel:
        moved = f"{sums} all-gathers and {sums} reduce-scatters × {layers} layers"
        reduces, reduced = reduces + samples, reduced + samples * rows * token_bytes
        scatters = sums * layers + embeds
        gathered_again = sums * layers + hands_on_whole
        gathers, gathered = gathers + gathered_again, gathered + gathered_again * tokens * token_bytes
    else:
        moved, residuals = f"{sums + norms} × {layers} layers", sums * layers + embeds
        reduces, reduced = reduces + residuals, reduced + residuals * tokens * token_bytes
    parts = [moved, *["1 embedding"] * embeds, *["1 sampled rows"] * (sequence_parallel and samples)]
    return {
        "all_reduces": reduces,
        "all_reduce_bytes": reduced,
        "reduce_scatters": scatters,
        "reduce_scatter_bytes": scatters * tokens * token_bytes // tp,
        "all_gathers": gathers,
        "all_gather_bytes": gathered,
        "others": 0,
        "rule": " + ".join(parts) + "; sampling" * samples,
    }


def measured(collectives: Iterable[Collective]) -> dict[str, int]:
    """Counts the unconditional collectives of a compiled program, in the form of the budget."""
    figures = {}
    always = [one for one in collectives if not one.conditional and one.group_size != 1]
    for kind in BUDGETED_KINDS:
        same_kind = [one for one in always if one.kind == kind]
        name = kind.replace("-", "_")
        figures[f"{name}s"] = sum(one.count for one in same_kind)
        figures[f"{name}_bytes"] = sum(one.count * one.bytes for one in same_kind)
    figures["others"] = sum(one.count for one in always if one.kind not in BUDGETED_KINDS)
    return figures
