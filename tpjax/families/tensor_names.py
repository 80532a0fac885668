"""Names and layouts of tensors in checkpoints.

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
    """The place of a tensor in a checkpoint.

    Attributes:
        name: name of the module or tensor in the checkpoint.
        rows: the stored row of each canonical row; ``None``: the same.
        size: number of stored rows, if ``rows`` is set.
        transposed: whether it is stored as [in, out].
        heads: stored as [heads, head_dim], while the canonical tensor has one axis; ``None``: not.
        offset: stored values have this number added.
        place: index in a stack of tensors along the first stored axis; ``None``: it is not in a stack.
        count: number of tensors in that stack.
    """

    name: str
    rows: np.ndarray | None = None
    size: int = 0
    transposed: bool = False
    heads: int | None = None
    offset: float = 0.0
    place: int | None = None
    count: int = 0

    def shape(self, canonical: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the stored tensor, from the canonical one."""
        if self.heads is not None:
            return (self.heads, canonical[0] // self.heads)
        stored = canonical if self.rows is None else (self.size, *canonical[1:])
        stored = stored[::-1] if self.transposed else stored
        return stored if self.place is None else (self.count, *stored)


@dataclass(frozen=True)
class WeightMap:
    """Maps canonical tensor names to a checkpoint's; a module that is not in it has its canonical name.

    Attributes:
        modules: the place of each module's tensors, by its canonical name without ``layers.N.``; or of a
            single tensor, by the name of module and tensor.
        layers: name of the list of layers.
        prefixes: pairs of the prefix of all tensors but ``lm_head``, and of ``lm_head``; the first pair that
            fits a checkpoint is used.
        ignored: patterns of tensor names that a checkpoint may have and the model does not need.
    """

    modules: Mapping[str, TensorMapping] = field(default_factory=dict)
    layers: str = "layers"
    prefixes: tuple[tuple[str, str], ...] = (("model.", ""),)
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)

    def locate(self, canonical: str, prefix: tuple[str, str] = ("", "")) -> TensorMapping:
        """Returns the place of a canonical name, for example ``layers.0.mlp.up_proj.weight``."""
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
    """Returns the places of tensors that are stored one after another as one; ``sizes`` are their rows."""
    starts = np.cumsum([0, *sizes])
    return [
        TensorMapping(name, np.arange(start, start + size), int(starts[-1]), transposed)
        for start, size in zip(starts, sizes, strict=False)
    ]


def fused_qkv_by_head(name: str, heads: int, head_dim: int) -> list[TensorMapping]:
    """Returns the places of q, k and v stored head by head: those of the first head, then of the second."""
    rows = np.arange(heads * 3 * head_dim).reshape(heads, 3, head_dim)
    return [TensorMapping(name, rows[:, part].reshape(-1), rows.size) for part in range(3)]


def interleaved(name: str, heads: int, head_dim: int, *, by_head: bool = False) -> TensorMapping:
    """Returns the place of queries or keys stored for rotary pairs (2i, 2i + 1), not (i, i + half)."""
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
    return TensorMapping(name, rows, rows.size, heads=heads if by_head else None)
