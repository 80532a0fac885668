"""Time and memory of a sharded model on given chips, from formulas alone.

The formulas of time are in :mod:`tpjax.step_time`, which the engine uses too; those of memory are here.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

import jax.numpy as jnp

from tpjax.cache import num_entries, page_groups
from tpjax.config import ExpertAxis, ModelConfig, Quantize
from tpjax.hardware import Hardware
from tpjax.planning.workload import Workload
from tpjax.runtime.counts import Counts, WeightBytes
from tpjax.runtime.limits import PAGE_SIZE
from tpjax.runtime.memory import DeviceMemory, MeshShare, memory_need
from tpjax.step_time import Elements, Itemsizes, StepTime
from tpjax.windows import ONE_GROUP, Windows, pages_held

_MOST_PAGES = 2**20  # of a sequence


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one device, in bytes."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """Weights, cache and workspace together, bytes."""
        return self.weights + self.cache + self.workspace


def _dtype(workload: Workload) -> jnp.dtype:
    """Returns the dtype of activations, and of weights that are not quantised."""
    return jnp.dtype("float32" if workload.dtype == "float32" else "bfloat16")


def _stored(
    counts: Counts, tp: int, expert_axis: ExpertAxis, workload: Workload, platform: str
) -> WeightBytes:
    """Returns the bytes of the weights on one device in the dtype of a workload."""
    quantize: Quantize | None = None
    if workload.dtype in ("int8", "fp8", "int4"):
        quantize = workload.dtype  # type: ignore[assignment]  # just seen
    return counts.bytes_on_device(
        tp,
        expert_axis,
        _dtype(workload),
        quantize,
        stored=workload.dtype == "stored",
        platform=platform,
    )


def _as_stored(sizes: Itemsizes, held: Elements, stored: Elements) -> Itemsizes:
    """Returns the bytes of an element with those of matrices as they are stored, scales included."""
    dense, experts = held.attention + held.mlp, held.experts
    return replace(
        sizes,
        weights=(stored.attention + stored.mlp) / dense,
        experts=stored.experts / experts if experts else None,
    )


class CostModel(StepTime):
    """Computes time and memory of a model sharded over ``tp`` devices.

    Args:
        counts: the model's element counts.
        hardware: one device.
        tp: devices of one replica.
        workload: provides the dtypes; batch and lengths are arguments of each formula.
        expert_axis: the sharded axis of a mixture's experts: each expert's width, or the experts themselves
            if tp divides their number.
        replicas: replicas that step at the same time, for faked devices, which share one machine.
    """

    def __init__(
        self,
        counts: Counts,
        hardware: Hardware,
        tp: int,
        workload: Workload,
        expert_axis: ExpertAxis = "width",
        replicas: int = 1,
    ) -> None:
        share = counts.share(tp, expert_axis)
        self.stored = _stored(counts, tp, expert_axis, workload, hardware.platform)
        sizes = _as_stored(workload.itemsizes, share.held, self.stored.parts)
        super().__init__(share, hardware, sizes, replicas)
        self.counts, self.workload = counts, workload

    def memory(self, batch: int, context: int) -> MemoryUse:
        """Computes the memory of one device of a replica with ``batch`` sequences.

        The cache consists of full pages; sliding layers give back those that no query sees. The workspace is
        what the engine sets aside: temporaries of its largest program, and the sampler's state.
        """
        device = DeviceMemory(int(self.hardware.usable_bytes), platform=self.hardware.platform)
        share = MeshShare(self.config, self.tp, self.stored.parts.total)
        need = memory_need(share, _dtype(self.workload), device, batch)
        return MemoryUse(need.weights, batch * self.sequence_bytes(context), need.workspace + need.sampler)

    def sequence_bytes(self, context: int, layers: ModelConfig | None = None) -> int:
        """Returns the cache bytes of one sequence on one device while it decodes.

        Args:
            context: tokens of the sequence.
            layers: the architecture with the layers of a pipeline's stage only; ``None``: with all.
        """

        def held(windows: Windows, layers: ModelConfig) -> int:
            return pages_held(context, windows, PAGE_SIZE, 1) * self.page_bytes(windows, layers)

        groups = min((ONE_GROUP, page_groups(self.config)), key=lambda windows: held(windows, self.config))
        return held(groups, layers or self.config)

    def page_bytes(self, windows: Windows, layers: ModelConfig | None = None) -> int:
        """Returns the bytes of a page on one device; ``layers`` as in :meth:`sequence_bytes`."""
        return int(PAGE_SIZE * num_entries(layers or self.config, windows) * self.token_bytes)

    def largest_batch(self, context: int) -> int:
        """Returns how many sequences of that length fit a replica."""
        usable = self.hardware.usable_bytes
        most = int(usable // self.sequence_bytes(context))
        return bisect_right(range(1, most + 1), usable, key=lambda batch: self.memory(batch, context).total)

    def largest_context(self, batch: int) -> int:
        """Returns the most tokens a sequence at which ``batch`` of them fit, in whole pages.

        Where only the model limits them, since all its layers have a window, its longest context.
        """
        usable = self.hardware.usable_bytes
        most = range(1, _MOST_PAGES)
        pages = bisect_right(most, usable, key=lambda count: self.memory(batch, count * PAGE_SIZE).total)
        return PAGE_SIZE * pages if pages < len(most) else self.config.longest_context
