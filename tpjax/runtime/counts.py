"""Counts the elements of a model that one device holds, and the FLOPs of its attention.

Weights are read off the abstract decoder: the declarations in its layers say what is sharded, replicated and
padded at any tp. It is built with one layer of each kind, since equal layers hold equal amounts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

from tpjax.cache import cache_layout
from tpjax.config import ExpertAxis, ModelConfig
from tpjax.layers.weights import FormatOf, WeightFormat, dtype_bits
from tpjax.mesh import AXIS
from tpjax.model import Decoder
from tpjax.sharding import PAGES, StackedLayout, head_plan
from tpjax.step_time import DeviceShare, Elements


@dataclass(frozen=True)
class Counts:
    """Element and FLOP counts of a model.

    Attributes:
        name: name of the model in reports.
        config: its architecture.
    """

    name: str
    config: ModelConfig

    @property
    def parameters(self) -> int:
        """Number of weight elements, without padding or copies."""
        return self.on_device(1).total

    def on_device(self, tp: int, expert_axis: ExpertAxis = "width") -> Elements:
        """Counts the weight elements on one of ``tp`` devices.

        Args:
            tp: number of devices.
            expert_axis: the sharded axis of routed experts: the width of each, or the experts themselves.
        """
        config = self.config
        if config.moe is not None:
            config = config.with_expert_parallel("on" if expert_axis == "experts" else "off")
        return _elements(config, tp)

    def share(self, tp: int, expert_axis: ExpertAxis = "width") -> DeviceShare:
        """Returns what one of ``tp`` devices holds and computes."""
        return DeviceShare(
            self.config,
            tp,
            self.on_device(tp, expert_axis),
            self.cache_elements(tp),
            self.cache_vectors(tp),
            self.attention_flops(tp),
            expert_axis,
        )

    def cache_vectors(self, tp: int) -> int:
        """Counts the keys and values, or latents, of one token in one layer on one device."""
        layout = cache_layout(self.config, tp, 1, 1)
        return layout.count * layout.shape[1] // (tp if layout.spec == PAGES else 1)

    def cache_elements(self, tp: int) -> int:
        """Counts the cache elements of one token in one layer on one device. A latent cache is replicated."""
        return self.cache_vectors(tp) * cache_layout(self.config, tp, 1, 1).shape[-1]

    def attention_flops(self, tp: int) -> int:
        """Counts the FLOPs of one query position with one key and value: one layer, all heads of a device."""
        config = self.config
        if config.attention.latent is not None:  # scores and weighted sums in the latent space
            dims = 2 * config.attention.latent.kv_lora_rank + config.rotated_dim
            return 2 * math.ceil(config.attention.num_heads / tp) * dims
        plan = head_plan(config, tp)
        return 4 * plan.head_slots_per_device * plan.group_size * config.attention.head_dim


def stored_bytes(config: ModelConfig, format_of: FormatOf) -> float:
    """Returns the mean bytes of an element of attention, MLPs and experts as they are stored, with scales.

    Args:
        config: the architecture.
        format_of: how canonical tensors are kept; the others take 16 bits.
    """
    elements, stored = 0, 0.0
    for path, variable in nnx.to_flat_state(nnx.state(_abstract_model(config, 1), nnx.Param)):
        if path[0] != "layers" or variable.get_metadata("inputs") is None:
            continue
        for source, (outputs, inputs) in variable.get_metadata("layout").canonical_shapes().items():
            kept = format_of(".".join(map(str, (*path[:-2], source))))
            elements += outputs * inputs
            stored += outputs * (2 * inputs if kept is None else _row_bytes(kept, inputs))
    return stored / elements


def _row_bytes(kept: WeightFormat, inputs: int) -> float:
    groups = 1 if kept.group is None else math.ceil(inputs / kept.group)
    return inputs * dtype_bits(kept.values) / 8 + groups * (kept.scales.itemsize + kept.zeros)


def _abstract_model(config: ModelConfig, tp: int) -> Decoder:
    mesh = AbstractMesh((tp,), (AXIS,), axis_types=(AxisType.Auto,))
    with use_abstract_mesh(mesh):  # a parameter that declares a sharding needs a mesh, even without memory
        return nnx.eval_shape(lambda: Decoder(config, tp, jnp.dtype(jnp.bfloat16)))


@lru_cache(maxsize=256)
def _elements(config: ModelConfig, tp: int) -> Elements:
    kinds = tuple(dict.fromkeys(config.sparse_layers))
    mesh = AbstractMesh((tp,), (AXIS,), axis_types=(AxisType.Auto,))
    model = _abstract_model(_layers_of(config, kinds), tp)
    sums: dict[str, int] = {}
    for path, elements, matrix, outputs in _declared(model, mesh):
        name = _part(path) if matrix else "vectors"
        repeats = config.sparse_layers.count(kinds[int(path[1])]) if path[0] == "layers" else 1
        sums[name] = sums.get(name, 0) + elements * repeats
        sums["outputs"] = sums.get("outputs", 0) + outputs * repeats
    return Elements(**sums)


def _layers_of(config: ModelConfig, kinds: tuple[bool, ...]) -> ModelConfig:
    """Returns the architecture with one layer of each kind: with experts, and without."""
    return config.of_layers([config.sparse_layers.index(kind) for kind in kinds])


def _declared(model: Decoder, mesh: AbstractMesh) -> Iterator[tuple[tuple[Any, ...], int, bool, int]]:
    """Yields each parameter's path, elements on one device, whether it is a matrix, and its scales if any."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        layout, spec = variable.get_metadata("layout"), PartitionSpec(*variable.get_metadata("out_sharding"))
        one = layout.one if isinstance(layout, StackedLayout) else layout
        shard = NamedSharding(mesh, spec).shard_shape(layout.shape)
        inputs = variable.get_metadata("inputs") if path[0] == "layers" else None
        outputs = 0 if inputs is None else math.prod(shard) // shard[inputs]
        yield path, math.prod(shard), len(one.shape) > 1, outputs


def _part(path: tuple[Any, ...]) -> str:
    """Returns the field of :class:`Elements` that a matrix is counted in."""
    if path[0] != "layers":
        return "head" if path[0] == "lm_head" else "embedding"
    if path[2] == "self_attn":
        return "attention"
    return {"gate": "routers", "shared_expert_gate": "routers", "experts": "experts"}.get(path[3], "mlp")
