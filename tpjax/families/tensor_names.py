"""What checkpoints call a model's tensors, and how they lay them out.

Canonical names and layouts are those of Hugging Face's Llama, without the ``model.`` prefix. A family whose
checkpoints differ describes the differences as a :class:`WeightMap`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, eq=False)
class TensorMapping:
    """Where a checkpoint keeps a tensor.

    Attributes:
        name: of the module or tensor in the checkpoint.
        rows: for each of our rows, which stored row it is; ``None``: the same.
        size: stored rows, where ``rows`` is given.
        transposed: stored as [in, out].
        heads: stored as [heads, head_dim], while ours has one axis; ``None``: not.
        offset: stored values have this much added.
        place: stored in a stack of like tensors, at this place of its first axis; ``None``: not.
        count: tensors of that stack.
    """

    name: str
    rows: np.ndarray | None = None
    size: int = 0
    transposed: bool = False
    heads: int | None = None
    offset: float = 0.0
    place: int | None = None
    count: int = 0

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The stored tensor's shape, from ours."""
        if self.heads is not None:
            return (self.heads, ours[0] // self.heads)
        stored = ours if self.rows is None else (self.size, *ours[1:])
        stored = stored[::-1] if self.transposed else stored
        return stored if self.place is None else (self.count, *stored)


@dataclass(frozen=True)
class WeightMap:
    """What a checkpoint calls the model's tensors; whatever is not mentioned has its canonical name.

    Attributes:
        modules: where a module's tensors are kept, by canonical name, without ``layers.N.``; or a single
            tensor, by its whole name.
        layers: the list of layers.
        prefixes: what stands before the model's tensors, and before ``lm_head``; the first pair that fits.
        ignored: patterns of tensor names that may be in a checkpoint and are not needed.
    """

    modules: Mapping[str, TensorMapping] = field(default_factory=dict)
    layers: str = "layers"
    prefixes: tuple[tuple[str, str], ...] = (("model.", ""),)
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)

    def locate(self, canonical: str, prefix: tuple[str, str] = ("", "")) -> TensorMapping:
        """The stored tensor of a canonical name, ``layers.0.mlp.up_proj.weight`` say."""
        parts = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(\w+)", canonical)
        assert parts is not None, canonical
        layer, module, kind = parts.groups()
        stored = self.modules.get(f"{module}.{kind}")
        if stored is None:
            stored = self.modules.get(module, TensorMapping(module))
            stored = replace(stored, name=f"{stored.name}.{kind}")
        path = stored.name if layer is None else f"{self.layers}.{layer}.{stored.name}"
        return replace(stored, name=f"{prefix[module == 'lm_head']}{path}")


def slices(name: str, sizes: Sequence[int], *, transposed: bool = False) -> list[TensorMapping]:
    """Tensors of so many rows that are stored one after another as one."""
    starts = np.cumsum([0, *sizes])
    return [
        TensorMapping(name, np.arange(start, start + size), int(starts[-1]), transposed)
        for start, size in zip(starts, sizes, strict=False)
    ]


def fused_qkv_by_head(name: str, heads: int, head_dim: int) -> list[TensorMapping]:
    """Query, key and value, stored head by head: the first head's query, key and value, then the second's."""
    rows = np.arange(heads * 3 * head_dim).reshape(heads, 3, head_dim)
    return [TensorMapping(name, rows[:, part].reshape(-1), rows.size) for part in range(3)]


def interleaved(name: str, heads: int, head_dim: int, *, by_head: bool = False) -> TensorMapping:
    """Rows of queries or keys made for rotary pairs (2i, 2i + 1), read in the order (i, i + head_dim / 2)."""
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
    return TensorMapping(name, rows, rows.size, heads=heads if by_head else None)
