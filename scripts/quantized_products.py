#!/usr/bin/env python
"""What TPU compilers expect of products with weights of 8 and 4 bits, next to the same matrix in bfloat16.

    python scripts/quantized_products.py            # for a v5e and a v6e; needs libtpu, and no TPU
    python scripts/quantized_products.py v5e --rows 8 --forms int4 gptq

The matrices are Llama 3 8B's gate and down projection on one of eight devices, stored as a model stores them;
the experts are Qwen3-30B-A3B's, one tile of rows by one expert of a stack. Each product is compiled ahead of
time. Its time is the longer of the estimated cycles over the clock and the bytes that it moves in main memory
over the bandwidth. The last columns are that over bfloat16's, and the bytes it writes there. Of the kernel
that multiplies by scales for groups of inputs, in the rows below XLA's, cycles are the bundles of the
schedule that the compiler prints, times the programs of its grid.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_llo_text=true --xla_jf_dump_to={tempfile.mkdtemp()}"

import jax
import jax.numpy as jnp

from tpjax.inspect.copies import write_backs
from tpjax.inspect.estimate import clock_hz, counted
from tpjax.inspect.hlo import Module
from tpjax.inspect.topology import Topology, parse_topology
from tpjax.layers import quantized_tpu
from tpjax.layers.linear import dot
from tpjax.layers.weights import FORMATS, QuantizedWeight, Weight, WeightFormat, dtype_bits

SCHEDULES = Path(os.environ["LIBTPU_INIT_ARGS"].rpartition("=")[2])
GRIDS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "v4": "v4:2x2x1", "tpu7x": "tpu7x:2x2x1"}
MATRICES = {"gate [4096, 1792]": (4096, 1792), "down [1792, 4096]": (1792, 4096)}
EXPERTS, EXPERT = 16, (2048, 768)
BF16 = jnp.dtype(jnp.bfloat16)
INT4, INT8, FP8 = FORMATS["int4"].values, FORMATS["int8"].values, FORMATS["fp8"].values
FORMS: dict[str, WeightFormat | None] = {
    "bf16": None,
    "int8": FORMATS["int8"],
    "fp8": FORMATS["fp8"],
    "int4": FORMATS["int4"],
    "fp8-blocks": WeightFormat(FP8, 128),  # DeepSeek-V3, Qwen3-FP8
    "int8-groups": WeightFormat(INT8, 128, BF16),  # compressed-tensors
    "gptq": WeightFormat(INT4, 128, jnp.dtype(jnp.float16), zeros=True),  # and AWQ
    "mxfp4": WeightFormat(jnp.dtype(jnp.float4_e2m1fn), 32, BF16),
    "q8_0": WeightFormat(INT8, 32, jnp.dtype(jnp.float16)),
    "q4_0": WeightFormat(INT4, 32, jnp.dtype(jnp.float16)),
}


class Product(NamedTuple):
    """What the compiler expects of a product: cycles, bytes moved, microseconds, and bytes written."""

    cycles: int
    traffic: int
    us: float
    written: int


def weight(form: WeightFormat | None, inputs: int, outputs: int, count: int | None = None) -> Weight:
    """Returns the shapes of a weight as a model stores it on TPUs: outputs first in bfloat16, else inputs.

    Args:
        form: how it is kept; ``None``: in bfloat16.
        inputs: inputs.
        outputs: outputs.
        count: of a stack of experts, whose inputs always come first; ``None``: it is none.
    """
    lead = () if count is None else (count,)
    if form is None:
        return jax.ShapeDtypeStruct((outputs, inputs) if count is None else (count, inputs, outputs), BF16)
    groups = 1 if form.group is None else inputs // form.group
    values: Any = jax.ShapeDtypeStruct((*lead, inputs, outputs), form.values_on("tpu"))
    scales: Any = jax.ShapeDtypeStruct((*lead, groups, outputs), form.scales)
    zeros: Any = jax.ShapeDtypeStruct(scales.shape, jnp.int8) if form.zeros else None
    return QuantizedWeight(values, scales, zeros, jax.sharding.PartitionSpec(), -2)


def compiled(chips: Topology, function: Any, *arguments: Any) -> Product:
    """Compiles a function for one device, and adds up what the compiler expects."""
    sharding = jax.sharding.NamedSharding(chips.mesh(1), jax.sharding.PartitionSpec())

    def placed(one: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        layout = jax.experimental.layout.Layout(tuple(range(len(one.shape))))
        return jax.ShapeDtypeStruct(
            one.shape, one.dtype, sharding=jax.experimental.layout.Format(layout, sharding)
        )

    program = jax.jit(function).trace(*jax.tree.map(placed, arguments)).lower(lowering_platforms=("tpu",))
    module = Module(program.compile().as_text())
    found, device = counted(module), chips.hardware.device
    us = 1e6 * max(found.cycles / clock_hz(chips.hardware), found.traffic / device.bandwidth_bytes_s)
    return Product(found.cycles, found.traffic, us, sum(one.bytes for one in write_backs(module)))


def by_kernel(chips: Topology, form: WeightFormat, rows: int, inputs: int, outputs: int) -> Product | None:
    """Compiles the kernel for a product, and counts the bundles of its schedule; ``None``: XLA multiplies."""
    one = weight(form, inputs, outputs)
    assert isinstance(one, QuantizedWeight) and form.group is not None
    groups = inputs // form.group
    if not quantized_tpu.takes(rows, one.values.dtype, groups, form.group):
        return None
    for dump in SCHEDULES.iterdir():
        dump.unlink()
    x = jax.ShapeDtypeStruct((rows, inputs), BF16)
    stack = jax.tree.map(lambda array: jax.ShapeDtypeStruct((1, *array.shape), array.dtype), one)
    compiled(chips, quantized_tpu.quantized_product, x, stack.values, stack.scales, stack.zeros)
    (dump,) = SCHEDULES.glob(f"*{quantized_tpu.KERNEL_NAME}*schedule-analysis_final_bundles.txt")
    found = re.search(r"total scheduled bundles:\s+(\d+)", dump.read_text())
    assert found is not None
    tiling = quantized_tpu.choose_tiling(rows, outputs, groups, form.group)
    programs = -(-rows // tiling.tokens) * -(-outputs // tiling.outputs) * -(-inputs // tiling.inputs)
    size = inputs * outputs * dtype_bits(form.values) // 8
    size += groups * outputs * (form.scales.itemsize + form.zeros)
    moved = quantized_tpu.work((rows, inputs), outputs, size, groups, 8).bytes
    cycles = int(found[1]) * programs
    us = 1e6 * max(cycles / clock_hz(chips.hardware), moved / chips.hardware.device.bandwidth_bytes_s)
    return Product(cycles, moved, us, 0)


def products(chips: Topology, form: WeightFormat | None, rows: int) -> Iterator[tuple[str, Product]]:
    """Compiles the products of one form."""
    subscripts = "...i,oi->...o" if form is None else "...i,io->...o"
    for name, (inputs, outputs) in MATRICES.items():
        x = jax.ShapeDtypeStruct((rows, inputs), BF16)
        one = weight(form, inputs, outputs)
        yield name, compiled(chips, lambda x, weight: dot(x, weight, subscripts), x, one)
        if form is not None and form.group is not None:
            kernel = by_kernel(chips, form, rows, inputs, outputs)
            if kernel is not None:
                yield f"  kernel {name[:4]}", kernel

    def expert(x: Any, stack: Any, i: Any) -> Any:
        own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stack)
        return dot(x, own, "td,df->tf")

    x, stack = jax.ShapeDtypeStruct((rows, EXPERT[0]), BF16), weight(form, *EXPERT, EXPERTS)
    yield f"expert {list(EXPERT)}", compiled(chips, expert, x, stack, jax.ShapeDtypeStruct((), jnp.int32))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chips", nargs="*", default=["v5e", "v6e"], help=f"{', '.join(GRIDS)} (v5e v6e)")
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 64], help="of activations (8 64)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="(all)")
    arguments = parser.parse_args()
    forms = ["bf16", *(form for form in arguments.forms if form != "bf16")]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, SCHEDULES)
        show(arguments.chips, arguments.rows, forms)


def show(names: list[str], all_rows: list[int], forms: list[str]) -> None:
    """Prints a table for each chip and number of rows."""
    for chip in names:
        chips = parse_topology(GRIDS[chip])
        for rows in all_rows:
            print(f"{chip}, {rows} rows")
            print(f"  {'':20}{'form':>12}{'cycles':>9}{'MB':>8}{'us':>8}{'/ bf16':>8}{'written':>9}")
            plain: dict[str, float] = {}
            for form in forms:
                for name, one in products(chips, FORMS[form], rows):
                    matrix = next((known for known in plain if known[:4] == name.split()[-1][:4]), name)
                    ratio = one.us / plain.setdefault(matrix, one.us)
                    figures = f"{one.cycles:9}{one.traffic / 1e6:8.2f}{one.us:8.2f}{ratio:8.2f}"
                    print(f"  {name:20}{form:>12}{figures}{one.written:9}", flush=True)


if __name__ == "__main__":
    main()
