"""The MLP, gated (Shazeer 2020, https://arxiv.org/abs/2002.05202) or not."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from tpjax.config import Activation, ModelConfig
from tpjax.layers.linear import ColumnLinear, RowLinear
from tpjax.mesh import AXIS
from tpjax.sharding import (
    REPLICATED,
    Segment,
    column_layout,
    constrain,
    pad_to_multiple,
    row_layout,
    tensor_layout,
)


def activate(x: Float[Array, "*batch F"], kind: Activation) -> Float[Array, "*batch F"]:
    """The MLP's non-linearity; every one of them is 0 at 0, so that padding stays 0."""
    match kind:
        case "silu":
            return jax.nn.silu(x)
        case "relu":
            return jax.nn.relu(x)
        case _:
            return jax.nn.gelu(x, approximate=kind == "gelu_tanh")


def fused_segments(names: Sequence[str], width: int, parts: int) -> tuple[list[Segment], dict[str, int]]:
    """Tensors of width F in the order [parts, tensors, F / parts], so that a part holds the same of each.

    Args:
        names: canonical tensors: gate and up, or up alone.
        width: F; padded with zeros to a multiple of ``parts``.
        parts: devices that F is cut over.
    """
    share = pad_to_multiple(width, parts) // parts
    cuts = [
        Segment(name, part * share, min(share, width - part * share), (len(names) * part + place) * share)
        for part in range(parts)
        for place, name in enumerate(names)
        if part * share < width
    ]
    return cuts, dict.fromkeys(names, width)


class MLP(nnx.Module):
    """Column-parallel gate and up, fused; row-parallel down. F is zero-padded to a multiple of tp.

    ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where the MLP has no gate. The fused product's
    outputs lie device by device: [tp, 2, F / tp], so that a device's slice holds the gate and the up of the
    same features.
    """

    def __init__(self, config: ModelConfig, tp: int, dtype: jnp.dtype) -> None:
        hidden, width = config.hidden_size, config.intermediate_size
        padded = pad_to_multiple(width, tp)
        parts = ("gate_proj", "up_proj") if config.gated_mlp else ("up_proj",)

        def cuts(kind: str) -> tuple[list[Segment], dict[str, int]]:
            return fused_segments([f"{part}.{kind}" for part in parts], width, tp)

        projection = ColumnLinear(
            column_layout(len(parts) * padded, *cuts("weight"), in_features=hidden),
            column_layout(len(parts) * padded, *cuts("bias"), in_features=None) if config.mlp_bias else None,
            dtype,
        )
        if config.gated_mlp:
            self.gate_up_proj = projection
        else:
            self.up_proj = projection
        name = "down_proj.weight"
        self.down_proj = RowLinear(
            row_layout(padded, [Segment(name, 0, width, 0)], {name: width}, out_features=hidden),
            tensor_layout("down_proj.bias", (hidden,)) if config.mlp_bias else None,
            dtype,
            shares=tp if config.parallel else None,
        )
        self.activation = config.activation
        self.gated = config.gated_mlp
        self.tp = tp

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "*shares B S D"]:
        """Each device's share of the sum over F; the caller adds the shares up."""
        batch = x.shape[:-1]
        x = constrain(x, REPLICATED)  # all-gather over tp where the residual is cut over positions
        if self.gated:
            gate_up = self.gate_up_proj(x).reshape(*batch, self.tp, 2, -1)
            gate_up = constrain(gate_up, P(None, None, AXIS, None, None))
            inner = activate(gate_up[..., 0, :], self.activation) * gate_up[..., 1, :]
        else:
            inner = activate(self.up_proj(x), self.activation)
        return self.down_proj(inner.reshape(*batch, -1))
