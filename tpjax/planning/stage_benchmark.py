"""``tpjax bench --pp``: each stage of a pipeline alone on this machine, next to what ``plan`` predicts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from rich.console import Group, RenderableType
from rich.text import Text

from tpjax.config import ModelConfig
from tpjax.distributed import barrier, gather
from tpjax.hardware import Hardware
from tpjax.mesh import describe_layout, is_local
from tpjax.planning.measure import best_s
from tpjax.planning.plain_table import plain_table
from tpjax.planning.workload import Workload
from tpjax.runtime.layer_split import layer_seconds
from tpjax.runtime.programs import ProgramSpec
from tpjax.runtime.rows import Chunk, PackedRows, PackedStep, Row
from tpjax.runtime.stage import Stage
from tpjax.sampling_params import SamplingParams
from tpjax.sharding import REPLICATED
from tpjax.step_time import StepTokens

_SENT = 16  # transfers timed together: processes do not start a clock at quite the same time


@dataclass(frozen=True)
class StageTimes:
    """A stage's decode step of one row and its prefill, in milliseconds.

    Attributes:
        layers: first layer, and one past the last.
        decode_ms: measured, the best of all rounds.
        decode_plan_ms: predicted.
        prefill_ms: measured, of the prompt in one chunk.
        prefill_plan_ms: predicted.
    """

    layers: tuple[int, int]
    decode_ms: float
    decode_plan_ms: float
    prefill_ms: float
    prefill_plan_ms: float


@dataclass(frozen=True)
class StageBenchReport:
    """Measured times of stages next to predicted ones.

    Attributes:
        model: name of the model.
        device: name of the device.
        tp: devices of each of the stages.
        workload: context and prompt.
        stages: each stage alone.
        decode_bytes: bytes that move from a stage to the next with a decoded token.
        decode_transfer_ms: measured milliseconds of moving them, between the two stages where it takes most.
        prefill_bytes: bytes that move with the prompt.
        prefill_transfer_ms: measured milliseconds of moving them, between the two stages where it takes most.
    """

    model: str
    device: str
    tp: list[int]
    workload: Workload
    stages: list[StageTimes]
    decode_bytes: int
    decode_transfer_ms: float
    prefill_bytes: int
    prefill_transfer_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        workload, layout = self.workload, describe_layout(self.tp, pp=len(self.stages))
        title = (
            f"{self.model} at {layout} on {self.device}, {workload.dtype}; "
            f"decode at {workload.context} tokens, prefill of {workload.prompt_len}; ms of each stage alone"
        )
        numbers = ("stage", "layers", "decode", "predicted", "prefill", "predicted")
        table = plain_table(title, numbers=numbers)
        for number, one in enumerate(self.stages, 1):
            times = (one.decode_ms, one.decode_plan_ms, one.prefill_ms, one.prefill_plan_ms)
            layers = f"{one.layers[0]} to {one.layers[1] - 1}"
            table.add_row(str(number), layers, *(f"{ms:.2f}" for ms in times))
        moved = (
            f"to the next stage: {self.decode_bytes} bytes of a decoded token, "
            f"{self.decode_transfer_ms:.2f} ms; {self.prefill_bytes} of the prompt, "
            f"{self.prefill_transfer_ms:.2f} ms"
        )
        return Group(table, Text(moved))


def run(
    runner: Any,
    model: str,
    config: ModelConfig,
    hardware: Mapping[int, Hardware],
    workload: Workload,
    rounds: int | None,
) -> StageBenchReport:
    """Times each stage of a runner alone, and the transfers between two.

    Each of several processes calls it, and times its own stages and what comes to them, while the others
    wait: they run nothing for process 0 then.

    Args:
        runner: a pipeline with room for the context and the prompt, which fits one chunk.
        model: name of the model.
        config: its architecture.
        hardware: figures of this machine at each number of devices that a stage here has.
        workload: context and prompt.
        rounds: passed to :func:`best_s`.
    """
    stages = _stages(runner)
    calls, moved = _calls(stages, workload)
    own = {name: 1e3 * seconds for name, seconds in best_s(calls, rounds, start=barrier).items()}
    predicted = _predicted_ms(stages, config, hardware, workload)
    everywhere = [json.loads(one) for one in gather(json.dumps([own, predicted]).encode())]

    def of(stage: Stage, name: str) -> tuple[float, float]:
        """Returns what the process of a stage has measured and, of the stage itself, predicted."""
        measured, plan = everywhere[stage.mesh.devices.flat[0].process_index]
        return measured[name], plan.get(name, 0.0)

    times = [
        StageTimes(
            (stage.layers.start, stage.layers.stop),
            *of(stage, f"decode {number}"),
            *of(stage, f"prefill {number}"),
        )
        for number, stage in enumerate(stages)
    ]
    slowest = {
        kind: max(of(stage, f"{kind} to {number}")[0] for number, stage in enumerate(stages) if number)
        for kind in moved
    }
    return StageBenchReport(
        model,
        next(iter(hardware.values())).name,
        [stage.mesh.size for stage in stages],
        workload,
        times,
        moved["decode"],
        slowest["decode"] / _SENT,
        moved["prefill"],
        slowest["prefill"] / _SENT,
    )


def _stages(runner: Any) -> list[Stage]:
    """Returns the stages of a runner; the last one is one that no other process runs too."""
    last = Stage(runner.model, runner.mesh, runner.limits, runner.dtype, kv_dtype=runner.kv_dtype)
    return [*runner.stages[:-1], last]


def _calls(
    stages: Sequence[Stage], workload: Workload
) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Returns what is timed, by name, and the bytes that move with a decoded token and with the prompt."""
    calls: dict[str, Callable[[], Any]] = {}
    moved: dict[str, int] = {}
    for kind, (spec, *arguments) in _steps(stages[-1], workload).items():
        inputs = _tokens(stages[0])
        for number, stage in enumerate(stages[:-1]):
            (hidden,) = stage.run(stage.own(spec), arguments[0], inputs)
            calls[f"{kind} {number}"] = partial(stage.run, stage.own(spec), arguments[0], inputs)
            calls[f"{kind} to {number + 1}"] = partial(_send, stage, spec, hidden)
            inputs, moved[kind] = stage.send(spec, hidden), hidden.nbytes
        calls[f"{kind} {len(stages) - 1}"] = partial(stages[-1].run, spec, *arguments, inputs)
    return calls, moved


