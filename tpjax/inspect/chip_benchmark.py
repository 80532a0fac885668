"""``tpjax doctor --measure``: what the devices here reach, beside their data sheet and what plan predicts.

It needs no checkpoint and no network: the model is a Llama of random weights with layers of Llama 3 8B, as
many as leave half of the memory free. ``scripts/on_gpu.py`` measures published models with the same parts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from rich.console import Group, RenderableType
from rich.text import Text

from tpjax.attention import Backend, KernelShape, Verdict, paged_attention
from tpjax.cache import LayerCache, TokenGroup
from tpjax.checkpoints.hub import cache_dir
from tpjax.checkpoints.parameters import abstract_decoder
from tpjax.config import KVDtype, ModelConfig, Quantize
from tpjax.engine.loading import choose_backends
from tpjax.families.registry import config_from_hf
from tpjax.hardware import Hardware, known_device
from tpjax.layers.experts import expert_matrices
from tpjax.layers.weights import dtype_bits
from tpjax.mesh import AXIS, make_mesh
from tpjax.planning.plain_table import plain_table
from tpjax.planning.plan import Plan, make_plan
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
_BEYOND_CACHES = 1 << 28  # bytes of memory that are read in turn, so that no cache of a chip holds them
_LAST_START_S = 120.0  # of a figure: compiling for one takes up to a minute, and all are to take three


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: what was measured.
        measured: the median of several rounds; ``None``: it could not be measured.
        expected: of the data sheet, or what ``plan`` predicts; ``None``: the chip is not known.
        unit: of both.
        problem: why it could not be measured.
    """

    name: str
    measured: float | None
    expected: float | None
    unit: str
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.measured is None:
            return f"{self.name}: {self.problem}"
        expected = "" if self.expected is None else f" ({self.expected:.4g} expected)"
        return f"{self.name}: {self.measured:.4g} {self.unit}{expected}"


@dataclass(frozen=True)
class ChipReport:
    """What was measured.

    Attributes:
        device: kind of the devices.
        devices: their number, all used at once; reading memory, products and attention are of one.
        jax: its version.
        compiler: its version, and of the driver.
        attention: what computes attention here, and why.
        products: what computes products of weights with scales for groups of inputs, and why.
        figures: the figures.
        seconds: that all of it took.
    """

    device: str
    devices: int
    jax: str
    compiler: str
    attention: str
    products: str
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
            known, measured = one.expected is not None, one.measured
            table.add_row(
                one.name,
                "not measured" if measured is None else f"{measured:.4g} {one.unit}",
                f"{one.expected:.4g} {one.unit}" if known else "not known",
                f"{measured / one.expected:.2f}" if measured is not None and one.expected else "",
            )
        lines = [f"attention: {self.attention}", f"products of quantised weights: {self.products}"]
        lines += [str(one) for one in self.figures if one.measured is None]
        return Group(table, *map(Text, lines))


def measure(tp: int | None = None, found: Callable[[Figure], None] | None = None) -> ChipReport:
    """Measures the devices here, in three minutes at most.

    One figure that cannot be measured takes none of the others along; nor is one begun after two minutes.

    Args:
        tp: devices; ``None``: all.
        found: called with each figure as soon as it is known.

    Raises:
        DeviceError: there are fewer.
    """
    started, figures = time.perf_counter(), list[Figure]()
    mesh = make_mesh(tp)
    device = mesh.local_devices[0]
    chip = known_device(device.device_kind)
    dtype = jnp.dtype("float32" if device.platform == "cpu" else "bfloat16")

    def take(probes: Iterable[_Probe]) -> None:
        for probe in probes:
            late = time.perf_counter() - started > _LAST_START_S
            figures.append(
                probe.failed(f"not begun after {_LAST_START_S:.0f} s") if late else probe.figure(chip)
            )
            if found is not None:
                found(figures[-1])

    take(_device_probes(mesh, dtype))
    take(_all_reduce_probes(mesh))
    # a kernel that hangs ends the process: what was found is told by now
    one_layer = _model(device.platform, 0, dtype)
    backend, checked = checked_backend(one_layer, mesh, dtype, quantize="int4")
    take([_attention_probe(backend, KernelShape.of(one_layer, mesh.size, dtype, PAGE_SIZE))])
    take(_model_probes(mesh, dtype, backend))
    return ChipReport(
        device.device_kind,
        mesh.size,
        jax.__version__,
        device.client.platform_version,
        checked["attention"],
        checked["products"],
        figures=tuple(figures),
        seconds=time.perf_counter() - started,
    )


