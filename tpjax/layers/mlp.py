"""The gated MLP: ``down(act(gate(x)) * up(x))`` (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from tpjax.config import Activation, ModelConfig
from tpjax.layers.linear import ColumnLinear, RowLinear
from tpjax.mesh import AXIS
from tpjax.sharding import (
    Segment,
    columns,
    constrain,
    pad_to_multiple,
    rows,
    whole,
)


def activate(x: Float[Array, "*batch F"], kind: Activation) -> Float[Array, "*batch F"]:
    """The gate's non-linearity."""
    return jax.nn.silu(x) if kind == "silu" else jax.nn.gelu(x, approximate=True)


def gate_up_segments(names: tuple[str, str], width: int, parts: int) -> tuple[list[Segment], dict[str, int]]:
    """Gate and up [F] in the order [parts, 2, F / parts], so that each part holds both of its features.

    Args:
        names: canonical tensors of gate and up.
        width: F; padded with zeros to a multiple of ``parts``.
        parts: devices that F is cut over.
    """
    share = pad_to_multiple(width, parts) // parts
    cuts = [
        Segment(name, part * share, min(share, width - part * share), (2 * part + place) * share)
        for part in range(parts)
        for place, name in enumerate(names)
        if part * share < width
    ]
    return cuts, dict.fromkeys(names, width)


class MLP(nnx.Module):
    """Column-parallel gate and up, fused; row-parallel down. F is zero-padded to a multiple of tp.

    The fused product's outputs lie device by device: [tp, 2, F / tp], so that a device's slice holds the
    gate and the up of the same features.
    """

    def __init__(self, config: ModelConfig, tp: int, dtype: jnp.dtype) -> None:
        hidden, width = config.hidden_size, config.intermediate_size
        padded = pad_to_multiple(width, tp)

        def gate_up(kind: str) -> tuple[list[Segment], dict[str, int]]:
            return gate_up_segments((f"gate_proj.{kind}", f"up_proj.{kind}"), width, tp)

        self.gate_up_proj = ColumnLinear(
            columns(2 * padded, *gate_up("weight"), in_features=hidden),
            columns(2 * padded, *gate_up("bias"), in_features=None) if config.mlp_bias else None,
            dtype,
        )
        name = "down_proj.weight"
        self.down_proj = RowLinear(
            rows(padded, [Segment(name, 0, width, 0)], {name: width}, out_features=hidden),
            whole("down_proj.bias", (hidden,)) if config.mlp_bias else None,
            dtype,
        )
        self.activation = config.activation
        self.tp = tp

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Each device's share of the sum over F; the caller adds the shares up."""
        batch = x.shape[:-1]
        gate_up = self.gate_up_proj(x).reshape(*batch, self.tp, 2, -1)
        gate_up = constrain(gate_up, P(None, None, AXIS, None, None))
        gated = activate(gate_up[..., 0, :], self.activation) * gate_up[..., 1, :]
        return self.down_proj(gated.reshape(*batch, -1))
