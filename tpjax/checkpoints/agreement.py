"""Compares a configuration with a checkpoint's tensors: sizes first, then names and shapes, then ties.

The rule for tensors is that for fields (``tpjax.families.unread``): what a model needs must be there in the
right shape; what could change a number if it were used is rejected; anything else is named and ignored.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from math import prod
from pathlib import Path

import numpy as np

from tpjax.checkpoints.source import TensorInfo, TensorSource, shown
from tpjax.config import ModelConfig
from tpjax.errors import CheckpointError

log = logging.getLogger(__name__)

# Buffers that code recomputes, and the scales of caches that are quantised: no implementation reads them.
BUFFERS = (
    r"(.*\.)?rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)",
    r".*\.(self_attn|attn)\.(k_proj\.|v_proj\.)?[kvq]_scale",
)
# A model is built, layer by layer, to compare it: not if it is so much larger than the files.
_LARGER = 4
_FEW_LAYERS = 128
_COMPARED_ELEMENTS = 1 << 21
_MOST_NAMES_SHOWN = 8


def check_sizes(
    where: Path, config: ModelConfig, tensors: Mapping[str, TensorInfo], layer: re.Pattern[str]
) -> None:
    """Compares the configuration's sizes with the files', before anything is built from them.

    Args:
        where: the checkpoint.
        config: the architecture.
        tensors: the stored tensors.
        layer: matches the beginning of the name of a layer's tensor; its group is the layer's number.

    Raises:
        CheckpointError: the configuration describes a model several times the size of the files.
    """
    found = [int(match[1]) for match in map(layer.match, tensors) if match and len(match[1]) < 9]
    layers = max(found, default=-1) + 1
    if config.num_layers > max(_LARGER * layers, _FEW_LAYERS):
        raise CheckpointError(
            f"{where}: the configuration says num_layers={config.num_layers}, the files have {layers} layers"
        )
    needed, stored = _least_weights(config), sum(prod(info.shape) for info in tensors.values())
    if needed > _LARGER * stored:
        attention = config.attention
        sizes = (
            f"num_layers={config.num_layers}, hidden_size={config.hidden_size}, "
            f"intermediate_size={config.mlp.intermediate_size}, num_heads={attention.num_heads}, "
            f"head_dim={attention.head_dim}, vocab_size={config.vocab_size}"
        )
        experts = "" if config.moe is None else f", num_experts={config.moe.num_experts}"
        raise CheckpointError(
            f"{where}: a model of {sizes}{experts} has at least {needed} weights, the files hold {stored}"
        )


def _least_weights(config: ModelConfig) -> int:
    """Returns the number of weights in the largest matrices, a lower bound of the model's."""
    d, per_mlp, attention = config.hidden_size, 2 + config.mlp.gated, config.attention
    heads = (
        0 if attention.latent else 2 * (attention.num_heads + attention.num_kv_heads) * attention.head_dim * d
    )
    total = config.vocab_size * d + config.num_layers * heads
    for sparse in config.sparse_layers:
        if sparse and config.moe is not None:
            total += config.moe.num_experts * 3 * d * config.moe.expert_width
        else:
            total += per_mlp * d * config.mlp.intermediate_size
    return total


def rejected_and_ignored(
    unexpected: Iterable[str],
    needed: Collection[str],
    prefixes: Iterable[str],
    layers: str,
    unlisted: Collection[str] = (),
) -> tuple[list[str], list[str]]:
    """Splits tensors that the model does not need by whether they could change a number if it used them.

    Tensors that could are those inside a decoder layer (there may be more layers, norms, biases or experts
    than the configuration says) and those of a module that the model has (a bias of its ``lm_head``). A
    tensor that an index does not list belongs to no model, whatever its name.

    Args:
        unexpected: names of tensors that the model does not need.
        needed: names of tensors that the model needs.
        prefixes: possible prefixes of a name.
        layers: name of the list of layers.
        unlisted: names that the checkpoint's index does not list.

    Returns:
        Names of tensors to reject, and of tensors to ignore.
    """
    longest_first = sorted(prefixes, key=len, reverse=True)

    def module(name: str) -> str:
        prefix = next((prefix for prefix in longest_first if name.startswith(prefix)), "")
        return re.sub(r"\d+", "N", name[len(prefix) :].rpartition(".")[0])

    modules = {module(name) for name in needed} | {"lm_head"}
    rejected: list[str] = []
    ignored: list[str] = []
    for name in unexpected:
        counts = name not in unlisted and (module(name) in modules or module(name).startswith(f"{layers}.N."))
        (rejected if counts else ignored).append(name)
    return rejected, ignored


def warn_of(where: Path, ignored: list[str]) -> None:
    """Logs a warning that names the tensors that are ignored."""
    if ignored:
        more = len(ignored) - _MOST_NAMES_SHOWN
        rest = f" and {more} more" if more > 0 else ""
        names = ", ".join(map(shown, ignored[:_MOST_NAMES_SHOWN]))
        log.warning("%s: ignored, as the model has no use for it: %s%s", where, names, rest)


def are_equal(source: TensorSource, one: str, other: str) -> bool:
    """Returns whether two stored tensors have the same values; reads them up to the first difference."""
    first, second = source.tensors[one], source.tensors[other]
    if first.shape != second.shape or not first.shape:
        return False
    rows = max(1, _COMPARED_ELEMENTS // max(1, prod(first.shape[1:])))
    return all(
        _same(source.read(one, (slice(at, at + rows),)), source.read(other, (slice(at, at + rows),)))
        for at in range(0, first.shape[0], rows)
    )


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    if one.dtype == other.dtype and one.tobytes() == other.tobytes():
        return True
    return np.array_equal(one.astype(np.float32), other.astype(np.float32), equal_nan=True)
