"""Counts the elements of a model that one device holds, and the FLOPs of its attention.

Weights are read off the abstract decoder: the declarations in its layers say what is sharded, replicated and
padded at any tp. It is built with one layer of each kind, since equal layers hold equal amounts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

from tpjax.cache import cache_layout
from tpjax.checkpoints.canonical import ENDS
from tpjax.config import ExpertAxis, ModelConfig, Quantize
from tpjax.layers.weights import (
    FormatOf,
    WeightFormat,
    dtype_bits,
    quantize_weights,
    rounded_format,
)
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
        format_of: how a checkpoint keeps its canonical tensors in 8 or 4 bits; ``None``: none are.
    """

    name: str
    config: ModelConfig
    format_of: FormatOf | None = None

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
        return _elements(self._sharded(expert_axis), tp)

    def bytes_on_device(
        self,
        tp: int,
        expert_axis: ExpertAxis,
        dtype: jnp.dtype,
        quantize: Quantize | None = None,
        *,
        stored: bool = False,
        platform: str = "cpu",
    ) -> WeightBytes:
        """Counts the bytes of the weights on one of ``tp`` devices, scales and zero points included.

        Args:
            tp: number of devices.
            expert_axis: as in :meth:`on_device`.
            dtype: dtype of what is not quantised; routers and a few vectors are float32 in any case.
            quantize: what the matrices of attention, MLPs and experts are kept in; ``None``: ``dtype``.
            stored: without ``quantize``: they are kept as :attr:`format_of` says.
            platform: of the devices, which decides how 4 bits are kept.
        """
        format_of = self.format_of if stored and quantize is None else None
        return _bytes(self._sharded(expert_axis), tp, jnp.dtype(dtype), quantize, format_of, platform)

    def _sharded(self, expert_axis: ExpertAxis) -> ModelConfig:
        if self.config.moe is None:
            return self.config
        return self.config.with_expert_parallel("on" if expert_axis == "experts" else "off")

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
            *self._expanded_flops(tp),
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

    def _expanded_flops(self, tp: int) -> tuple[int | None, int]:
        """Counts the FLOPs of a query with a key that is expanded from its latent, and of expanding one."""
        attention, latent = self.config.attention, self.config.attention.latent
        if latent is None:
            return None, 0
        heads, value_dim = math.ceil(attention.num_heads / tp), latent.v_head_dim
        key_dim = attention.head_dim - self.config.rotated_dim
        return (
            2 * heads * (attention.head_dim + value_dim),
            2 * heads * (key_dim + value_dim) * latent.kv_lora_rank,
        )


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights on one device.

    Attributes:
        parts: of each kind of weight.
        layers: of each layer.
        first: of what the first layer's device has before it: embedding and positions.
        last: of what the last layer's device has behind it: norm and head; a tied one is in ``first`` alone.
    """

    parts: Elements
    layers: tuple[int, ...]
    first: int
    last: int


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


def _mesh(tp: int) -> AbstractMesh:
    return AbstractMesh((tp,), (AXIS,), axis_types=(AxisType.Auto,))


def _abstract_model(
    config: ModelConfig,
    tp: int,
    dtype: jnp.dtype | None = None,
    format_of: FormatOf | None = None,
    platform: str = "cpu",
) -> Decoder:
    def declared() -> Decoder:
        model = Decoder(config, tp, dtype or jnp.dtype(jnp.bfloat16))
        if format_of is not None:
            quantize_weights(model, format_of, tp, platform)
        return model

    with use_abstract_mesh(_mesh(tp)):  # a parameter that declares a sharding needs one, even without memory
        return nnx.eval_shape(declared)


@lru_cache(maxsize=256)
def _elements(config: ModelConfig, tp: int) -> Elements:
    alike = _layers_alike(config, None)
    model = _abstract_model(config.of_layers([layers[0] for layers in alike]), tp)
    sums: dict[str, int] = {}
    for path, matrix, count, _ in _declared(model, tp):
        name = _part(path) if matrix else "vectors"
        sums[name] = sums.get(name, 0) + count * _repeats(path, alike)
    return Elements(**sums)


@lru_cache(maxsize=256)
def _bytes(
    config: ModelConfig,
    tp: int,
    dtype: jnp.dtype,
    quantize: Quantize | None,
    format_of: FormatOf | None,
    platform: str,
) -> WeightBytes:
    alike = _layers_alike(config, format_of)
    first = [layers[0] for layers in alike]

    def kept(name: str) -> WeightFormat | None:
        if name in ENDS:
            return None
        if quantize is not None:
            return rounded_format(quantize)
        return None if format_of is None else _renumbered(format_of, first)(name)

    sums: dict[str, int] = {}
    ends, layers = {"first": 0, "last": 0}, [0] * config.num_layers
    for path, matrix, count, bits in _declared(
        _abstract_model(config.of_layers(first), tp, dtype, kept, platform), tp
    ):
        name, size = _part(path) if matrix else "vectors", count * bits // 8
        sums[name] = sums.get(name, 0) + size * _repeats(path, alike)
        if path[0] != "layers":
            ends["first" if path[0] in ("embed_tokens", "embed_positions") else "last"] += size
            continue
        for number in alike[int(str(path[1]))]:
            layers[number] += size
    return WeightBytes(Elements(**sums), tuple(layers), **ends)


def _layers_alike(config: ModelConfig, format_of: FormatOf | None) -> list[list[int]]:
    """Returns the numbers of the layers that declare the same: have experts, and are kept in one format."""
    by_kind: dict[Any, list[int]] = {}
    for number, sparse in enumerate(config.sparse_layers):
        by_kind.setdefault(sparse, []).append(number)
    if format_of is None:
        return list(by_kind.values())
    alike: dict[Any, list[int]] = {}
    for layers in by_kind.values():
        names = _canonical_names(_abstract_model(config.of_layers(layers[:1]), 1))
        for number in layers:
            formats = tuple(map(_renumbered(format_of, [number]), names))
            alike.setdefault((config.sparse_layers[number], formats), []).append(number)
    return list(alike.values())


def _canonical_names(model: Decoder) -> list[str]:
    """Returns the names of the canonical tensors that a model's layers may keep in 8 or 4 bits."""
    return [
        ".".join(map(str, (*path[:-2], source)))
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
        if path[0] == "layers" and variable.get_metadata("inputs") is not None
        for source in variable.get_metadata("layout").canonical_shapes()
    ]


