"""``tpjax doctor --measure``: what the devices here reach, beside their data sheet and what plan predicts.

It needs no checkpoint and no network: the model is a Llama of random weights with layers of Llama 3 8B, as
many as leave half of the memory free. ``scripts/on_gpu.py`` measures published models with the same parts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from rich.console import Group, RenderableType
from rich.text import Text

from tpjax.attention import Backend, KernelShape, Verdict, choose_backend, paged_attention
from tpjax.attention.selftest import verdict
from tpjax.cache import LayerCache, TokenGroup
from tpjax.checkpoints.parameters import abstract_decoder
from tpjax.config import KVDtype, ModelConfig, Quantize
from tpjax.families.registry import config_from_hf
from tpjax.hardware import Hardware, known_device
from tpjax.layers.weights import dtype_bits
from tpjax.mesh import AXIS, make_mesh
from tpjax.planning.plain_table import plain_table
from tpjax.planning.plan import make_plan
from tpjax.planning.workload import Workload
from tpjax.runtime.counts import Counts
from tpjax.runtime.limits import PAGE_SIZE
from tpjax.runtime.memory import device_memory, plan_limits
from tpjax.runtime.rows import Chunk, Row
from tpjax.runtime.runner import Runner
from tpjax.sampling_params import SamplingParams
from tpjax.sharding import REPLICATED

# Layers of Llama 3 8B, or on a CPU, which is slower by orders of magnitude, of a tenth of its width.
_CHIP_LAYER = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "head_dim": 128}
_CPU_LAYER = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "head_dim": 64}
_MOST_LAYERS, _CPU_LAYERS = 32, 4
_CONTEXT, _PROMPT = 1024, 512
_BATCHES = (1, 8)
_MESSAGES = (1 << 14, 1 << 18, 1 << 22)  # bytes
_CHAIN = 16  # all-reduces, or layers' attention, of one program


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        name: what was measured.
        measured: the median of several rounds.
        expected: of the data sheet, or what ``plan`` predicts; ``None``: the chip is not known.
        unit: of both.
    """

    name: str
    measured: float
    expected: float | None
    unit: str


