"""Renders what :func:`tpjax.inspect.explain.explain` found: tables, and a picture of the shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tpjax.inspect.collectives import Collective
from tpjax.inspect.tables import as_html, collective_table, described_dtype
from tpjax.mesh import describe_layout
from tpjax.planning.plain_table import plain_table
from tpjax.runtime.memory import human_bytes
from tpjax.sharding import Content

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FILLS: dict[str, dict[str, Any]] = {
    "held": {"label": "held, each number once", "facecolor": "#4c78a8"},
    "copied": {
        "label": "copies of what another device has",
        "facecolor": "#f2cf8e",
        "edgecolor": "#b07d1e",
        "hatch": "////",
    },
    "zeros": {"label": "zeros: padding", "facecolor": "white", "edgecolor": "#999999", "hatch": "xxxx"},
}


@dataclass(frozen=True)
class TensorRow:
    """A parameter, or the same parameter of every layer.

    Attributes:
        name: dotted path; ``*`` stands for every layer.
        count: number of tensors in the row.
        spec: partition spec.
        shape: stored shape, over all devices.
        shard_shape: shape on one device.
        bytes: bytes of all tensors in the row, over all devices.
        bytes_per_device: bytes of all tensors in the row, on one device.
        padding: zeros, as a fraction of the elements in the checkpoint.
        copies: elements that another device holds too, as a fraction of the elements in the checkpoint.
        replicated: whether every device holds all of it.
        why: why it is sharded or replicated.
        devices: bytes held, copied and padded on each device.
    """

    name: str
    count: int
    spec: str
    shape: tuple[int, ...]
    shard_shape: tuple[int, ...]
    bytes: int
    bytes_per_device: int
    padding: float
    copies: float
    replicated: bool
    why: str
    devices: tuple[Content, ...]

    @property
    def title(self) -> str:
        """The name, shortened, and the number of tensors."""
        times = f" ×{self.count}" if self.count > 1 else ""
        return self.name.removeprefix("layers.*.").removesuffix(".weight") + times


@dataclass(frozen=True)
class Step:
    """A compiled program and its budget. Bytes are those on one device.

    Attributes:
        name: ``decode`` or ``prefill``.
        tokens: tokens it computes in one call.
        collectives: its collectives, merged by the source line they come from.
        budget: collectives that the design allows it.
        argument_bytes: weights, cache and requests, as the compiler lays them out.
        temporary_bytes: temporaries.
        aliased_bytes: arguments that are updated in place.
    """

    name: str
    tokens: int
    collectives: list[Collective]
    budget: dict[str, Any]
    argument_bytes: int
    temporary_bytes: int
    aliased_bytes: int

    @property
    def title(self) -> str:
        """The name in tables."""
        return "a decode step" if self.name == "decode" else f"prefill of {self.tokens}"


@dataclass(frozen=True, repr=False)
class Report:
    """A sharded model. Rich renders it in a terminal, ``_repr_html_`` in a notebook.

    Attributes:
        model: name of the model.
        model_type: its family.
        tp: number of devices of a replica.
        dp: number of replicas; all else is that of one.
        platform: kind of the devices.
        dtype: dtype of activations, and of weights and cache that are not quantised.
        quantize: what quantised weights are kept in; ``None``: none are.
        kv_dtype: what keys and values are kept in; ``auto``: ``dtype``.
        attention: what computes attention, and why.
        heads: the head plan, and a sentence about it.
        experts: how experts are sharded, and why; ``None`` if the model has none.
        tensors: a row for each kind of parameter.
        weight_bytes: bytes of all parameters, over all devices.
        weight_bytes_per_device: bytes of all parameters, on one device.
        cache: shape, spec and bytes of the key-value cache.
        state_bytes_per_device: bytes of last tokens and sampler state.
        workspace_bytes: predicted temporaries of the largest program on one device.
        steps: the compiled decode step of one sequence, and the prefill of the longest chunk.
    """

    model: str
    model_type: str
    tp: int
    dp: int
    platform: str
    dtype: str
    quantize: str | None
    kv_dtype: str
    attention: str
    heads: dict[str, Any]
    experts: dict[str, Any] | None
    tensors: list[TensorRow]
    weight_bytes: int
    weight_bytes_per_device: int
    cache: dict[str, Any]
    state_bytes_per_device: int
    workspace_bytes: int
    steps: list[Step]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Returns the report of what :meth:`to_dict` returned, also after it was JSON."""
        tensors = [
            TensorRow(**{**row, "devices": tuple(Content(**one) for one in row["devices"])})
            for row in data["tensors"]
        ]
        steps = [
            Step(**{**step, "collectives": [Collective(**one) for one in step["collectives"]]})
            for step in data["steps"]
        ]
        cache = {**data["cache"], "devices": tuple(Content(**one) for one in data["cache"]["devices"])}
        return cls(**{**data, "tensors": tensors, "cache": cache, "steps": steps})

    def __repr__(self) -> str:
        # the tables are for print (rich) and notebooks
        return f"<Report: {self.model} at {describe_layout(self.tp, self.dp)}>"

    def __rich__(self) -> RenderableType:
        return Group(
            Text(
                f"{self.model} ({self.model_type}) at {describe_layout(self.tp, self.dp)} "
                f"on {self.platform}, {described_dtype(self.dtype, self.quantize, self.kv_dtype)}",
                style="bold",
            ),
            *([Text(self._replicas())] if self.dp > 1 else []),
            Text(self.heads["summary"]),
            *([Text(self.experts["summary"])] if self.experts else []),
            Text(f"attention: {self.attention}"),
            self._tensor_table(),
            Text("zeros and copies: elements on all devices together, beyond the checkpoint's\n"),
            self._reason_table(),
            self._cache_table(),
            Text(self._pages()),
            Text(),
            self._memory_table(),
            *(collective_table(step.title, step.collectives, step.budget) for step in self.steps),
        )

    def _repr_html_(self) -> str:
        return as_html(self)

    def _replicas(self) -> str:
        return (
            f"{self.dp} replicas, each as below on {self.tp} devices of its own; nothing moves between them. "
            f"On all {self.dp * self.tp} devices: {human_bytes(self.dp * self.weight_bytes)} of weights, "
            f"{human_bytes(self.dp * self.cache['bytes'])} of cache"
        )

    def _tensor_table(self) -> Table:
        numbers = ("shape", "on a device", "bytes there", "zeros", "copies")
        table = plain_table("weights", "tensor", "spec", numbers=numbers)
        for row in self.tensors:
            table.add_row(
                row.title,
                row.spec,
                dims(row.shape),
                dims(row.shard_shape),
                human_bytes(row.bytes_per_device),
                f"+{row.padding:.0%}" if row.padding else "",
                f"+{row.copies:.0%}" if row.copies else "",
            )
        table.add_section()
        table.add_row("all", "", "", "", human_bytes(self.weight_bytes_per_device))
        table.add_row("all, on all devices", "", "", "", human_bytes(self.weight_bytes))
        return table

    def _reason_table(self) -> Table:
        table = plain_table("why", "tensor", "reason")
        by_reason: dict[str, list[str]] = {}
        for row in self.tensors:
            by_reason.setdefault(row.why, []).append(row.title.split(" ×")[0])
        for why, names in by_reason.items():
            table.add_row("\n".join(dict.fromkeys(names)), why)
        return table

    def _cache_table(self) -> Table:
        cache = self.cache
        placement = cache["spec"] if cache["spec"] == "replicated" else f"sharded {cache['spec']}"
        table = plain_table("KV cache", "", numbers=("all devices", "each device"))
        rows = [("a token", "bytes_per_token"), ("in all", "bytes")]
        if len(cache["page_groups"]) > 1:
            rows.insert(1, ("a token that no window sees", "bytes_per_past_token"))
        for what, name in rows:
            table.add_row(what, human_bytes(cache[name]), human_bytes(cache[f"{name}_per_device"]))
        table.add_row(
            f"{cache['buffers']} buffers, {placement}",
            dims(cache["shape"]),
            dims(cache["shard_shape"]),
        )
        return table

    def _pages(self) -> str:
        cache, groups = self.cache, self.cache["page_groups"]
        text = f"{cache['num_pages']} pages of {cache['page_size']} positions; {cache['why']}"
        if len(groups) == 1:
            return text
        kinds = {group["window"]: [0, 0] for group in groups}
        for group in groups:
            kinds[group["window"]][0] += 1
            kinds[group["window"]][1] += group["layers"]
        parts = [
            f"{layers} layers that see {'all keys' if window is None else f'{window} keys'} take "
            f"{count} pages a block"
            for window, (count, layers) in kinds.items()
        ]
        return f"{text}; {', '.join(parts)}; pages before a window are given back"

    def _memory_table(self) -> Table:
        titles = [step.title for step in self.steps]
        table = plain_table("memory of a device", "what", numbers=("predicted", *titles))
        parts = {
            "weights": self.weight_bytes_per_device,
            "KV cache": self.cache["bytes_per_device"],
            "sampler's state": self.state_bytes_per_device,
        }
        for what, size in parts.items():
            table.add_row(f"  {what}", human_bytes(size))
        arguments = [human_bytes(step.argument_bytes) for step in self.steps]
        table.add_row("argument bytes", human_bytes(sum(parts.values())), *arguments)
        temporaries = [human_bytes(step.temporary_bytes) for step in self.steps]
        table.add_row("temporary bytes", f"about {human_bytes(self.workspace_bytes)}", *temporaries)
        in_place = [human_bytes(step.aliased_bytes) for step in self.steps]
        kept = parts["KV cache"] + parts["sampler's state"]
        table.add_row("updated in place", human_bytes(kept), *in_place)
        return table

    def figure(self) -> Figure:
        """Draws the shards: a row per kind of tensor, a column per device, widths by bytes.

        Needs matplotlib. The cache's row has a scale of its own.
        """
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

        rows = [(row.title, row.devices, row.bytes_per_device) for row in self.tensors]
        cache = ("KV cache (own scale)", self.cache["devices"], self.cache["bytes_per_device"])
        widest = max(size for *_, size in rows)
        figure = Figure(
            figsize=(3.6 + min(max(1.1 * self.tp, 4.5), 13), 1.7 + 0.3 * (len(rows) + 1.5)),
            layout="constrained",
        )
        axes = figure.subplots()
        for y, (_, devices, _) in enumerate(rows):
            _draw(axes, y, devices, widest)
        _draw(axes, len(rows) + 0.5, cache[1], cache[2])
        named = [(float(y), row) for y, row in enumerate(rows)] + [(len(rows) + 0.5, cache)]
        axes.set_yticks([y for y, _ in named], [title for _, (title, *_) in named])
        sizes = axes.secondary_yaxis("right")
        sizes.set_yticks([y for y, _ in named], [human_bytes(size) for _, (*_, size) in named])
        sizes.tick_params(length=0)
        axes.annotate("on each device", (1, 1), (4, 4), xycoords="axes fraction", textcoords="offset points")
        axes.set_xticks([device + 0.45 for device in range(self.tp)], [str(n) for n in range(self.tp)])
        axes.xaxis.tick_top()
        axes.set_xlabel("device")
        axes.xaxis.set_label_position("top")
        axes.tick_params(length=0)
        axes.tick_params(axis="x", labelsize="small" if self.tp <= 32 else 6)
        axes.set(xlim=(-0.05, self.tp - 0.05), ylim=(len(rows) + 1.05, -0.55))
        axes.spines[:].set_visible(False)
        sizes.spines[:].set_visible(False)
        size = human_bytes(self.weight_bytes_per_device)
        figure.suptitle(
            f"{self.model} at tp={self.tp}: {size} of {self.quantize or self.dtype} weights on each device",
            fontsize=11,
        )
        figure.legend(
            handles=[Patch(**fill) for fill in _FILLS.values()],
            loc="outside lower center",
            ncols=3,
            frameon=False,
            fontsize=8,
        )
        return figure


def dims(shape: Sequence[int]) -> str:
    """Writes a shape as ``2×3``."""
    return "×".join(map(str, shape))


def _draw(axes: Any, y: float, devices: Sequence[Content], widest: int) -> None:
    """Draws a row of the picture: a bar for each device, of width 0.9 for ``widest`` bytes."""
    for device, content in enumerate(devices):
        axes.broken_barh([(device, 0.9)], (y - 0.36, 0.72), facecolor="#f4f4f4")
        left = float(device)
        for name, fill in _FILLS.items():
            width = 0.9 * getattr(content, name) / widest
            if width:
                # the few bytes of a norm have to be visible, however many columns there are
                width = max(width, 0.012 * max(1, len(devices) / 8))
                style = {key: value for key, value in fill.items() if key != "label"}
                axes.broken_barh([(left, width)], (y - 0.36, 0.72), linewidth=0, **style)
            left += width
