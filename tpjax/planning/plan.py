"""Which tp to serve a model at: the cost of each that divides the devices, and the one to take.

The formulas are in ``tpjax.step_time`` and ``cost_model``. Times are seconds inside, milliseconds in results.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from tpjax.config import ExpertAxis
from tpjax.errors import ConfigError
from tpjax.hardware import Hardware
from tpjax.planning.cost_model import CostModel, MemoryUse
from tpjax.planning.workload import Workload
from tpjax.runtime.counts import Counts
from tpjax.step_time import Cost

_CLOSE = 0.05  # plans within this of the fastest count as equal, and the one with fewer devices wins


@dataclass(frozen=True)
class Plan:
    """A model sharded over the chips at one tp, and its costs.

    Attributes:
        model: the cost model it was computed with, of a replica that has some of the requests.
        hardware: the chip.
        chips: number of chips, over all replicas.
        workload: the requests planned for.
        decode: a decode step of the fullest replica.
        prefill: a prefill of one prompt.
        memory: memory of one device of the fullest replica.
    """

    model: CostModel
    hardware: Hardware
    chips: int
    workload: Workload
    decode: Cost
    prefill: Cost
    memory: MemoryUse

    @property
    def tp(self) -> int:
        """Devices of one replica."""
        return self.model.tp

    @property
    def devices(self) -> int:
        """Devices of all replicas; a chip may have several."""
        return self.chips * self.hardware.devices_per_chip

    @property
    def replicas(self) -> int:
        """Number of copies of the model."""
        return self.devices // self.tp

    @property
    def full(self) -> CostModel:
        """The cost model where every replica has requests, however few were planned for."""
        model = self.model
        return CostModel(
            model.counts, model.hardware, model.tp, self.workload, model.expert_axis, self.replicas
        )

    @property
    def batch(self) -> int:
        """Sequences on the fullest replica."""
        return math.ceil(self.workload.batch / self.replicas)

    @property
    def fits(self) -> bool:
        """Whether weights, cache and workspace fit in the usable memory of a device."""
        return self.memory.total <= self.model.hardware.usable_bytes

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, all sequences together."""
        return self.workload.batch / self.decode.total

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, ready for JSON."""
        model, workload, device = self.model, self.workload, self.model.hardware
        return {
            "model": model.counts.name,
            "hardware": device.name,
            "chips": self.chips,
            "devices": self.devices,
            "tp": self.tp,
            "replicas": self.replicas,
            **asdict(workload),
            "batch_per_replica": self.batch,
            "experts_sharded_by": model.expert_axis if model.config.moe else None,
            "decode": {
                "step_ms": self.decode.total * 1e3,
                "tokens_per_s_per_sequence": 1 / self.decode.total,
                "tokens_per_s": self.tokens_per_s,
                "tokens_per_s_per_chip": self.tokens_per_s / self.chips,
                "split_ms": self.decode.ms(),
                "bound": self.decode.bound,
            },
            "prefill": {
                "ms": self.prefill.total * 1e3,
                "tokens_per_s": workload.prompt_len / self.prefill.total,
                "split_ms": self.prefill.ms(),
                "bound": self.prefill.bound,
            },
            "memory": {
                "bytes_per_device": self.memory.total,
                "fits": self.fits,
                "usable_bytes": device.usable_bytes,
                "split_bytes": asdict(self.memory),
                "largest_batch": self.replicas * model.largest_batch(workload.context),
                "largest_context": model.largest_context(self.batch),
            },
            "source": device.source,
        }


def make_plan(counts: Counts, hardware: Hardware, chips: int, tp: int, workload: Workload) -> Plan:
    """Computes the plan for one tp. A mixture's experts are sharded along the axis that decodes faster.

    Args:
        counts: the model's element counts.
        hardware: the chip.
        chips: number of chips.
        tp: devices of one replica.
        workload: the requests to plan for.

    Raises:
        ConfigError: the devices are not a multiple of tp.
    """
    devices = chips * hardware.devices_per_chip
    if tp < 1 or devices % tp:
        fitting = ", ".join(map(str, divisors(devices)))
        raise ConfigError(f"{devices} devices are not a multiple of tp={tp}: use tp={fitting}")
    replicas = devices // tp
    batch = math.ceil(workload.batch / replicas)
    axes: list[ExpertAxis] = ["width"]
    moe = counts.config.moe
    if moe and moe.num_experts % tp == 0:
        axes.append("experts")
    busy = min(replicas, workload.batch)
    models = [CostModel(counts, hardware.device, tp, workload, axis, busy) for axis in axes]
    model = min(models, key=lambda model: model.decode(batch, workload.context).total)
    return Plan(
        model,
        hardware,
        chips,
        workload,
        model.decode(batch, workload.context),
        model.prefill(workload.prompt_len),
        model.memory(batch, workload.context),
    )


def make_plans(counts: Counts, hardware: Hardware, chips: int, workload: Workload) -> list[Plan]:
    """Computes the plan for every tp that divides the devices; the other devices are replicas."""
    devices = chips * hardware.devices_per_chip
    return [make_plan(counts, hardware, chips, tp, workload) for tp in divisors(devices)]


def recommend(plans: Iterable[Plan]) -> tuple[Plan, str]:
    """Chooses a plan and says why: the fastest that fits, or a smaller tp within 5% of it.

    Raises:
        ConfigError: no plan fits.
    """
    plans = list(plans)
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        raise ConfigError(does_not_fit(plans[-1]))
    fastest = min(fitting, key=lambda plan: plan.decode.total)
    best = next(plan for plan in fitting if plan.decode.total <= (1 + _CLOSE) * fastest.decode.total)
    if len(fitting) == 1 and len(plans) > 1:
        return best, f"tp={best.tp} is the only one that fits"
    reason = f"tp={best.tp} decodes fastest of those that fit: {best.decode.total * 1e3:.2f} ms a step"
    if best is not fastest:
        reason = (
            f"tp={best.tp} takes {best.decode.total * 1e3:.2f} ms a step, within {_CLOSE:.0%} of "
            f"tp={fastest.tp} ({fastest.decode.total * 1e3:.2f} ms) on fewer devices a replica"
        )
    return best, f"{reason}; most of it is {best.decode.bound}"


def does_not_fit(plan: Plan) -> str:
    """Says by how much a plan does not fit, and what would fit."""
    counts, hardware, workload = plan.model.counts, plan.hardware, plan.workload
    memory, device = plan.memory, hardware.device
    text = (
        f"{counts.name} at tp={plan.tp} needs {memory.total / 1e9:.1f} GB a device "
        f"({memory.weights / 1e9:.1f} of weights, {memory.cache / 1e9:.1f} of cache), "
        f"but {device.name} has {device.usable_bytes / 1e9:.1f} GB usable of {device.memory_bytes / 1e9:.0f}"
    )
    would = []
    if (batch := plan.replicas * plan.model.largest_batch(workload.context)) > 0:
        would.append(f"a batch of {batch}")
        if (context := plan.model.largest_context(plan.batch)) > 0:
            would.append(f"a context of {context}")
    for dtype in ("int8", "int4") if workload.dtype != "stored" else ():  # which is not rounded once more
        smaller = replace(workload, dtype=dtype)
        less = smaller.weight_bytes < workload.weight_bytes
        if less and make_plan(counts, hardware, plan.chips, plan.tp, smaller).fits:
            would.append(f"--dtype {dtype}")
            break
    for more in (2**power for power in range(13) if not hardware.shared):
        chips = math.ceil(more / hardware.devices_per_chip)
        if more > plan.tp and make_plan(counts, hardware, chips, more, workload).fits:
            would.append(f"tp={more}")
            break
    return f"{text}; {' or '.join(would) or 'nothing smaller'} would fit"


def frontier(plan: Plan) -> list[tuple[int, float, float]]:
    """Returns (batch, tokens/s a sequence, tokens/s a chip) for batches from 1 to the largest that fits."""
    model, context = plan.full, plan.workload.context
    largest = model.largest_batch(context)
    batches = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    points = []
    for batch in [*batches, *([largest] if largest else [])]:
        seconds = model.decode(batch, context).total
        points.append((batch * plan.replicas, 1 / seconds, batch * plan.replicas / seconds / plan.chips))
    return points


def divisors(number: int) -> list[int]:
    """Returns the divisors of a positive integer in ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]
