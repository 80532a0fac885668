"""Products with weights of 8 and 4 bits as a Pallas kernel for TPUs.

XLA computes a product with scales for groups of inputs as a product for each group, whose sums it scales: on
v5e, by its compiler's estimate, that takes 2.4 times as long as the product in bfloat16 for 64 tokens and 5
times for 256 and more. Here a program widens a block of the weight on the chip, each value times its scale,
and multiplies all tokens of its tile by it at once. Of few tokens it scales the sums of each group instead.
Where no number of groups divides the inputs and fills lanes, the last block is partly beyond the weight.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from tpjax.sharding import pad_to_multiple

KERNEL_NAME = "quantized_product"  # in programs and profiles
_TOKEN_MULTIPLE, _MOST_TOKENS = 16, 1024  # of a program
_INPUTS, _OUTPUTS = 1024, 512  # of a block, at most
_MOST_INPUTS = 4096  # of a block, where a smaller one would not have whole lanes
_LANES = 128  # a block has whole ones of activations
_ROW_MULTIPLE = 8  # of inputs with a scale: rows of a tile in float32
_FEW_TOKENS = 16  # up to which XLA multiplies by float8 sooner: the kernel widens it in many instructions
_MOST_SCALED_TOKENS = 64  # of a tile of which the sums of groups are scaled, which are fewer than values then
_WIDENED_IN_A_CYCLE = 670  # int4 and int8, by the schedule that the compiler prints for v5e; of float8 half


class Tiling(NamedTuple):
    """What a program of the grid computes.

    Attributes:
        tokens: tokens of a tile.
        inputs: inputs of a block.
        outputs: outputs of a tile.
    """

    tokens: int
    inputs: int
    outputs: int


class ProductWork(NamedTuple):
    """What a call of the kernel does on one device.

    Attributes:
        bytes: read and written in main memory.
        flops: of its product.
        cycles: that widening takes, and the kernel at least.
    """

    bytes: int
    flops: int
    cycles: int


def takes(tokens: int, values: jnp.dtype, groups: int, group: int) -> bool:
    """Returns whether the kernel computes such a product, and sooner than XLA.

    Args:
        tokens: rows of the activations.
        values: dtype of the weight's values.
        groups: of inputs.
        group: inputs that share a scale.
    """
    sooner = values in (jnp.int4, jnp.int8) or (values == jnp.float8_e4m3fn and tokens > _FEW_TOKENS)
    return sooner and group % _ROW_MULTIPLE == 0 and _block_groups(groups, group) > 0


def _block_groups(groups: int, group: int) -> int:
    """Returns the groups of a block: whole lanes of activations, or all there are; 0: there are too many.

    The last of several blocks may have groups beyond the weight.
    """
    whole = (some for some in range(1, groups + 1) if groups % some == 0 and some * group % _LANES == 0)
    found = [some for some in whole if some * group <= _INPUTS]
    if found:
        return max(found)
    if groups * group <= _MOST_INPUTS:
        return groups
    least = math.lcm(group, _LANES) // group
    return _INPUTS // (least * group) * least


def choose_tiling(tokens: int, outputs: int, groups: int, group: int) -> Tiling:
    """Chooses the tiles from the shape on one device: blocks of whole groups.

    Args:
        tokens: rows of the activations.
        outputs: of the weight.
        groups: of inputs.
        group: inputs that share a scale.
    """
    inputs = _block_groups(groups, group) * group
    smaller = -(-inputs // _INPUTS)  # where a block of inputs is large, the other sides of tiles are not
    tile = min(_MOST_TOKENS // smaller // _LANES * _LANES, pad_to_multiple(tokens, _TOKEN_MULTIPLE))
    return Tiling(tile, inputs, min(_OUTPUTS // smaller // _LANES * _LANES, outputs))


def work(x: tuple[int, int], outputs: int, weight_bytes: int, groups: int, value_bits: int) -> ProductWork:
    """Returns what a product does.

    Args:
        x: dimensions of the activations, of 16 bits.
        outputs: of the weight.
        weight_bytes: of its values, scales and zero points.
        groups: of inputs.
        value_bits: of a value; those of float8 count as 16.
    """
    tokens, inputs = x
    tiling = choose_tiling(tokens, outputs, groups, inputs // groups)
    token_tiles, output_tiles = -(-tokens // tiling.tokens), -(-outputs // tiling.outputs)
    widened = inputs * outputs * token_tiles * max(1, value_bits // 8)
    return ProductWork(
        2 * tokens * inputs * output_tiles + weight_bytes * token_tiles + 2 * tokens * outputs,
        2 * tokens * inputs * outputs,
        widened // _WIDENED_IN_A_CYCLE,
    )


def quantized_product(
    x: Float[Array, "N D"],
    values: Shaped[Array, "E D F"],
    scales: Float[Array, "E groups F"],
    zeros: Int[Array, "E groups F"] | None,
    number: Int[Array, ""] | int = 0,
    *,
    interpret: Any = None,
) -> Float[Array, "N F"]:
    """Multiplies activations by one weight of a stack on one device; in the dtype of the activations.

    Nothing else of the stack is read.

    Args:
        x: activations, bfloat16.
        values: int8, float8 e4m3 or int4.
        scales: of each group of inputs and output.
        zeros: zero points, int8; ``None``: all are 0.
        number: of the weight in the stack.
        interpret: interpret the kernel on a CPU, with these parameters of the installed jax.
    """
    (tokens, inputs), (count, groups, outputs) = x.shape, scales.shape
    group = inputs // groups
    tiling = choose_tiling(tokens, outputs, groups, group)
    together = tiling.inputs // group
    blocks = -(-groups // together)
    beyond = blocks * together - groups
    if scales.dtype == jnp.float16:  # which TPUs do not load
        scales = scales.astype(jnp.float32)
    given = [scales] if zeros is None else [scales, zeros]
    # whole rows of an axis of their own: a block may have fewer than a tile has
    per_group = [
        jnp.pad(one, ((0, 0), (0, beyond), (0, 0))).reshape(count, blocks, together, outputs) for one in given
    ]
    padded = pad_to_multiple(tokens, _TOKEN_MULTIPLE)
    of_groups = pl.BlockSpec(
        (None, 1, together, tiling.outputs), lambda token, output, step, number: (number[0], step, 0, output)
    )
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(-(-padded // tiling.tokens), -(-outputs // tiling.outputs), blocks),
        in_specs=[
            pl.BlockSpec((tiling.tokens, tiling.inputs), lambda token, output, step, number: (token, step)),
            pl.BlockSpec(
                (None, tiling.inputs, tiling.outputs),
                lambda token, output, step, number: (number[0], step, output),
            ),
            *[of_groups] * len(per_group),
        ],
        out_specs=pl.BlockSpec(
            (tiling.tokens, tiling.outputs), lambda token, output, step, number: (token, output)
        ),
        scratch_shapes=[pltpu.VMEM((tiling.tokens, tiling.outputs), jnp.float32)],
    )
    out = pl.pallas_call(
        functools.partial(_kernel, inputs if beyond else None),
        out_shape=jax.ShapeDtypeStruct((padded, outputs), x.dtype),
        grid_spec=grid,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret or False,
        name=KERNEL_NAME,
    )(
        jnp.full(1, number, jnp.int32),
        jnp.pad(x, ((0, padded - tokens), (0, beyond * group))),
        values,
        *per_group,
    )
    return out[:tokens]


def _kernel(inputs: int | None, _: Any, x: Any, values: Any, scales: Any, *refs: Any) -> None:
    """Computes one program: a block of inputs of a tile of tokens and outputs.

    Args:
        inputs: of the weight, if the last block is partly beyond them.
        x: activations; beyond the weight, zeros.
        values: of the weight; beyond it, anything.
        scales: of its groups; beyond it, zeros.
        *refs: zero points, if there are, as scales; the output; the sums so far.
    """
    *zeros, out, sums = refs
    step = pl.program_id(2)

    def widened(dtype: Any) -> Any:
        wide = values[...].astype(dtype)
        if inputs is None or jnp.issubdtype(values.dtype, jnp.integer):
            return wide
        row = step * wide.shape[0] + jax.lax.broadcasted_iota(jnp.int32, wide.shape, 0)
        return jnp.where(row < inputs, wide, jnp.zeros_like(wide))  # 0 times what is no number is not 0

    @pl.when(step == 0)
    def begin() -> None:
        sums[...] = jnp.zeros_like(sums)

    together, outputs = scales.shape[1:]
    group = values.shape[0] // together
    if zeros or group % _LANES or x.shape[0] > _MOST_SCALED_TOKENS:
        wide = widened(jnp.float32).reshape(together, group, outputs)
        for one in zeros:
            wide = wide - one[0].astype(jnp.float32)[:, None]
        wide = (wide * scales[0].astype(jnp.float32)[:, None]).reshape(-1, outputs).astype(x.dtype)
        sums[...] += jnp.dot(x[...], wide, preferred_element_type=jnp.float32)
    else:
        total, wide = sums[...], widened(x.dtype)
        for at in range(together):
            own = slice(at * group, (at + 1) * group)
            product = jnp.dot(x[:, own], wide[own], preferred_element_type=jnp.float32)
            total += product * scales[0, at].astype(jnp.float32)[None]
        sums[...] = total

    @pl.when(step == pl.num_programs(2) - 1)
    def end() -> None:
        out[...] = sums[...].astype(out.dtype)