@dataclass(frozen=True)
class ChipReport:
    """What was measured.

    Attributes:
        device: kind of the devices.
        devices: their number, all used at once.
        jax: its version.
        compiler: its version, and of the driver.
        attention: what computes attention here, and why.
        figures: the figures.
        seconds: that all of it took.
    """

    device: str
    devices: int
    jax: str
    compiler: str
    attention: str
    figures: tuple[Figure, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        table = plain_table(
            f"{self.devices} x {self.device}, jax {self.jax}",
            "",
            numbers=("measured", "expected", "measured / expected"),
        )
        for one in self.figures:
            known = one.expected is not None
            table.add_row(
                one.name,
                f"{one.measured:.4g} {one.unit}",
                f"{one.expected:.4g} {one.unit}" if known else "not known",
                f"{one.measured / one.expected:.2f}" if one.expected else "",
            )
        return Group(table, Text(f"attention: {self.attention}"))


def measure(tp: int | None = None) -> ChipReport:
    """Measures the devices here: a minute or three.

    Args:
        tp: devices; ``None``: all.

    Raises:
        DeviceError: there are fewer.
    """
    started = time.perf_counter()
    mesh = make_mesh(tp)
    device = mesh.local_devices[0]
    chip = known_device(device.device_kind)
    dtype = jnp.dtype("float32" if device.platform == "cpu" else "bfloat16")
    memory = device_memory(mesh.size)
    config = _model(device.platform, None if memory is None else memory.free * mesh.size // 2, dtype)
    shape = KernelShape.of(config, mesh.size, dtype, PAGE_SIZE)
    found: list[Verdict] = []

    def check() -> Verdict:
        found.append(_checked(device, shape))
        return found[0]

    backend = choose_backend("auto", device, shape, check)
    figures = [
        *_device_figures(mesh, chip, dtype),
        *_all_reduce_figures(mesh, chip),
        _attention_figure(backend, shape, chip),
        *_model_figures(config, mesh, dtype, backend, chip),
    ]
    return ChipReport(
        device.device_kind,
        mesh.size,
        jax.__version__,
        device.client.platform_version,
        str(backend),
        tuple(figures),
        time.perf_counter() - started,
    )


def seconds(call: Callable[[], Any], rounds: int = 5, calls: int = 1) -> float:
    """Returns the median time of a call, of several in flight at once; the first is not counted."""
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready([call() for _ in range(calls)])
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times)


def read_bandwidth(size: int) -> float:
    """Returns the bytes a second at which one device reads an array of ``size`` bytes."""
    words = jnp.ones(size // 4, jnp.int32)
    return size / seconds(partial(jax.jit(jnp.sum), words), calls=4)


def product_rate(side: int, dtype: jnp.dtype) -> float:
    """Returns the FLOPs a second of a product of square matrices on one device."""
    left, right = (jax.random.normal(jax.random.key(key), (side, side), dtype) for key in (0, 1))
    return 2 * side**3 / seconds(partial(jax.jit(jnp.dot), left, right), calls=4)


def attention_s(backend: Backend, shape: KernelShape, batch: int, context: int) -> float:
    """Returns the time in which one device computes attention of decode rows in a layer.

    Args:
        backend: what computes it.
        shape: of the model.
        batch: rows.
        context: tokens in the cache of each.
    """
    columns = -(-context // shape.page_size)
    keys, values = (
        jax.random.normal(
            jax.random.key(key), (1 + batch * columns, shape.heads, shape.page_size, width), shape.dtype
        )
        for key, width in enumerate((shape.width, shape.value_dim))
    )
    tables = 1 + jax.random.permutation(jax.random.key(2), batch * columns).reshape(batch, columns)
    positions = jnp.full((batch, 1), context - 1, jnp.int32)
    group = TokenGroup(tables.astype(jnp.int32), positions, jnp.ones(batch, jnp.int32))
    queries = (batch, 1, shape.heads, shape.per_head, shape.width)
    query = jax.random.normal(jax.random.key(3), queries, shape.dtype)

    @jax.jit  # lowered once
    def layer(query: jax.Array, cache: LayerCache, group: TokenGroup) -> jax.Array:
        own = query[:, :, :, 0]
        output: jax.Array = paged_attention(
            query, own, own, cache, group, scale=shape.width**-0.5, window=None, backend=backend
        )
        return query + output

    @jax.jit
    def layers(query: jax.Array, cache: LayerCache, group: TokenGroup) -> jax.Array:
        for _ in range(_CHAIN):  # each waits for the one before
            query = layer(query, cache, group)
        return query

    return seconds(partial(layers, query, LayerCache(keys, values), group)) / _CHAIN


def random_runner(
    config: ModelConfig,
    mesh: Mesh,
    dtype: jnp.dtype,
    backend: Backend,
    *,
    max_model_len: int,
    max_slots: int | None,
    quantize: Quantize | None = None,
    kv_dtype: KVDtype = "auto",
) -> tuple[Runner, int]:
    """Makes a runner of random weights, with the cache that fits beside them.

    Returns:
        The runner, and the bytes of the weights on all devices.
    """
    graph, state = nnx.split(abstract_decoder(config, mesh, dtype, quantize, backend))

    def draw(key: jax.Array, shape: tuple[int, ...], kind: jnp.dtype) -> jax.Array:
        fan_in = max(shape[-2:]) if len(shape) > 1 else 1
        if jnp.issubdtype(kind, jnp.integer):  # values of a quantised weight
            return jax.random.randint(key, shape, -7, 8, jnp.int8).astype(kind)
        numbers: jax.Array = jax.random.normal(key, shape, jnp.bfloat16) * fan_in**-0.5
        return numbers.astype(kind)

    drawn: dict[Any, Any] = {}

    def weights(number: int, like: Any) -> jax.Array:
        known = (like.shape, like.dtype, like.format)
        if known not in drawn:
            drawn[known] = jax.jit(draw, static_argnums=(1, 2), out_shardings=like.format)
        array: jax.Array = drawn[known](jax.random.key(number), like.shape, like.dtype)
        return array

    leaves, tree = jax.tree.flatten(state)
    arrays = [weights(number, leaf) for number, leaf in enumerate(leaves)]
    limits = plan_limits(
        config,
        mesh.size,
        dtype,
        weight_bytes=0,  # they are in the memory already
        memory=device_memory(mesh.size),
        max_model_len=max_model_len,
        max_slots=max_slots,
        kv_dtype=kv_dtype,
    )
    model = nnx.merge(graph, jax.tree.unflatten(tree, arrays))
    weight_bytes = sum(array.size * dtype_bits(array.dtype) // 8 for array in arrays)
    return Runner(model, mesh, limits, dtype, kv_dtype=kv_dtype), weight_bytes


def decode_rows(runner: Runner, batch: int, context: int) -> list[Row]:
    """Returns rows at the end of a context; those beyond the cache's pages share the others'."""
    greedy = SamplingParams(temperature=0.0, max_tokens=context)
    columns, usable = -(-context // PAGE_SIZE), runner.limits.num_pages - 1
    return [
        Row(
            slot,
            context - 1,
            [[1 + (slot * columns + at) % usable for at in range(columns)]],
            greedy,
            seed=0,
            remaining=context,
            max_length=context,
        )
        for slot in range(batch)
    ]


def decode_s(runner: Runner, batch: int, context: int) -> float:
    """Returns the time of a decode step, as one of many in flight."""
    rows = decode_rows(runner, batch, context)
    return seconds(lambda: runner.decode(rows, 1).tokens, calls=10)


def prompt_step(runner: Runner, tokens: int) -> Callable[[], jax.Array]:
    """Returns what runs a prompt that fits into one step; of random tokens, which pick experts evenly."""
    (row,) = decode_rows(runner, 1, tokens)
    row.position = 0
    ids = np.random.default_rng(0).integers(3, runner.config.vocab_size, tokens).tolist()
    return lambda: runner.step([], [Chunk(row, ids)]).sampled.tokens


def prefill_s(runner: Runner, tokens: int) -> float:
    """Returns the time of a prompt that fits into one step."""
    return seconds(prompt_step(runner, tokens))


def _model(platform: str, room: int | None, dtype: jnp.dtype) -> ModelConfig:
    """Returns a Llama of at least one layer whose weights fit into so many bytes; ``None``: any do."""
    cpu = platform == "cpu"
    fields: Mapping[str, Any] = {
        "model_type": "llama",
        "vocab_size": 8192 if cpu else 128_256,
        "num_key_value_heads": 4 if cpu else 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        **(_CPU_LAYER if cpu else _CHIP_LAYER),
    }

    def weight_bytes(layers: int) -> int:
        counts = Counts("", config_from_hf({**fields, "num_hidden_layers": layers}))
        return int(counts.parameters * dtype.itemsize)

    most = _CPU_LAYERS if cpu else _MOST_LAYERS
    fitting = (layers for layers in range(most, 1, -1) if room is None or weight_bytes(layers) <= room)
    return config_from_hf({**fields, "num_hidden_layers": next(fitting, 1)})


def _checked(device: jax.Device, shape: KernelShape) -> Verdict:
    from tpjax.checkpoints.hub import cache_dir

    return verdict(device.platform, shape, device, Path(cache_dir()) / "attention")


def _device_figures(mesh: Mesh, chip: Hardware | None, dtype: jnp.dtype) -> list[Figure]:
    cpu = mesh.local_devices[0].platform == "cpu"
    with jax.default_device(mesh.local_devices[0]):
        bandwidth = read_bandwidth(1 << (26 if cpu else 30))
        rate = product_rate(1024 if cpu else 8192, dtype)
    return [
        Figure("reading memory", bandwidth / 1e9, _of(chip, "bandwidth_bytes_s", 1e9), "GB/s"),
        Figure(f"product in {dtype}", rate / 1e12, _of(chip, "flops", 1e12), "TFLOP/s"),
    ]


def _of(chip: Hardware | None, figure: str, unit: float) -> float | None:
    return None if chip is None else getattr(chip, figure) / unit


def _all_reduce_figures(mesh: Mesh, chip: Hardware | None) -> list[Figure]:
    if mesh.size == 1:
        return []

    def summed(x: jax.Array) -> jax.Array:
        for _ in range(_CHAIN):
            x = jax.lax.psum(x * 0.5, AXIS)
        return x

    program = jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=REPLICATED, out_specs=REPLICATED))
    figures = []
    for size in _MESSAGES:
        x = jax.device_put(jnp.ones(size // 4, jnp.float32), NamedSharding(mesh, REPLICATED))
        taken = seconds(partial(program, x)) / _CHAIN
        expected = None if chip is None else chip.interconnect.all_reduce_s(mesh.size, size) * 1e6
        figures.append(Figure(f"all-reduce of {size >> 10} KiB", taken * 1e6, expected, "µs"))
    return figures


def _attention_figure(backend: Backend, shape: KernelShape, chip: Hardware | None) -> Figure:
    batch = 8
    cache = batch * _CONTEXT * shape.heads * (shape.width + shape.value_dim) * jnp.dtype(shape.dtype).itemsize
    reached = cache / attention_s(backend, shape, batch, _CONTEXT) / 1e9
    name = f"attention ({backend.name}) reading {batch} x {_CONTEXT} tokens"
    return Figure(name, reached, _of(chip, "bandwidth_bytes_s", 1e9), "GB/s")


def _model_figures(
    config: ModelConfig, mesh: Mesh, dtype: jnp.dtype, backend: Backend, chip: Hardware | None
) -> list[Figure]:
    longest = _CONTEXT + PAGE_SIZE
    runner, _ = random_runner(config, mesh, dtype, backend, max_model_len=longest, max_slots=max(_BATCHES))
    counts, kind = Counts(f"{config.num_layers} layers", config), "bf16" if dtype.itemsize == 2 else "float32"

    def planned(batch: int) -> tuple[float | None, float | None]:
        if chip is None:
            return None, None
        plan = make_plan(counts, chip, mesh.size, mesh.size, Workload(batch, _CONTEXT, _PROMPT, kind))
        return plan.decode.total * 1e3, plan.prefill.total * 1e3

    figures = [
        Figure(
            f"decode of {config.num_layers} layers, {batch} x {_CONTEXT} tokens",
            decode_s(runner, batch, _CONTEXT) * 1e3,
            planned(batch)[0],
            "ms",
        )
        for batch in _BATCHES
    ]
    prefill = prefill_s(runner, _PROMPT) * 1e3
    runner.close()
    return [*figures, Figure(f"prompt of {_PROMPT} tokens", prefill, planned(1)[1], "ms")]
