"""Splits a model's layers into pipeline stages of about equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from tpjax.config import ModelConfig
from tpjax.errors import ConfigError
from tpjax.hardware import HARDWARE, Hardware
from tpjax.interconnect import Measured
from tpjax.runtime.counts import Counts
from tpjax.step_time import Itemsizes, StepTime, StepTokens

# The decode step that the stages share: rows of one stage's group, and keys of each.
_ROWS = 8
_CONTEXT = 1024
# Of a device that is not known, the ratio of bandwidth and FLOPs of this one, and no fixed costs: measured
# figures would split a model otherwise at each start.
_OTHERWISE = replace(
    HARDWARE["h100-sxm"],
    interconnect=Measured(((1.0, 0.0),)),
    efficiency=replace(
        HARDWARE["h100-sxm"].efficiency, layer_us=0.0, step_us=0.0, row_us=0.0, token_us=0.0, expert_us=0.0
    ),
)


def split_layers(
    config: ModelConfig, tps: Sequence[int], itemsizes: Itemsizes, hardware: Hardware | None = None
) -> tuple[range, ...]:
    """Splits the layers so that the slowest stage is as fast as it can be.

    A layer costs what :class:`tpjax.step_time.StepTime` predicts of a decode step: layers with experts more
    than others, those with a window less where the context is longer. The first stage also embeds, the last
    has the vocabulary projection, which reads as much as several layers of a small model, and samples. A
    stage of more devices runs a layer in less time, and has more of them.

    Args:
        config: the architecture.
        tps: devices of each stage.
        itemsizes: bytes of an element of weights, activations and cache.
        hardware: one device; ``None``: it is not known.

    Returns:
        The numbers of each stage's layers.

    Raises:
        ConfigError: there are more stages than layers.
    """
    if len(tps) == 1:
        return (range(config.num_layers),)
    if len(tps) > config.num_layers:
        raise ConfigError(
            f"pp={len(tps)} stages need a layer each, but this model has num_layers={config.num_layers}"
        )
    tokens, device = StepTokens(_ROWS, _CONTEXT), hardware or _OTHERWISE
    seconds = {tp: layer_seconds(config, tp, itemsizes, device, tokens) for tp in set(tps)}
    return tuple(range(*bounds) for bounds in pairwise((0, *_balanced([seconds[tp] for tp in tps]))))


def layer_seconds(
    config: ModelConfig,
    tp: int,
    itemsizes: Itemsizes,
    hardware: Hardware,
    tokens: StepTokens,
    busy: int = 1,
) -> list[float]:
    """Predicts the seconds of each layer in a step: the first embeds too, the last also samples.

    Args:
        config: the architecture.
        tp: devices.
        itemsizes: bytes of an element of weights, activations and cache.
        hardware: one device.
        tokens: the step.
        busy: stages that work at the same time; faked devices share one machine.
    """

    def predictor(layer: int) -> StepTime:
        part = config.of_layers([layer])
        axis = part.moe.sharded_axis(tp) if part.moe else "width"
        return StepTime(Counts(part.model_type, part).share(tp, axis), hardware, itemsizes, busy)

    kinds = list(zip(config.attention.layer_types, config.sparse_layers, strict=True))
    predictors = {kind: predictor(kinds.index(kind)) for kind in dict.fromkeys(kinds)}
    of_kind = {kind: one.layers(tokens).total for kind, one in predictors.items()}
    seconds, ends = [of_kind[kind] for kind in kinds], predictors[kinds[0]]
    seconds[0] += ends.embedding(tokens.total).total
    seconds[-1] += ends.head(tokens.sampled).total
    return seconds


def _balanced(seconds: Sequence[Sequence[float]]) -> list[int]:
    """Returns where each of several runs of entries ends, which follow each other.

    The largest sum of a run is as small as it can be, and then the sum of the runs' squares.

    Args:
        seconds: all entries, as each run counts them.
    """
    sums = [_sums(own) for own in seconds]
    slowest = _cheapest(sums, np.maximum)[0]
    return _cheapest([np.where(own <= slowest * (1 + 1e-9), own**2, np.inf) for own in sums], np.add)[1]


def _sums(seconds: Sequence[float]) -> np.ndarray:
    """Returns the sum of the entries from a row's number up to a column's; infinite if there are none."""
    ends = np.concatenate([[0.0], np.cumsum(seconds)])
    sums: np.ndarray = ends[None, :] - ends[:, None]
    sums[np.tril_indices(len(ends))] = np.inf  # a run has an entry
    return sums


def _cheapest(costs: Sequence[np.ndarray], combine: np.ufunc) -> tuple[float, list[int]]:
    """Returns the least combined cost of runs in a row, and their ends.

    Args:
        costs: of each run, from a row's number up to a column's.
        combine: of the costs of two runs.
    """
    best, chosen = costs[0][0], []
    for own in costs[1:]:
        through = combine(best[:, None], own)  # up to a row's number, and then one run more
        chosen.append(through.argmin(axis=0))
        best = through.min(axis=0)
    ends = [len(best) - 1]
    for before in reversed(chosen):
        ends.insert(0, int(before[ends[0]]))
    return float(best[-1]), ends
