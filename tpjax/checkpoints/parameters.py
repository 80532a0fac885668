"""The parameters that a model declares: their shapes, dtypes, shardings and canonical tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from tpjax.attention import XLA, Backend
from tpjax.checkpoints.canonical import ENDS
from tpjax.config import ModelConfig, Quantize
from tpjax.layers.weights import (
    FormatOf,
    QuantizedParameter,
    WeightFormat,
    dtype_bits,
    quantize_weights,
    rounded_format,
)
from tpjax.model import Decoder
from tpjax.sharding import Layout

_LAYER = re.compile(r"layers\.(\d+)(?=\.)")


def abstract_decoder(
    config: ModelConfig,
    mesh: Mesh,
    dtype: jnp.dtype,
    quantize: Quantize | None = None,
    backend: Backend = XLA,
    format_of: FormatOf | None = None,
    layers: range | None = None,
    quantize_head: bool = False,
) -> Decoder:
    """Returns the model, or a pipeline stage's part of it, with shapes, dtypes and shardings, without memory.

    Args:
        config: the architecture.
        mesh: ``("tp",)``.
        dtype: dtype of activations, and of weights that are not quantised.
        quantize: what the weights of attention, MLPs and experts are kept in; ``None``: ``dtype``.
        backend: what computes attention.
        format_of: without ``quantize``: how canonical tensors are kept, as a checkpoint stores them.
        layers: numbers of the stage's layers; ``None``: all.
        quantize_head: embedding and head are kept so too, not in ``dtype``.
    """
    first = 0 if layers is None else layers.start

    def kept(name: str) -> WeightFormat | None:
        head = name in ENDS
        if head and not quantize_head:
            return None
        if quantize is not None:
            return rounded_format(quantize, head=head)
        return None if format_of is None else format_of(_renumbered(name, first))

    def declared() -> Decoder:
        model = Decoder(config, mesh.size, dtype, backend, layers)
        model.quantize = quantize
        quantize_weights(model, kept, mesh.size, mesh.devices.flat[0].platform, backend)
        return model

    with jax.set_mesh(mesh):  # a parameter that declares a sharding needs a mesh, even without memory
        model = nnx.eval_shape(declared)
    return with_values(
        model,
        {
            parameter.path: jax.ShapeDtypeStruct(
                parameter.layout.shape, parameter.dtype, sharding=parameter.sharding
            )
            for parameter in parameters(model, mesh)
        },
    )


@dataclass(frozen=True)
class Parameter:
    """A declared parameter, as the loader and ``explain`` see it.

    Attributes:
        path: attribute names from the model's root.
        attribute: those of the owning module's attribute: of the values and scales of a quantised weight, the
            weight's.
        layout: the canonical tensors it is made of.
        sharding: the devices of its slices.
        dtype: dtype on the devices.
        quantized: the quantised weight whose values, scales or zero points it holds; ``None``: of none.
        first_layer: number of the model's layer that the path calls layer 0.
    """

    path: tuple[Any, ...]
    attribute: tuple[Any, ...]
    layout: Layout
    sharding: NamedSharding
    dtype: jnp.dtype
    quantized: QuantizedParameter | None = None
    first_layer: int = 0

    @property
    def name(self) -> str:
        """Dotted path."""
        return ".".join(map(str, self.path))

    @property
    def is_quantized(self) -> bool:
        """Whether it holds the values of a quantised weight."""
        return self.quantized is not None and self.path[-1] == "values"

    @property
    def is_scales(self) -> bool:
        """Whether it holds the scales or zero points of a quantised weight."""
        return self.quantized is not None and not self.is_quantized

    @property
    def bytes_per_device(self) -> int:
        """Bytes of one device's slice."""
        return math.prod(self.sharding.shard_shape(self.layout.shape)) * dtype_bits(self.dtype) // 8

    def canonical(self, source: str) -> str:
        """Returns the canonical name of a source of the layout, which is relative to the owner's parent."""
        return _renumbered(".".join(map(str, (*self.attribute[:-2], source))), self.first_layer)


def _renumbered(name: str, first: int) -> str:
    """Returns the canonical name of a tensor whose layer is numbered from layer ``first``."""
    if not first or not (layer := _LAYER.match(name)):
        return name
    return f"layers.{int(layer[1]) + first}{name[layer.end() :]}"


def parameters(model: Decoder, mesh: Mesh) -> list[Parameter]:
    """Returns every parameter that the model declares, in the order of its state's leaves."""
    state = nnx.state(model, nnx.Param)
    shardings = dict(nnx.to_flat_state(nnx.get_named_sharding(state, mesh)))
    quantized = {
        path: module for path, module in nnx.iter_modules(model) if isinstance(module, QuantizedParameter)
    }

    def declared(path: tuple[Any, ...], variable: nnx.Param) -> Parameter:
        owner = quantized.get(path[:-1])
        return Parameter(
            path,
            path if owner is None else path[:-1],
            variable.get_metadata("layout"),
            shardings[path].get_value(),
            variable.dtype,
            owner,
            model.layer_range.start,
        )

    return [declared(path, variable) for path, variable in nnx.to_flat_state(state)]


def with_values(model: Decoder, values: Mapping[tuple[Any, ...], Any]) -> Decoder:
    """Gives each parameter its value, by path: an array, or a shape."""
    state = nnx.state(model, nnx.Param)
    filled = [(path, variable.replace(values[path])) for path, variable in nnx.to_flat_state(state)]
    nnx.update(model, nnx.from_flat_state(filled))
    return model
