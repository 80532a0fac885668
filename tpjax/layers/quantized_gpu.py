"""Products with weights of 8 and 4 bits as a Pallas kernel for NVIDIA's Hopper GPUs.

XLA's own products read values with a scale for each output at 84% of an H100's bandwidth. For scales of
groups of inputs they compute a product for each group, whose float32 sums go through memory. Here a
program computes a tile of outputs: one of its warp groups copies blocks of the weight, as they are stored,
and of the activations into shared memory, several blocks ahead; the others widen their parts in registers,
which the tensor cores take as the left side of a product, and scale the sums of each group.

The tensor cores multiply 64 rows at once: outputs, of which a weight has thousands, and tokens, of which a
step of decode has few, are the columns. A weight is stored [out, in], so that a row of a block is read at
once. Products of few outputs are split along the inputs among programs, whose sums are added up afterwards.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Shaped

from tpjax import mosaic_gpu
from tpjax.layers.weights import dtype_bits
from tpjax.sharding import pad_to_multiple

KERNEL_NAME = "quantized_product"  # in programs and profiles
_ROWS = 64  # outputs of a warp group: rows of a product of the tensor cores
_COMPUTING = 2  # warp groups
_OUTPUTS = _COMPUTING * _ROWS  # of a program
_INPUTS = 128  # of a block
_TOKEN_MULTIPLE, _MOST_TOKENS = 8, 128  # of a program: columns of a product, and what registers hold
_MOST_STAGES = 16
_ALIGNED = 8  # scales of 16 bits in the smallest copy
_LEAST_ROW_BYTES = 32  # that are multiplied at once, of the smallest layout of shared memory
_GOOD_WAVES = 0.85  # share of the processors that work, at which inputs are not split further
_LEAST_BLOCKS = 4  # of a part: fewer would only wait for the first


class Tiling(NamedTuple):
    """What a program computes.

    Attributes:
        tokens: tokens of a tile.
        parts: programs among which the inputs of a tile are split.
        stages: blocks in shared memory.
    """

    tokens: int
    parts: int
    stages: int


def supports(bits: int, group: int, outputs: int) -> bool:
    """Returns whether the kernel takes such a weight.

    Args:
        bits: of a value.
        group: inputs that share a scale.
        outputs: on one device.
    """
    rows_fit = outputs % _ALIGNED == 0 and group * bits % (8 * _LEAST_ROW_BYTES) == 0
    return rows_fit and (group % _INPUTS == 0 or _INPUTS % group == 0)


class _Static(NamedTuple):
    """What is known when the kernel is traced."""

    tiling: Tiling
    groups: int  # of inputs in a block; 0: there are no scales
    interpreted: bool


def choose_tiling(tokens: int, inputs: int, outputs: int, bits: int, groups: int) -> Tiling:
    """Chooses the tiles from the shape on one device.

    Args:
        tokens: rows of the activations.
        inputs: of the weight.
        outputs: of the weight.
        bits: of a value.
        groups: of inputs in a block.
    """
    tile = min(_MOST_TOKENS, pad_to_multiple(tokens, _TOKEN_MULTIPLE))
    programs = -(-outputs // _OUTPUTS) * -(-tokens // tile)
    blocks = -(-inputs // _INPUTS)

    def waves(parts: int) -> float:
        whole = -(-programs * parts // mosaic_gpu.PROCESSORS)
        return programs * parts / (whole * mosaic_gpu.PROCESSORS)

    most = max(1, min(2 * mosaic_gpu.PROCESSORS // programs, blocks // _LEAST_BLOCKS))
    good = (parts for parts in range(1, most + 1) if waves(parts) >= _GOOD_WAVES)
    parts = next(good, max(range(1, most + 1), key=waves))
    block = _OUTPUTS * (_INPUTS * bits // 8 + 4 * groups) + tile * _INPUTS * 2
    room = mosaic_gpu.SHARED_BYTES // 2 - _OUTPUTS * tile * 4  # two programs of a processor overlap
    return Tiling(tile, parts, max(2, min(_MOST_STAGES, room // block, -(-blocks // parts) + 1)))


def quantized_product(
    x: Float[Array, "N D"],
    values: Shaped[Array, "F D"],
    scales: Float[Array, "groups F"] | None,
    *,
    interpret: Any = None,
) -> Float[Array, "N F"]:
    """Multiplies activations by a weight on one device.

    Args:
        x: activations, of 16 bits.
        values: int8, float8 e4m3 or int4.
        scales: of each group of inputs and output; groups have 32, 64 or a multiple of 128 inputs.
            ``None``: the values are multiplied as they are, and 128 divides the inputs, if they are more.
        interpret: interpret the kernel on a CPU, with these parameters of the installed jax.
    """
    tokens, inputs = x.shape
    outputs = len(values)
    in_block = 0 if scales is None else max(1, len(scales) * _INPUTS // inputs)
    tiling = choose_tiling(tokens, inputs, outputs, dtype_bits(values.dtype), in_block)
    padded = pad_to_multiple(tokens, tiling.tokens)
    static = _Static(tiling, in_block, interpret is not None)
    blocks = -(-inputs // _INPUTS)
    each = -(-blocks // tiling.parts)
    width = _INPUTS // max(1, in_block)  # inputs that are multiplied at once
    grouped = [] if scales is None else [scales]
    sums = plgpu.kernel(
        functools.partial(_kernel, static, each, blocks),
        out_type=jax.ShapeDtypeStruct((tiling.parts, outputs, padded), jnp.float32),
        grid=(padded // tiling.tokens, -(-outputs // _OUTPUTS), tiling.parts),
        grid_names=("tokens", "outputs", "part"),
        num_threads=_COMPUTING + 1,
        thread_name="warp_group",
        scratch_types=(
            mosaic_gpu.tiled((tiling.stages, tiling.tokens, _INPUTS), x.dtype, width),
            mosaic_gpu.tiled((tiling.stages, _OUTPUTS, _INPUTS), values.dtype, width),
            plgpu.SMEM((_OUTPUTS, tiling.tokens), jnp.float32),
            plgpu.Barrier(num_arrivals=2 + bool(grouped), num_barriers=tiling.stages),
            plgpu.Barrier(num_arrivals=_COMPUTING, num_barriers=tiling.stages),
            *[plgpu.SMEM((tiling.stages, in_block, _OUTPUTS), one.dtype) for one in grouped],
            *[mosaic_gpu.tiled((_COMPUTING, _ROWS, _INPUTS), x.dtype, width)] * static.interpreted,
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=KERNEL_NAME,
        **({} if interpret is None else {"interpret": interpret}),
    )(jnp.pad(x, ((0, padded - tokens), (0, 0))), values, *grouped)
    return sums.sum(axis=0)[:, :tokens].T


def _kernel(static: _Static, each: int, blocks: int, x: Any, values: Any, *refs: Any) -> None:
    """Computes one program: the last warp group copies, the others compute half of the outputs each."""
    tiling, rest = static.tiling, list(refs)
    scales = [rest.pop(0)] if static.groups else []
    sums, x_smem, values_smem, sums_smem, here, done, *rest = rest
    scales_smem, wide_smem = rest[: len(scales)], rest[len(scales) :]
    first = jax.lax.axis_index("part") * each
    count = jnp.minimum(each, blocks - first)
    tokens = pl.ds(jax.lax.axis_index("tokens") * tiling.tokens, tiling.tokens)
    output = jax.lax.axis_index("outputs") * _OUTPUTS
    warp_group = jax.lax.axis_index("warp_group")

    @pl.when(warp_group == _COMPUTING)
    def copy() -> None:
        def copy_block(step: Any, _: None) -> None:
            slot = jax.lax.rem(step, jnp.int32(tiling.stages))

            @pl.when(step >= tiling.stages)
            def wait() -> None:
                plgpu.barrier_wait(done.at[slot])

            at, outputs = pl.ds((first + step) * _INPUTS, _INPUTS), pl.ds(output, _OUTPUTS)
            plgpu.copy_gmem_to_smem(values.at[outputs, at], values_smem.at[slot], here.at[slot])
            plgpu.copy_gmem_to_smem(x.at[tokens, at], x_smem.at[slot], here.at[slot])
            for source, target in zip(scales, scales_smem, strict=True):
                in_group = max(1, static.groups) * x.shape[1] // (source.shape[0] * _INPUTS)  # blocks
                group = jax.lax.div((first + step) * static.groups, jnp.int32(in_group))
                block = source.at[pl.ds(group, static.groups), outputs]
                plgpu.copy_gmem_to_smem(block, target.at[slot], here.at[slot])

        jax.lax.fori_loop(0, count, copy_block, None)

    @pl.when(warp_group < _COMPUTING)
    def compute() -> None:
        own = pl.ds(warp_group * _ROWS, _ROWS)
        shape = (_ROWS, tiling.tokens)

        def accumulate(step: Any, total: Any) -> Any:
            slot = jax.lax.rem(step, jnp.int32(tiling.stages))
            plgpu.barrier_wait(here.at[slot])
            parts = max(1, static.groups)
            width = _INPUTS // parts
            for part in range(parts):
                some = slice(part * width, (part + 1) * width)
                wide = mosaic_gpu.widen(values_smem[slot, own, some], x.dtype)
                left: Any = wide
                for ref in wide_smem:  # the interpreter multiplies nothing from registers
                    left = ref.at[warp_group, :, some]
                    left[...] = wide
                    plgpu.commit_smem()
                right = mosaic_gpu.transposed(x_smem.at[slot, :, some])
                product = pl.run_scoped(
                    functools.partial(mosaic_gpu.multiply, left, right), plgpu.ACC(shape, jnp.float32)
                )
                for ref in scales_smem:
                    scale = plgpu.layout_cast(ref[slot, part, own], plgpu.Layout.WGMMA.reduce(1))
                    product = product * jax.lax.broadcast_in_dim(scale.astype(jnp.float32), shape, [0])
                total = total + product
            plgpu.commit_smem()  # orders what was read before the next copies to the slot
            plgpu.barrier_arrive(done.at[slot])
            return total

        nothing = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        sums_smem[own] = jax.lax.fori_loop(0, count, accumulate, nothing)
        plgpu.commit_smem()
        target = sums.at[jax.lax.axis_index("part"), pl.ds(output + warp_group * _ROWS, _ROWS), tokens]
        plgpu.copy_smem_to_gmem(sums_smem.at[own], target)
        plgpu.wait_smem_to_gmem(0)
