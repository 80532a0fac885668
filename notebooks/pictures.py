"""Pictures for the notebooks: which device holds what. A colour a device, grey for what all of them hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from tpjax.sharding import HeadPlan

# Okabe and Ito's palette: the colour-blind tell them apart too
DEVICES = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#D55E00", "#8C6D46")
ALL = "#CFCFCF"

plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})


@dataclass(frozen=True)
class Matrix:
    """A matrix in a picture, element by element.

    Attributes:
        name: written under it.
        rows: of elements.
        columns: of elements.
        sharded: ``columns`` or ``rows`` over the devices; ``None``: not sharded.
        owner: the device that has all of it; ``None``: all devices have it, or what ``sharded`` says.
        held: the rows that are not zeros, which look empty; ``None``: all rows.
    """

    name: str
    rows: int
    columns: int
    sharded: str | None = None
    owner: int | None = None
    held: frozenset[int] | None = None

    def device(self, row: int, column: int, devices: int) -> int | None:
        """The device that has an element; ``None``: all of them."""
        if self.sharded == "columns":
            return column * devices // self.columns
        return row * devices // self.rows if self.sharded == "rows" else self.owner


def draw(*parts: Matrix | str, devices: int = 4, title: str = "") -> None:
    """Draws matrices, and what stands between them, in one line."""
    matrices = [part for part in parts if isinstance(part, Matrix)]
    height = max(matrix.rows for matrix in matrices)
    width = sum(_room(part) for part in parts)
    scale = min(0.25, 10 / width)
    _, axes = plt.subplots(figsize=(scale * width, scale * height + 0.55 + 0.25 * bool(title)))
    left, seen = 0.0, set()
    for part in parts:
        if isinstance(part, str):
            axes.text(left + _room(part) / 2 - 0.3, height / 2, part, ha="center", va="center", fontsize=12)
        else:
            top = (height - part.rows) / 2
            for row in range(part.rows):
                empty = part.held is not None and row not in part.held
                for column in range(part.columns):
                    if empty:
                        _box(axes, left + column, top + row, 1, 1, None).set(
                            facecolor="none", edgecolor="#DDDDDD"
                        )
                        continue
                    device = part.device(row, column, devices)
                    seen.add(device)
                    _box(axes, left + column, top + row, 1, 1, device)
            label = f"{part.name}\n{part.rows}×{part.columns}".strip()
            middle = left + part.columns / 2
            axes.text(middle, top + part.rows + 0.25, label, ha="center", va="top", fontsize=9)
        left += _room(part)
    axes.set_aspect("equal")
    _finish(axes, left - 0.6, height, title, seen)


def draw_arrays(arrays: dict[str, jax.Array], title: str = "") -> None:
    """Draws matrices as they lie on the devices, read from their shardings. Sizes are not to scale."""
    _, axes = plt.subplots(figsize=(2.1 * len(arrays) + 1, 2.5))
    seen: set[int | None] = set()
    for place, (name, array) in enumerate(arrays.items()):
        rows, columns = array.shape
        high, wide = (max(2.0, size**0.3) for size in (rows, columns))
        high, wide = (10 * size / max(high, wide) for size in (high, wide))
        left, above = 13.0 * place + (10 - wide) / 2, (10 - high) / 2
        for ((top, bottom), (first, last)), holders in _holders(array).items():
            device = holders[0] if len(holders) == 1 else None
            seen.add(device)
            x, y = left + wide * first / columns, above + high * top / rows
            across, down = wide * (last - first) / columns, high * (bottom - top) / rows
            _box(axes, x, y, across, down, device)
            if device is not None:
                axes.text(x + across / 2, y + down / 2, device, ha="center", va="center", fontsize=9)
        (shard,) = {shard.data.shape for shard in array.addressable_shards}
        label = f"{name}\n{rows}×{columns}\neach: {shard[0]}×{shard[1]}"
        axes.text(13 * place + 5, 10.4, label, ha="center", va="top", fontsize=9)
    _finish(axes, 13 * len(arrays) - 3, 13, title, seen)


def draw_heads(plan: HeadPlan) -> None:
    """Draws the attention heads that each device computes; hatched places are padding."""
    slot = 1 + plan.group_size + 0.4
    width = slot * plan.head_slots_per_device
    _, axes = plt.subplots(figsize=(1 + 0.55 * width, 0.4 * plan.tp + 0.3))
    for number, (kv_head, heads) in enumerate(plan.head_slots):
        device, nth = divmod(number, plan.head_slots_per_device)
        names = [
            None if kv_head is None else f"kv{kv_head}",
            *(None if q is None else f"q{q}" for q in heads),
        ]
        for column, name in enumerate(names):
            left = nth * slot + column
            box = _box(axes, left, 1.2 * device, 0.95, 1, device)
            if name is None:
                box.set(facecolor="white", edgecolor="#BBBBBB", hatch="////")
            elif column:
                box.set_alpha(0.5)
            axes.text(left + 0.47, 1.2 * device + 0.5, name or "", ha="center", va="center", fontsize=9)
    for device in range(plan.tp):
        axes.text(-0.15, 1.2 * device + 0.5, f"device {device}", ha="right", va="center", fontsize=9)
    title = f"{plan.num_heads} query and {plan.num_kv_heads} KV heads, tp={plan.tp}"
    _finish(axes, width, 1.2 * plan.tp, title, ())


def _room(part: Matrix | str) -> float:
    return part.columns + 0.6 if isinstance(part, Matrix) else 1 + 0.65 * len(part)


def _holders(array: jax.Array) -> dict[tuple[tuple[int, int], ...], list[int]]:
    """The devices that hold each part of an array: (first, end) along each dimension."""
    holders = defaultdict(list)
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        part = tuple(part.indices(size)[:2] for part, size in zip(index, array.shape, strict=True))
        holders[part].append(device.id)
    return holders


def _box(axes: Axes, left: float, top: float, wide: float, high: float, device: int | None) -> Rectangle:
    colour = ALL if device is None else DEVICES[device]
    return axes.add_patch(Rectangle((left, top), wide, high, facecolor=colour, edgecolor="white", lw=1))


def _finish(axes: Axes, width: float, height: float, title: str, seen: Iterable[int | None]) -> None:
    """Fits the axes, and names the colours where some device has a part of its own."""
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.set_title(title, fontsize=10)
    devices = sorted(device for device in seen if device is not None)
    if devices:
        names = {f"device {device}": DEVICES[device] for device in devices}
        names |= {"all of them": ALL} if None in seen else {}
        boxes = [Rectangle((0, 0), 1, 1, color=colour) for colour in names.values()]
        style = {"frameon": False, "fontsize": 9, "handlelength": 1}
        axes.legend(boxes, names, loc="center left", bbox_to_anchor=(1, 0.5), **style)
    plt.show()
