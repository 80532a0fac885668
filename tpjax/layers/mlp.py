"""The MLP, with a gate (Shazeer 2020, https://arxiv.org/abs/2002.05202) or without."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tpjax.activations import activate
from tpjax.config import MLPConfig
from tpjax.layers.linear import Linear, RowLinear
from tpjax.sharding import (
    COLUMN,
    FEATURES,
    REPLICATED,
    constrain,
    down_layout,
    gate_up_layout,
    tensor_layout,
)


class MLP(nnx.Module):
    """Column-parallel gate and up, fused; row-parallel down. F is zero-padded to a multiple of tp.

    ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` if the MLP has no gate. The outputs of the fused
    product are ordered by device, [tp, 2, F / tp]: each device holds gate and up of the same features.

    Args:
        config: width, activation, gate and biases.
        hidden: D.
        tp: devices.
        dtype: dtype of weights and activations.
        partial_sums: returns partial sums for the caller to reduce together with others.
    """

    def __init__(
        self, config: MLPConfig, hidden: int, tp: int, dtype: jnp.dtype, *, partial_sums: bool
    ) -> None:
        width = config.intermediate_size
        modules = ("gate_proj", "up_proj") if config.gated else ("up_proj",)
        projection = Linear(
            gate_up_layout(modules, width, tp, hidden),
            gate_up_layout(modules, width, tp, None) if config.bias else None,
            COLUMN,
            dtype,
        )
        if config.gated:
            self.gate_up_proj = projection
        else:
            self.up_proj = projection
        self.down_proj = RowLinear(
            down_layout("down_proj.weight", width, tp, hidden),
            tensor_layout("down_proj.bias", (hidden,)) if config.bias else None,
            dtype,
            partial_sums=tp if partial_sums else None,
        )
        self.activation = config.activation
        self.gated = config.gated

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "*tp N D"]:
        """Returns each device's partial sum over F; the caller reduces them."""
        x = constrain(x, REPLICATED)  # all-gather over tp with sequence parallelism
        if self.gated:
            # on each device: of an axis of its own for gate and up, a TPU would make a copy
            gate = jax.shard_map(self._gate, in_specs=FEATURES, out_specs=FEATURES, check_vma=False)
            inner = gate(self.gate_up_proj(x))
        else:
            inner = activate(self.up_proj(x), self.activation)
        return self.down_proj(inner)

    def _gate(self, gate_up: Float[Array, "N F2"]) -> Float[Array, "N F2//2"]:
        """Multiplies the features of one device by their gates."""
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return activate(gate, self.activation) * up
