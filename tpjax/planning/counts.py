"""How many elements of a model one device holds, and what attention computes, by ``ModelConfig``.

Weights are read off the abstract decoder: the layers' own declarations say what is sharded, replicated and
padded at any tp. It is built with one layer of each kind, since equal layers hold equal amounts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

from tpjax.cache import cache_layout
from tpjax.config import ExpertAxis, ModelConfig
from tpjax.mesh import AXIS
from tpjax.model import Decoder
from tpjax.sharding import PAGES, HeadPlan, StackedLayout


@dataclass(frozen=True)
class Elements:
    """Elements that one device holds, all layers together.

    Attributes:
        attention: matrices of attention.
        mlp: matrices of the MLPs that every token goes through, a mixture's shared expert included.
        routers: matrices that score experts, replicated.
        experts: matrices of the routed experts.
        vectors: norms, biases and whatever else is no matrix.
        embedding: the token embedding.
        head: the vocabulary projection; 0 where the embedding is tied to it.
    """

    attention: int = 0
    mlp: int = 0
    routers: int = 0
    experts: int = 0
    vectors: int = 0
    embedding: int = 0
    head: int = 0

    @property
    def layer_matrices(self) -> int:
        """All matrices of the decoder layers."""
        return self.attention + self.mlp + self.routers + self.experts

    @property
    def total(self) -> int:
        """All of them."""
        return self.layer_matrices + self.vectors + self.embedding + self.head


@dataclass(frozen=True)
class Counts:
    """A named architecture, counted.

    Attributes:
        name: of the model.
        config: the architecture.
    """

    name: str
    config: ModelConfig

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        return self.on_device(1).total

    @property
    def active_parameters(self) -> int:
        """Elements of the matrices that one token is multiplied by."""
        held, moe = self.on_device(1), self.config.moe
        routed = held.experts * moe.experts_per_token // moe.num_experts if moe else 0
        return held.attention + held.mlp + held.routers + routed + (held.head or held.embedding)

    @property
    def expert_layers(self) -> int:
        """Layers with a mixture of experts."""
        return sum(self.config.sparse_layers)

    @property
    def window_layers(self) -> int:
        """Layers whose attention sees a sliding window."""
        sliding = self.config.layer_types.count("sliding_attention")
        return sliding if self.config.sliding_window else 0

    def on_device(self, tp: int, cut: ExpertAxis = "width") -> Elements:
        """What one of ``tp`` devices holds.

        Args:
            tp: devices.
            cut: whether each expert's width is sharded, or whole experts are.
        """
        config = self.config
        if config.moe is not None:
            config = config.with_expert_parallel("on" if cut == "experts" else "off")
        return _elements(config, tp)

    def cache_elements(self, tp: int) -> int:
        """Cache elements of one token in one layer on one device. A latent cache is replicated."""
        layout = cache_layout(self.config, tp, 1, 1)
        return layout.count * math.prod(layout.shape) // (tp if layout.spec == PAGES else 1)

    def attention_flops(self, tp: int) -> int:
        """FLOPs of one query of one layer with one key and its value on one device, all its heads."""
        config = self.config
        if config.latent is not None:  # scores and weighted sums in the latent space
            dims = 2 * config.latent.kv_lora_rank + config.rotated_dim
            return 2 * math.ceil(config.num_heads / tp) * dims
        plan = HeadPlan(config.num_heads, config.num_kv_heads, tp)
        return 4 * plan.slots_per_device * plan.group_size * config.head_dim


@lru_cache(maxsize=256)
def _elements(config: ModelConfig, tp: int) -> Elements:
    kinds = tuple(dict.fromkeys(config.sparse_layers))
    mesh = AbstractMesh((tp,), (AXIS,), axis_types=(AxisType.Auto,))
    with use_abstract_mesh(mesh):  # a parameter that declares a sharding needs a mesh, even without memory
        model = nnx.eval_shape(lambda: Decoder(_layers_of(config, kinds), tp, jnp.dtype(jnp.bfloat16)))
    sums: dict[str, int] = {}
    for path, elements, matrix in _declared(model, mesh):
        name = _part(path) if matrix else "vectors"
        repeats = config.sparse_layers.count(kinds[int(path[1])]) if path[0] == "layers" else 1
        sums[name] = sums.get(name, 0) + elements * repeats
    return Elements(**sums)


def _layers_of(config: ModelConfig, kinds: tuple[bool, ...]) -> ModelConfig:
    """The same architecture with one layer of each kind: with experts, or without."""
    chosen = [config.sparse_layers.index(kind) for kind in kinds]
    return replace(
        config,
        num_layers=len(chosen),
        layer_types=tuple(config.layer_types[i] for i in chosen),
        rope_layers=config.rope_layers and tuple(config.rope_layers[i] for i in chosen),
        moe=config.moe and replace(config.moe, sparse_layers=kinds),
    )


def _declared(model: Decoder, mesh: AbstractMesh) -> Iterator[tuple[tuple[Any, ...], int, bool]]:
    """Path of each parameter, its elements on one device, and whether it is a matrix."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        layout, spec = variable.get_metadata("layout"), PartitionSpec(*variable.get_metadata("out_sharding"))
        one = layout.one if isinstance(layout, StackedLayout) else layout
        shard = NamedSharding(mesh, spec).shard_shape(layout.shape)
        yield path, math.prod(shard), len(one.shape) > 1


def _part(path: tuple[Any, ...]) -> str:
    """The field of :class:`Elements` that a matrix counts to."""
    if path[0] != "layers":
        return "head" if path[0] == "lm_head" else "embedding"
    if path[2] == "self_attn":
        return "attention"
    return {"gate": "routers", "shared_expert_gate": "routers", "experts": "experts"}.get(path[3], "mlp")
