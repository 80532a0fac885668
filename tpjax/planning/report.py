"""Renders plans: tables in a terminal, and a picture of throughput against latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tpjax.planning.plain_table import plain_table
from tpjax.planning.plan import Plan, frontier
from tpjax.planning.plots import save
from tpjax.planning.strategies import Comparison
from tpjax.step_time import Cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation


@dataclass(frozen=True)
class PlanReport:
    """All plans for a model, chips and workload.

    Attributes:
        plans: one plan for each tp.
        best: the recommended plan.
        reason: why it is recommended.
        comparison: other strategies for the chips; ``None`` if a single tp was asked for.
    """

    plans: Sequence[Plan]
    best: Plan
    reason: str
    comparison: Comparison | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures of the recommended plan and, if there are others, of those too."""
        data = self.best.to_dict()
        if self.comparison is not None:
            data["recommended"] = {"tp": self.best.tp, "reason": self.reason}
            data["plans"] = [plan.to_dict() for plan in self.plans]
            data["strategies"] = self.comparison.to_dict()
        return data

    def __rich__(self) -> RenderableType:
        best, workload = self.best, self.best.workload
        hardware, counts = best.hardware, best.model.counts
        devices = f", {best.devices} devices" * (best.devices != best.chips)
        head = (
            f"{counts.name} ({counts.parameters / 1e9:.2f} B parameters, {workload.dtype}) "
            f"on {best.chips} × {hardware.name}{devices}"
        )
        what = (
            f"{workload.batch} sequence{'s' * (workload.batch > 1)} of {workload.context} tokens at once, "
            f"prompts of {workload.prompt_len}; figures: {hardware.source}"
        )
        parts: list[RenderableType] = [Text(head, style="bold"), Text(what)]
        if hardware.shared:
            parts.append(
                Text("faked devices share this machine's bandwidth and cores: no tp makes it faster")
            )
        parts.append(self._memory())
        for title, name in (("decode, ms a step", "decode"), ("prefill, ms a prompt", "prefill")):
            parts.append(self._time(title, name))
        parts.append(self._speed())
        if self.comparison is not None:
            parts.extend((self._strategies(), Text(self.comparison.verdict)))
        parts.append(Text(f"recommended: {self.reason}", style="bold"))
        return Group(*parts)

    def _memory(self) -> Table:
        held = ("tp", "replicas", "weights", "cache", "work", "all")
        table = plain_table("memory, GB a device", numbers=(*held, "usable", "room: batch", "or context"))
        for plan in self.plans:
            memory = plan.memory
            table.add_row(
                str(plan.tp),
                str(plan.replicas),
                *(f"{n / 1e9:.2f}" for n in (memory.weights, memory.cache, memory.workspace, memory.total)),
                f"{plan.model.hardware.usable_bytes / 1e9:.1f}" if plan.fits else "does not fit",
                str(plan.replicas * plan.model.largest_batch(plan.workload.context)),
                str(plan.model.largest_context(plan.batch)),
                style=None if plan.fits else "dim",
            )
        return table

    def _time(self, title: str, name: str) -> Table:
        parts = list(Cost().ms())
        table = plain_table(title, numbers=("tp", *parts, "all"))
        table.add_column("bound")
        for plan in self.plans:
            cost: Cost = getattr(plan, name)
            table.add_row(
                str(plan.tp),
                *(f"{cost.ms()[part]:.2f}" for part in parts),
                f"{cost.total * 1e3:.2f}",
                cost.bound,
                style=None if plan.fits else "dim",
            )
        return table

    def _speed(self) -> Table:
        numbers = ("tp", "replicas", "a user", "a chip", "all", "full: a user", "a chip")
        table = plain_table("tokens/s", numbers=numbers)
        for plan in self.plans:
            points = frontier(plan)
            table.add_row(
                str(plan.tp),
                str(plan.replicas),
                f"{1 / plan.decode.total:.1f}",
                f"{plan.tokens_per_s / plan.chips:.1f}",
                f"{plan.tokens_per_s:.0f}",
                *((f"{points[-1][1]:.1f}", f"{points[-1][2]:.1f}") if points else ("", "")),
                style=None if plan.fits else "dim",
            )
        return table

    def _strategies(self) -> Table:
        assert self.comparison
        numbers = ("tokens/s", "ms a step", "ms a prompt", "KB moved", "GB a device")
        title = "other ways to use the chips; KB moved by a decoded token: reduced + handed to the next stage"
        table = plain_table(title, "layout", numbers=numbers)
        for one in self.comparison.strategies:
            table.add_row(
                one.layout,
                f"{one.tokens_per_s:.0f}",
                f"{one.step_ms:.2f}",
                f"{one.prefill_ms:.1f}",
                " + ".join(f"{size / 1e3:.1f}" for size in (one.reduced_bytes, one.handed_bytes) if size),
                f"{one.bytes_per_device / 1e9:.1f}" + ("" if one.fits else ", does not fit"),
                style=None if one.fits else "dim",
            )
        return table


def plot_frontier(plans: Sequence[Plan], path: Path) -> None:
    """Writes a picture of :func:`draw_frontier`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    draw_frontier(figure.subplots(), plans)
    save(figure, path)


def draw_frontier(axes: Axes, plans: Sequence[Plan]) -> None:
    """Draws tokens/s per chip over tokens/s per user: a line for each tp, a mark for each batch.

    Each line is named where it ends, at a batch of one; batches are written where no other line is better,
    as far as there is room.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    drawn = [(plan, points) for plan in plans if (points := frontier(plan))]
    for colour, (_, points) in enumerate(drawn):
        users, chips = ([point[axis] for point in points] for axis in (1, 2))
        axes.plot(users, chips, "o-", ms=3.5, color=f"C{colour}")
    best = plans[0]
    axes.set(
        yscale="log",
        xlabel="tokens/s per user",
        ylabel="tokens/s per chip",
        title=(
            f"{best.model.counts.name} on {best.chips} × {best.model.hardware.name}, {best.workload.dtype}, "
            f"context {best.workload.context}\nnumbers: batch over all replicas"
        ),
    )
    axes.title.set_fontsize("medium")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12, y=0.14)
    labels: list[Annotation] = []
    for colour, (plan, points) in enumerate(drawn):
        name = f"tp={plan.tp}" + (f"\n{plan.replicas} replicas" if plan.replicas > 1 else "")
        _, user, chip = points[0]
        style = {"color": f"C{colour}", "fontsize": 8, "fontweight": "bold"}
        _annotate(axes, labels, name, (user, chip), (0, -6), ha="center", va="top", **style)
    everywhere = [(user, chip) for _, points in drawn for _, user, chip in points]
    for _, points in reversed(drawn):
        for batch, user, chip in points:
            if not any(other > user and rate > chip for other, rate in everywhere):
                _annotate(axes, labels, f"{batch:,}", (user, chip), (4, 3), fontsize=7, color="#555555")


def _annotate(
    axes: Axes,
    others: list[Annotation],
    text: str,
    at: tuple[float, float],
    shift: tuple[int, int],
    **style: Any,
) -> None:
    """Writes at a point, ``shift`` points away, unless that would overlap the other labels."""
    label = axes.annotate(text, at, shift, textcoords="offset points", **style)
    room = label.get_window_extent().padded(2)
    if any(room.overlaps(other.get_window_extent()) for other in others):
        label.remove()
    else:
        others.append(label)