def checked_backend(
    config: ModelConfig,
    mesh: Mesh,
    dtype: jnp.dtype,
    kv_dtype: KVDtype = "auto",
    quantize: Quantize | None = None,
) -> tuple[Backend, dict[str, str]]:
    """Chooses what computes attention and products as a model that is loaded does, kernels checked.

    Args:
        config: the architecture.
        mesh: the devices.
        dtype: of activations.
        kv_dtype: what keys and values are kept in.
        quantize: what weights are.

    Returns:
        The choice; ``attention``, ``products`` (of weights in groups) and ``experts``, each in a sentence.
    """
    device, folder = mesh.local_devices[0], cache_dir() / "attention"
    shape = KernelShape.of(config, mesh.size, dtype, PAGE_SIZE, kv_dtype)
    experts, grouped = None if quantize else expert_matrices(config, mesh.size, dtype), quantize == "int4"
    (backend,) = choose_backends("auto", [shape], [experts], device, grouped=grouped)
    found = {"attention": str(backend), "products": "xla", "experts": "xla"}
    if not backend.is_kernel:
        return backend, found
    from tpjax.layers.selftest import experts_verdict, product_verdict  # Pallas takes a while

    def told(taken: bool, verdict: Verdict) -> str:  # as it was kept just now
        return f"{backend.name if taken else 'xla'}: {verdict}"

    if grouped:
        found["products"] = told(backend.products, product_verdict(backend, device, folder))
    if backend.name == "gpu" and experts is not None and experts.kernel_takes:
        found["experts"] = told(backend.experts, experts_verdict(backend, experts, device, folder))
    return backend, found


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

    Layers have caches of their own, as in a model: one alone may fit into the chip's.

    Args:
        backend: what computes it.
        shape: of the model.
        batch: rows.
        context: tokens in the cache of each.
    """
    columns = -(-context // shape.page_size)
    pages = 1 + batch * columns, shape.heads, shape.page_size

    def made(layer: int) -> LayerCache:
        widths = enumerate((shape.width, shape.value_dim))
        return LayerCache(
            *(
                jax.random.normal(jax.random.key(2 * layer + at), (*pages, width), shape.dtype)
                for at, width in widths
            )
        )

    size = math.prod(pages) * (shape.width + shape.value_dim) * jnp.dtype(shape.dtype).itemsize
    caches = [made(layer) for layer in range(min(_CHAIN, -(-_BEYOND_CACHES // size)))]
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
    def layers(query: jax.Array, caches: list[LayerCache], group: TokenGroup) -> jax.Array:
        for number in range(_CHAIN):  # each waits for the one before
            query = layer(query, caches[number % len(caches)], group)
        return query

    return seconds(partial(layers, query, caches, group)) / _CHAIN


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


@dataclass(frozen=True)
class _Probe:
    """What is measured for one figure.

    Attributes:
        name: of the figure.
        unit: of the figure.
        measured: measures it.
        expected: what is expected of the chip.
    """

    name: str
    unit: str
    measured: Callable[[], float]
    expected: Callable[[Hardware], float]

    def figure(self, chip: Hardware | None) -> Figure:
        """Measures; whatever goes wrong is the figure's problem."""
        try:
            expected = None if chip is None else self.expected(chip)
            return Figure(self.name, self.measured(), expected, self.unit)
        except Exception as error:
            lines = str(error).strip().splitlines()
            return self.failed(": ".join([type(error).__name__, *lines[:1]]))

    def failed(self, problem: str) -> Figure:
        """Returns the figure of what could not be measured."""
        return Figure(self.name, None, None, self.unit, problem)


