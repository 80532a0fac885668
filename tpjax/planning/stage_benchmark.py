"""``tpjax bench --pp``: each stage of a pipeline alone on this machine, next to what ``plan`` predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tpjax.config import ModelConfig
from tpjax.hardware import Hardware
from tpjax.planning.measure import best_s
from tpjax.planning.plain_table import plain_table
from tpjax.planning.workload import Workload
from tpjax.runtime.layer_split import layer_seconds
from tpjax.step_time import StepTokens


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
        tp: devices of a stage.
        workload: context and prompt.
        stages: each stage alone.
        decode_bytes: bytes that move from a stage to the next with a decoded token.
        decode_transfer_ms: measured milliseconds of moving them.
        prefill_bytes: bytes that move with the prompt.
        prefill_transfer_ms: measured milliseconds of moving them.
    """

    model: str
    device: str
    tp: int
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
        workload = self.workload
        title = (
            f"{self.model} at pp={len(self.stages)} × tp={self.tp} on {self.device}, {workload.dtype}; "
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
    runner: Any, model: str, config: ModelConfig, hardware: Hardware, workload: Workload, rounds: int | None
) -> StageBenchReport:
    """Times each stage of a runner alone, and the transfers between two.

    Args:
        runner: a pipeline with room for the context and the prompt, which fits one chunk.
        model: name of the model.
        config: its architecture.
        hardware: figures of this machine at the stage's tp.
        workload: context and prompt.
        rounds: passed to :func:`best_s`.
    """
    calls: dict[str, Callable[[], Any]] = {}
    moved: dict[str, int] = {}
    for kind, (spec, *arguments) in _steps(runner, workload).items():
        inputs = _tokens(runner)
        for number, (stage, following) in enumerate(pairwise(runner.stages)):
            (hidden,) = stage.run(stage.own(spec), arguments[0], inputs)
            calls[f"{kind} {number}"] = partial(stage.run, stage.own(spec), arguments[0], inputs)
            calls[f"{kind} transfer"] = partial(stage.send, spec, hidden, following.mesh)
            inputs, moved[kind] = stage.send(spec, hidden, following.mesh), hidden.nbytes
        calls[f"{kind} {len(runner.stages) - 1}"] = partial(runner.run, spec, *arguments, inputs)
    measured = {name: seconds * 1e3 for name, seconds in best_s(calls, rounds).items()}
    tokens = {
        "decode": StepTokens(1, workload.context),
        "prefill": StepTokens(chunks=((0, workload.prompt_len),)),
    }
    predicted = {
        kind: layer_seconds(config, runner.mesh.size, workload.itemsizes, hardware, one)
        for kind, one in tokens.items()
    }

    def times(number: int, layers: range) -> StageTimes:
        decode, prefill = (1e3 * sum(predicted[kind][i] for i in layers) for kind in ("decode", "prefill"))
        return StageTimes(
            (layers.start, layers.stop),
            measured[f"decode {number}"],
            decode,
            measured[f"prefill {number}"],
            prefill,
        )

    return StageBenchReport(
        model,
        hardware.name,
        runner.mesh.size,
        workload,
        [times(number, stage.layers) for number, stage in enumerate(runner.stages)],
        moved["decode"],
        measured["decode transfer"],
        moved["prefill"],
        measured["prefill transfer"],
    )


def _steps(runner: Any, workload: Workload) -> dict[str, tuple[Any, ...]]:
    """Returns the last stage's program and host arguments of a decode step and of a prompt."""
    import numpy as np

    from tpjax.runtime.programs import ProgramSpec
    from tpjax.runtime.rows import Chunk, PackedRows, PackedStep, Row
    from tpjax.sampling_params import SamplingParams

    limits, greedy = runner.limits, SamplingParams(temperature=0)
    pages = [list(range(1, 1 + limits.blocks)) for _ in limits.windows]
    row = Row(0, workload.context - 1, pages, greedy, seed=0)
    chunk = Chunk(Row(0, 0, pages, greedy, seed=0), [0] * workload.prompt_len)
    shape = limits.fitting([chunk.span])
    packed, _ = PackedStep.pack([], [chunk], limits, 0, shape)
    return {
        "decode": (ProgramSpec("decode", 1, greedy=True), PackedRows.pack([row], limits, 1), np.int32(1)),
        "prefill": (ProgramSpec("step", 0, shape), packed),
    }


def _tokens(runner: Any) -> Any:
    """Returns the last token of each slot, as the first stage takes it."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    tokens = np.zeros(runner.limits.max_slots + 1, np.int32)
    return jax.device_put(tokens, NamedSharding(runner.stages[0].mesh, PartitionSpec()))