def _renumbered(format_of: FormatOf, layers: Sequence[int]) -> FormatOf:
    """Returns the formats of a model that has only these layers of the one that ``format_of`` knows."""

    def renumbered(name: str) -> WeightFormat | None:
        first, _, rest = name.partition(".")
        if first != "layers":
            return format_of(name)
        number, _, rest = rest.partition(".")
        return format_of(f"layers.{layers[int(number)]}.{rest}")

    return renumbered


def _declared(model: Decoder, tp: int) -> Iterator[tuple[tuple[Any, ...], bool, int, int]]:
    """Yields each parameter's path, whether a matrix has it, and its elements on a device and their bits."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        layout, spec = variable.get_metadata("layout"), PartitionSpec(*variable.get_metadata("out_sharding"))
        count = math.prod(NamedSharding(_mesh(tp), spec).shard_shape(layout.shape))
        one = layout.one if isinstance(layout, StackedLayout) else layout
        # the scales of a quantised matrix are counted with it
        yield path, len(one.shape) > 1 or path[-1] in _QUANTIZED, count, dtype_bits(variable.dtype)


def _repeats(path: tuple[Any, ...], alike: Sequence[Sequence[int]]) -> int:
    """Returns how many layers a parameter stands for, given the numbers of those that each layer does."""
    return len(alike[int(str(path[1]))]) if path[0] == "layers" else 1


_QUANTIZED = ("values", "scales", "zeros")  # attributes of QuantizedParameter


def _part(path: tuple[Any, ...]) -> str:
    """Returns the field of :class:`Elements` that a matrix is counted in."""
    if path[0] != "layers":
        return {"lm_head": "head", "embed_tokens": "embedding"}.get(path[0], "vectors")
    if path[2] == "self_attn":
        return "attention"
    return {"gate": "routers", "shared_expert_gate": "routers", "experts": "experts"}.get(path[3], "mlp")