def _send(stage: Stage, spec: ProgramSpec, hidden: jax.Array) -> list[jax.Array]:
    return [stage.send(spec, hidden) for _ in range(_SENT)]


def _predicted_ms(
    stages: Sequence[Stage], config: ModelConfig, hardware: Mapping[int, Hardware], workload: Workload
) -> dict[str, float]:
    """Predicts the stages of this process, by the names of :func:`_calls`."""
    tokens = {
        "decode": StepTokens(1, workload.context),
        "prefill": StepTokens(chunks=((0, workload.prompt_len),)),
    }
    predicted = {}
    for number, stage in enumerate(stages):
        if not is_local(stage.mesh):
            continue
        tp = stage.mesh.size
        for kind, one in tokens.items():
            layers = layer_seconds(config, tp, workload.itemsizes, hardware[tp], one)
            predicted[f"{kind} {number}"] = 1e3 * sum(layers[i] for i in stage.layers)
    return predicted


def _steps(last: Stage, workload: Workload) -> dict[str, tuple[Any, ...]]:
    """Returns the last stage's program and host arguments of a decode step and of a prompt."""
    limits, greedy = last.limits, SamplingParams(temperature=0)
    decode = ProgramSpec.decode(last.decode_shapes_for([workload.context])[0], greedy=True)
    pages = [list(range(1, 1 + limits.blocks)) for _ in limits.windows]
    row = Row(0, workload.context - 1, pages, greedy, seed=0)
    chunk = Chunk(Row(0, 0, pages, greedy, seed=0), [0] * workload.prompt_len)
    shape = limits.fitting([chunk.span])
    packed, _ = PackedStep.pack([], [chunk], limits, 0, shape)
    return {
        "decode": (decode, PackedRows.pack([row], limits, decode.batch), np.int32(1)),
        "prefill": (ProgramSpec("step", 0, shape), packed),
    }


def _tokens(stage: Stage) -> jax.Array:
    """Returns the last token of each slot, as the first stage takes it."""
    tokens = np.zeros(stage.limits.max_slots + 1, np.int32)
    sharding = NamedSharding(stage.mesh, REPLICATED)
    return jax.make_array_from_callback(
        tokens.shape, sharding, lambda index: tokens[index], dtype=tokens.dtype
    )
