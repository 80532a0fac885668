"""The computation of routed experts: rows sorted by expert, and grouped products.

No token is dropped and nothing is approximated. Assignments of tokens to experts are sorted by expert, each
expert computes its run of rows, and the results are weighted and summed. ``reference_experts`` is the
definition that the grouped products are held to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpjax.activations import activate
from tpjax.attention import XLA, Backend
from tpjax.config import ModelConfig, MoEConfig
from tpjax.errors import ConfigError
from tpjax.layers.linear import dot, grouped_dot
from tpjax.layers.weights import QuantizedWeight, Weight
from tpjax.layers.widening import tpu_kernel_takes

# Rows that an expert computes at once: enough to amortise reading its weights, few enough that an expert's
# last tile, which is rarely full, wastes little.
_TILE_ROWS = 64


class Routing(NamedTuple):
    """The experts of each token.

    Attributes:
        experts: index of each expert.
        weights: multiplies the output of each expert, float32.
    """

    experts: Int[Array, "N k"]
    weights: Float[Array, "N k"]


class ExpertWeights(NamedTuple):
    """Arrays of a stack of experts, or of one of them: then without the first axis. F2 is twice F."""

    gate_up: Weight  # [E, D, F2]
    down: Weight  # [E, F2 / 2, D]
    gate_up_bias: Float[Array, "E F2"] | None
    down_bias: Float[Array, "E D"] | None

    def of(self, expert: Int[Array, ""], rows: Float[Array, "T D"]) -> ExpertWeights:
        """Returns the weights of one expert; those that a kernel reads from the stack stay in it.

        Args:
            expert: its number.
            rows: what it computes.
        """

        def indexed(weights: Any) -> Any:
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, expert, keepdims=False), weights)

        def own(weight: Weight) -> Weight:
            if (
                isinstance(weight, QuantizedWeight)
                and rows.dtype == jnp.bfloat16
                and tpu_kernel_takes(weight, len(rows))
            ):
                return replace(weight, number=expert)
            one: Weight = indexed(weight)
            return one

        return ExpertWeights(
            own(self.gate_up), own(self.down), indexed(self.gate_up_bias), indexed(self.down_bias)
        )


class Matrices(NamedTuple):
    """What the products of routed experts depend on, on a device.

    Attributes:
        hidden: D.
        width: F of an expert, or of the part of it that is here.
        dtype: of the weights.
    """

    hidden: int
    width: int
    dtype: str

    @property
    def kernel_takes(self) -> bool:
        """Whether the kernel for GPUs multiplies by them: of 16 bits, in whole rows of its layout."""
        from tpjax.layers.experts_gpu import (
            supports,
        )  # Pallas is imported where it is used: that takes a while

        return supports(self.hidden, self.width, jnp.dtype(self.dtype))


def gated_expert(x: Float[Array, "T D"], expert: ExpertWeights, config: ModelConfig) -> Float[Array, "T D"]:
    """Computes one expert on some rows."""
    gate_up = dot(x, expert.gate_up, "td,df->tf")
    if expert.gate_up_bias is not None:
        gate_up = gate_up + expert.gate_up_bias
    out = dot(_glu(gate_up, config), expert.down, "tf,fd->td")
    return out if expert.down_bias is None else out + expert.down_bias


def routed_experts(
    x: Float[Array, "N D"],
    routing: Routing,
    experts: ExpertWeights,
    config: ModelConfig,
    backend: Backend = XLA,
) -> Float[Array, "N D"]:
    """Computes the weighted sum of the outputs of each token's experts, float32.

    Args:
        x: tokens.
        routing: experts, counted from the first of this stack; those outside of it are on other devices, or
            none, for padding.
        experts: the stack.
        config: the architecture.
        backend: where it is a kernel for GPUs, so is the grouped product.
    """
    count = experts.gate_up.shape[0]
    local = (routing.experts >= 0) & (routing.experts < count)
    assigned = jnp.where(local, routing.experts, count)
    if backend.name == "gpu" and backend.experts and _kernel_multiplies(experts):
        out = _experts_by_kernel(x, assigned, experts, config, backend.interpret)
    else:
        out = _experts_in_order(x, assigned, experts, config)
    outputs = jnp.where(
        local[..., None], out.astype(jnp.float32), 0
    )  # rows of other devices were not computed
    return jnp.einsum("nk,nkd->nd", routing.weights, outputs, precision=jax.lax.Precision.HIGHEST)


def _experts_in_order(
    x: Float[Array, "N D"], assigned: Int[Array, "N k"], experts: ExpertWeights, config: ModelConfig
) -> Float[Array, "N k D"]:
    """Computes each assignment of a token to an expert, by rows sorted by expert."""
    count, per_token = experts.gate_up.shape[0], assigned.shape[1]
    flat = assigned.reshape(-1)
    order = jnp.argsort(flat)  # experts of other devices come last
    group_sizes = jnp.zeros(count, jnp.int32).at[flat].add(1, mode="drop")
    # A grouped product is one instruction on TPU and GPU. XLA's CPU backend computes it for every expert, and
    # a TPU would first write experts of 8 bits to memory in 16 bits: 350 MB a layer of Mixtral at tp=8. It
    # takes no scales for groups of inputs.
    tiled = partial(tiled_experts, config=config, tile=min(len(x), _TILE_ROWS))
    ragged = partial(ragged_experts, config=config)
    quantized = [one for one in (experts.gate_up, experts.down) if isinstance(one, QuantizedWeight)]
    tpu = tiled if quantized else ragged
    default = ragged if all(one.per_output for one in quantized) else tiled
    out = jax.lax.platform_dependent(
        x[order // per_token], group_sizes, experts, cpu=tiled, tpu=tpu, default=default
    )
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    return out[inverse].reshape(*assigned.shape, -1)


def _experts_by_kernel(
    x: Float[Array, "N D"],
    assigned: Int[Array, "N k"],
    experts: ExpertWeights,
    config: ModelConfig,
    interpret: Any,
) -> Float[Array, "N k D"]:
    """Computes what :func:`_experts_in_order` computes, by the kernel for Hopper GPUs."""
    from tpjax.layers import experts_gpu

    count = experts.gate_up.shape[0]
    tiles = experts_gpu.lay_out(assigned, count, moe_of(config).num_experts)
    of_place = jnp.repeat(tiles.experts, tiles.size)

    def product(x: Float[Array, "rows D"], weights: Weight) -> Float[Array, "places F"]:
        assert not isinstance(weights, QuantizedWeight)
        return experts_gpu.grouped_product(x, weights, tiles, interpret=interpret)

    return _grouped_experts(tiles.take(x), experts, of_place, product, config)[tiles.places]


def tiled_experts(
    x: Float[Array, "M D"],
    group_sizes: Int[Array, " E"],
    experts: ExpertWeights,
    *,
    config: ModelConfig,
    tile: int,
) -> Float[Array, "M D"]:
    """Computes each expert on its run of rows, in a loop over tiles of rows.

    An expert without rows has no tile and costs nothing.

    Args:
        x: rows sorted by expert.
        group_sizes: rows of each expert; the outputs of further rows of ``x`` are undefined.
        experts: the stack.
        config: the architecture.
        tile: rows of a tile.
    """
    num_tiles = -(-group_sizes // tile)
    last_tiles, last_rows = jnp.cumsum(num_tiles), jnp.cumsum(group_sizes)

    def one_tile(i: Int[Array, ""], out: Float[Array, "M D"]) -> Float[Array, "M D"]:
        expert = jnp.searchsorted(last_tiles, i, side="right")
        before = last_tiles[expert] - num_tiles[expert]
        start = last_rows[expert] - group_sizes[expert] + (i - before) * tile
        rows = jax.lax.dynamic_slice_in_dim(padded, start, tile)
        # rows beyond this expert's are the next expert's, which overwrites them
        return jax.lax.dynamic_update_slice_in_dim(
            out, gated_expert(rows, experts.of(expert, rows), config), start, axis=0
        )

    padded = jnp.pad(x, ((0, tile), (0, 0)))
    return jax.lax.fori_loop(0, last_tiles[-1], one_tile, jnp.zeros_like(padded))[: x.shape[0]]


def ragged_experts(
    x: Float[Array, "M D"], group_sizes: Int[Array, " E"], experts: ExpertWeights, *, config: ModelConfig
) -> Float[Array, "M D"]:
    """Computes what :func:`tiled_experts` computes, as two grouped products."""
    expert = jnp.repeat(jnp.arange(group_sizes.size), group_sizes, total_repeat_length=x.shape[0])
    return _grouped_experts(
        x, experts, expert, lambda x, weights: grouped_dot(x, weights, group_sizes), config
    )


def _grouped_experts(
    x: Float[Array, "rows D"],
    experts: ExpertWeights,
    of_row: Int[Array, " M"],
    product: Callable[[Array, Weight], Array],
    config: ModelConfig,
) -> Float[Array, "M D"]:
    """Computes the expert of each row, given the product of all rows with the weights of their experts.

    The rows that come out may be more than those of ``x``: each of these then counts for several experts.
    """
    gate_up = product(x, experts.gate_up)
    if experts.gate_up_bias is not None:
        gate_up = gate_up + experts.gate_up_bias[of_row]
    out = product(_glu(gate_up, config), experts.down)
    return out if experts.down_bias is None else out + experts.down_bias[of_row]


def expert_matrices(config: ModelConfig, tp: int, dtype: jnp.dtype) -> Matrices | None:
    """Returns the matrices of routed experts on a device; ``None``: there are none.

    Args:
        config: the architecture.
        tp: devices.
        dtype: of weights that are not quantised.
    """
    if config.moe is None:
        return None
    parts = tp if config.moe.sharded_axis(tp) == "width" else 1
    return Matrices(config.hidden_size, -(-config.moe.expert_width // parts), str(dtype))


def _kernel_multiplies(experts: ExpertWeights) -> bool:
    """Returns whether the kernel for GPUs takes such weights."""
    gate_up, down = experts.gate_up, experts.down
    if isinstance(gate_up, QuantizedWeight) or isinstance(down, QuantizedWeight):
        return False
    return Matrices(gate_up.shape[1], down.shape[1], str(down.dtype)).kernel_takes


def reference_experts(
    x: Float[Array, "N D"], routing: Routing, experts: ExpertWeights, config: ModelConfig
) -> Float[Array, "N D"]:
    """Computes :func:`routed_experts` as defined: every expert on every token, most of them weighted by 0."""
    outputs = jax.vmap(lambda expert: gated_expert(x, expert, config))(experts)
    count = experts.gate_up.shape[0]
    weights = jnp.zeros((x.shape[0], count), jnp.float32)
    for choice in range(routing.experts.shape[1]):
        chosen = routing.experts[:, choice, None] == jnp.arange(count)
        weights = weights + jnp.where(chosen, routing.weights[:, choice, None], 0)
    return jnp.einsum("ne,end->nd", weights, outputs.astype(jnp.float32))


def _glu(gate_up: Float[Array, "T F2"], config: ModelConfig) -> Float[Array, "T F2//2"]:
    moe = moe_of(config)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    if moe.swiglu_limit is None:
        return activate(gate, config.mlp.activation) * up
    gate = jnp.minimum(gate, moe.swiglu_limit)
    up = jnp.clip(up, -moe.swiglu_limit, moe.swiglu_limit)
    return (up + 1) * gate * jax.nn.sigmoid(gate * moe.swiglu_alpha)


def moe_of(config: ModelConfig) -> MoEConfig:
    """Returns the configuration of the experts.

    Raises:
        ConfigError: the model has no experts.
    """
    if config.moe is None:
        raise ConfigError(f"{config.model_type} has no mixture of experts: moe=None")
    return config.moe