def _device_probes(mesh: Mesh, dtype: jnp.dtype) -> list[_Probe]:
    cpu, device = mesh.local_devices[0].platform == "cpu", mesh.local_devices[0]

    def on_one(measured: Callable[..., float], *arguments: Any) -> float:
        with jax.default_device(device):
            return measured(*arguments)

    size, side = 1 << (26 if cpu else 30), 1024 if cpu else 8192
    return [
        _Probe("reading memory", "GB/s", lambda: on_one(read_bandwidth, size) / 1e9, _data_sheet_gb_s),
        _Probe(
            f"product in {dtype}",
            "TFLOP/s",
            lambda: on_one(product_rate, side, dtype) / 1e12,
            lambda chip: chip.flops / 1e12,
        ),
    ]


def _data_sheet_gb_s(chip: Hardware) -> float:
    return chip.bandwidth_bytes_s / 1e9


def _all_reduce_probes(mesh: Mesh) -> list[_Probe]:
    return [
        _Probe(
            f"all-reduce of {size >> 10} KiB",
            "µs",
            partial(lambda size: 1e6 * all_reduce_s(mesh, size), size),
            partial(lambda size, chip: 1e6 * chip.interconnect.all_reduce_s(mesh.size, size), size),
        )
        for size in (_MESSAGES if mesh.size > 1 else ())
    ]


def all_reduce_s(mesh: Mesh, size: int) -> float:
    """Returns the time in which a mesh adds up ``size`` bytes of each device."""
    program, x = _all_reduces(mesh, size)
    return seconds(partial(program, x)) / _CHAIN


def _all_reduces(mesh: Mesh, size: int) -> tuple[Any, jax.Array]:
    """Returns a program of several that wait for each other, and its argument."""

    def summed(x: jax.Array) -> jax.Array:
        for _ in range(_CHAIN):
            x = jax.lax.psum(x * 0.5, AXIS)
        return x

    program = jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=REPLICATED, out_specs=REPLICATED))
    return program, jax.device_put(jnp.ones(size // 4, jnp.float32), NamedSharding(mesh, REPLICATED))


def _attention_probe(backend: Backend, shape: KernelShape) -> _Probe:
    batch = 8
    cache = batch * _CONTEXT * shape.heads * (shape.width + shape.value_dim) * jnp.dtype(shape.dtype).itemsize
    return _Probe(
        f"attention ({backend.name}) reading {batch} x {_CONTEXT} tokens",
        "GB/s",
        lambda: cache / attention_s(backend, shape, batch, _CONTEXT) / 1e9,
        _data_sheet_gb_s,
    )


def _model_probes(mesh: Mesh, dtype: jnp.dtype, backend: Backend) -> Iterator[_Probe]:
    memory, kind = device_memory(mesh.size), "bf16" if dtype.itemsize == 2 else "float32"
    room = None if memory is None else memory.free * mesh.size // 2
    config = _model(mesh.local_devices[0].platform, room, dtype)
    counts = Counts(f"{config.num_layers} layers", config)

    @cache
    def runner() -> Runner:
        longest, most = _CONTEXT + PAGE_SIZE, max(_BATCHES)
        return random_runner(config, mesh, dtype, backend, max_model_len=longest, max_slots=most)[0]

    def planned(chip: Hardware, batch: int = 1) -> Plan:
        return make_plan(counts, chip, mesh.size, mesh.size, Workload(batch, _CONTEXT, _PROMPT, kind))

    for batch in _BATCHES:
        yield _Probe(
            f"decode of {config.num_layers} layers, {batch} x {_CONTEXT} tokens",
            "ms",
            partial(lambda batch: 1e3 * decode_s(runner(), batch, _CONTEXT), batch),
            partial(lambda batch, chip: 1e3 * planned(chip, batch).decode.total, batch),
        )
    yield _Probe(
        f"prompt of {_PROMPT} tokens",
        "ms",
        lambda: 1e3 * prefill_s(runner(), _PROMPT),
        lambda chip: 1e3 * planned(chip).prefill.total,
    )
    if runner.cache_info().currsize:
        runner().close()
