"""Mixture of experts: a router picks k experts for each token, and only their weights are read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from tpjax.attention import XLA, Backend
from tpjax.config import ExpertAxis, ModelConfig, MoEConfig
from tpjax.layers.experts import ExpertWeights, Routing, gated_expert, moe_of, routed_experts
from tpjax.layers.linear import dot
from tpjax.layers.weights import parameter, specs_of
from tpjax.mesh import AXIS
from tpjax.sharding import (
    PARTIAL_SUMS,
    REPLICATED,
    StackedLayout,
    WeightLayout,
    constrain,
    down_layout,
    gate_up_layout,
    tensor_layout,
)

# One spec per field of ExpertWeights. The bias that is added after the sum over F has no axis to shard.
_SPECS: dict[ExpertAxis, tuple[P, P, P, P]] = {
    "experts": (P(AXIS, None, None), P(AXIS, None, None), P(AXIS, None), P(AXIS, None)),
    "width": (P(None, None, AXIS), P(None, AXIS, None), P(None, AXIS), P(None, None)),
}


class GateProjection(nnx.Module):
    """A small replicated projection in float32: a rounded score would pick another expert.

    Args:
        name: canonical name, relative to the parent module.
        count: outputs.
        hidden: D.
        bias: the projection has a bias.
    """

    def __init__(self, name: str, count: int, hidden: int, *, bias: bool = False) -> None:
        weight = tensor_layout(f"{name}.weight", (count, hidden))
        self.weight = parameter(weight, REPLICATED, jnp.dtype(jnp.float32))
        self.bias = _float32_vector(f"{name}.bias", count) if bias else None

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N count"]:
        """Computes the scores of each token, float32."""
        # a TPU would multiply in bfloat16
        highest = jax.lax.Precision.HIGHEST
        scores = dot(x.astype(jnp.float32), self.weight[...], "nd,ed->ne", precision=highest)
        return scores if self.bias is None else scores + self.bias[...]


class Router(GateProjection):
    """Picks the experts of each token. Replicated: every device picks the same, without a collective."""

    def __init__(self, moe: MoEConfig, hidden: int) -> None:
        super().__init__("gate", moe.num_experts, hidden, bias=moe.router_bias)
        name = "gate.e_score_correction_bias"
        self.correction_bias = _float32_vector(name, moe.num_experts) if moe.correction_bias else None
        self.moe = moe

    def route(self, x: Float[Array, "N D"]) -> Routing:
        """Returns the k experts of each token, the highest routing score first, and their weights."""
        moe = self.moe
        logits = self(x)
        scores = jax.nn.softmax(logits) if moe.scoring == "softmax" else jax.nn.sigmoid(logits)
        routing_scores = scores if self.correction_bias is None else scores + self.correction_bias[...]
        if moe.num_groups > 1:
            routing_scores = jnp.where(self._in_best_groups(routing_scores), routing_scores, -jnp.inf)
        _, experts = jax.lax.top_k(routing_scores, moe.experts_per_token)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if moe.norm_topk_prob:
            # sigmoids may all be 0; the constant is DeepSeek's
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return Routing(experts, weights * moe.routed_scale)

    def _in_best_groups(self, routing_scores: Float[Array, "N E"]) -> Bool[Array, "N E"]:
        grouped = routing_scores.reshape(routing_scores.shape[0], self.moe.num_groups, -1)
        best_two, _ = jax.lax.top_k(grouped, 2)
        _, groups = jax.lax.top_k(best_two.sum(axis=-1), self.moe.groups_per_token)
        kept = jnp.any(groups[:, :, None] == jnp.arange(self.moe.num_groups), axis=1)
        return jnp.repeat(kept, grouped.shape[-1], axis=1)


class ExpertStack(nnx.Module):
    """The parameters of a stack of gated MLPs. Gate and up are fused as in ``MLP``; F is zero-padded.

    Args:
        name: canonical name of one expert, relative to the parent module; ``{}`` stands for its index.
        count: experts of the stack.
        width: F.
        hidden: D.
        tp: devices.
        sharded_axis: what is sharded: the ``experts``, or the ``width`` F of each.
        bias: the projections have biases.
        dtype: dtype of the weights.
    """

    def __init__(
        self,
        name: str,
        count: int,
        width: int,
        hidden: int,
        tp: int,
        sharded_axis: ExpertAxis,
        dtype: jnp.dtype,
        *,
        bias: bool = False,
    ) -> None:
        parts = tp if sharded_axis == "width" else 1
        gate_up = (f"{name}.gate_proj", f"{name}.up_proj")

        def stack(layout: WeightLayout, spec: P, inputs: int | None = None) -> nnx.Param:
            if inputs is not None:  # [in, out]: the order that grouped products take
                layout = layout.swapped()
            return parameter(StackedLayout(layout, count), spec, dtype, inputs=inputs)

        specs, down = _SPECS[sharded_axis], f"{name}.down_proj"
        gate_up_bias = gate_up_layout(gate_up, width, parts, None)
        self.gate_up_proj = stack(gate_up_layout(gate_up, width, parts, hidden), specs[0], inputs=1)
        self.down_proj = stack(down_layout(f"{down}.weight", width, parts, hidden), specs[1], inputs=1)
        self.gate_up_bias = stack(gate_up_bias, specs[2]) if bias else None
        self.down_bias = stack(tensor_layout(f"{down}.bias", (hidden,)), specs[3]) if bias else None
        self.sharded_axis = sharded_axis

    def weights(self) -> ExpertWeights:
        """Returns the arrays."""
        return ExpertWeights(
            self.gate_up_proj[...],
            self.down_proj[...],
            None if self.gate_up_bias is None else self.gate_up_bias[...],
            None if self.down_bias is None else self.down_bias[...],
        )

    def specs(self) -> Any:
        """Returns the specs of :meth:`weights`: an ``ExpertWeights`` of specs."""
        pairs: Any = zip(self.weights(), _SPECS[self.sharded_axis], strict=True)
        specs: Any = (None if weight is None else specs_of(weight, spec) for weight, spec in pairs)
        return ExpertWeights(*specs)


class MoE(nnx.Module):
    """Routed experts and, in some families, a shared expert that computes every token.

    Args:
        config: the architecture; ``config.moe`` is set.
        tp: devices.
        dtype: dtype of the experts' weights; the router is float32.
        backend: where it is a kernel for GPUs, so are the products of experts.
    """

    def __init__(self, config: ModelConfig, tp: int, dtype: jnp.dtype, backend: Backend = XLA) -> None:
        moe, hidden = moe_of(config), config.hidden_size
        self.gate = Router(moe, hidden)
        self.experts = ExpertStack(
            "experts.{}",
            moe.num_experts,
            moe.expert_width,
            hidden,
            tp,
            moe.sharded_axis(tp),
            dtype,
            bias=moe.expert_bias,
        )
        # a stack of one, sharded along its width: its partial sums join the all-reduce of the routed experts
        self.shared_expert = (
            ExpertStack("shared_expert", 1, moe.shared_width, hidden, tp, "width", dtype)
            if moe.shared_width
            else None
        )
        self.shared_expert_gate = GateProjection("shared_expert_gate", 1, hidden) if moe.shared_gate else None
        self.config = config
        self.backend = backend

    def __call__(self, x: Float[Array, "N D"], present: Bool[Array, " N"]) -> Float[Array, "*tp N D"]:
        """Returns each device's partial sum over the experts of each token; the caller reduces them.

        Args:
            x: tokens.
            present: whether each token is one: padding is routed to no expert.
        """
        x = constrain(x, REPLICATED)  # all-gather over tp with sequence parallelism
        with jax.named_scope("router"):
            routing = self.gate.route(x)
            nowhere = self.gate.moe.num_experts
            routing = routing._replace(experts=jnp.where(present[:, None], routing.experts, nowhere))
        shared = None if self.shared_expert is None else self.shared_expert.weights()
        shared_weight = jnp.ones((len(x), 1), jnp.float32)
        if self.shared_expert_gate is not None:
            shared_weight = jax.nn.sigmoid(self.shared_expert_gate(x))
        partial_sums = jax.shard_map(
            self._partial_sum,
            in_specs=(
                REPLICATED,
                REPLICATED,
                self.experts.specs(),
                REPLICATED,
                None if self.shared_expert is None else self.shared_expert.specs(),
            ),
            out_specs=PARTIAL_SUMS,
            check_vma=False,
        )(x, routing, self.experts.weights(), shared_weight, shared)
        # a parallel block adds the partial sums of attention before it reduces them
        return partial_sums if self.config.parallel else jax.lax.reduce_sum(partial_sums, (0,))

    def _partial_sum(
        self,
        x: Float[Array, "N D"],
        routing: Routing,
        experts: ExpertWeights,
        shared_weight: Float[Array, "N 1"],
        shared: ExpertWeights | None,
    ) -> Float[Array, "1 N D"]:
        """Computes on one device its experts, or its part of the width of each expert."""
        device = jax.lax.axis_index(AXIS)
        if self.experts.sharded_axis == "experts":
            local = experts.gate_up.shape[0]
            routing = routing._replace(experts=routing.experts - device * local)
        elif experts.down_bias is not None:  # replicated: added on one device only
            experts = experts._replace(down_bias=jnp.where(device == 0, experts.down_bias, 0))
        with jax.named_scope("experts"):
            total = routed_experts(x, routing, experts, self.config, self.backend)
        if shared is not None:
            with jax.named_scope("shared_expert"):
                one = jax.tree.map(lambda stack: stack[0], shared)
                total = total + shared_weight * gated_expert(x, one, self.config).astype(jnp.float32)
        return total.astype(x.dtype)[None]


def _float32_vector(name: str, size: int) -> nnx.Param:
    return parameter(tensor_layout(name, (size,)), REPLICATED, jnp.dtype(jnp.float32))
