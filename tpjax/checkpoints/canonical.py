"""A checkpoint's tensors by canonical names, whatever it calls them and however it lays them out."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from tpjax.checkpoints import agreement
from tpjax.checkpoints.quantized import Part
from tpjax.checkpoints.source import TensorInfo, TensorSource
from tpjax.config import ModelConfig
from tpjax.families.tensor_names import TensorMapping, WeightMap
from tpjax.layers.weights import (
    WeightFormat,
)

_ReadBox: TypeAlias = Callable[[tuple[slice, ...], np.ndarray | None], np.ndarray]
ENDS = ("embed_tokens.weight", "lm_head.weight")


class CanonicalSource:
    """A checkpoint's tensors by canonical names.

    Args:
        files: the tensors as they are stored.
        names: the weight map.
        config: the architecture. If it ties embedding and head and only the head is stored, that is both.
        unlisted: names of tensors that the checkpoint's index does not list.

    Attributes:
        stored: the checkpoint's tensors that are not ignored, by its own names.
        layer: matches the beginning of the name of a layer's tensor; its group is the layer's number.
    """

    def __init__(
        self,
        files: TensorSource,
        names: WeightMap,
        config: ModelConfig,
        unlisted: frozenset[str] = frozenset(),
    ) -> None:
        self._files = files
        self._names = names
        self._unlisted = unlisted
        candidates = (*names.prefixes, ("", ""))  # a bare backbone (AutoModel.save_pretrained) has none
        self._parts: Mapping[str, WeightFormat] = getattr(files, "formats", {})
        self._by_outputs: frozenset[str] = getattr(files, "by_outputs", frozenset())
        self._prefix = next(
            (
                prefix
                for probe in ("embed_tokens.weight", "norm.weight")
                for prefix in candidates
                if names.locate(probe, prefix).name in files.tensors
            ),
            candidates[0],
        )
        self._tied = config.tie_word_embeddings
        own, head = (names.locate(name, self._prefix).name for name in ENDS)
        self._embedding = ENDS[self._tied and own not in files.tensors and head in files.tensors]
        self.layer = re.compile(re.escape(f"{self._prefix[0]}{names.layers}.") + r"(\d+)\.")
        ignored = [re.compile(pattern) for pattern in (*names.ignored, *agreement.BUFFERS)]
        if self._tied and self._embedding != ENDS[1]:
            ignored.append(re.compile(re.escape(head)))
        self.stored: Mapping[str, TensorInfo] = {
            name: info
            for name, info in files.tensors.items()
            if not any(pattern.fullmatch(name) for pattern in ignored)
        }

    def locate(self, name: str) -> TensorMapping:
        """Returns the place of a tensor in the checkpoint."""
        at = self._names.locate(self._embedding if name == ENDS[0] else name, self._prefix)
        return replace(at, transposed=False) if at.transposed and at.name in self._by_outputs else at

    def has_other_head(self) -> bool:
        """Returns whether embedding and head are both stored and differ; reads up to the first difference."""
        own, head = (self._names.locate(name, self._prefix).name for name in ENDS)
        both = own in self._files.tensors and head in self._files.tensors
        return both and not agreement.are_equal(self._files, own, head)

    def classify(self, unexpected: list[str], needed: Collection[str]) -> tuple[list[str], list[str]]:
        """Splits tensors that the model does not need into those to reject and those to ignore.

        A bias of zeros is ignored: older GPTQ tools write one for each matrix.
        """
        prefixes = {part for pair in (*self._names.prefixes, ("", "")) for part in pair}
        rejected, ignored = agreement.rejected_and_ignored(
            unexpected, needed, prefixes, self._names.layers, self._unlisted
        )
        zeros = {name for name in rejected if name.endswith(".bias") and not np.any(self._files.read(name))}
        return [name for name in rejected if name not in zeros], [*ignored, *sorted(zeros)]

    def itemsize(self, name: str) -> int:
        """Returns the bytes of an element in what :meth:`read` returns."""
        return self._files.tensors[self.locate(name).name].dtype.itemsize

    def format_of(self, name: str) -> WeightFormat | None:
        """Returns the format of a tensor that can be kept as it is stored in 8 or 4 bits."""
        at = self.locate(name)
        kept = None if at.offset or at.heads is not None else self._parts.get(at.name)
        # scales belong to outputs: not those of a tensor whose rows are the model's inputs
        return kept if kept and self._files.tensors[at.name].columns_first == at.transposed else None

    def read_part(self, name: str, part: Part, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a box [out, in] of a kept tensor's values, or [out, groups] of scales or zero points."""

        def read(box: tuple[slice, ...], memory: np.ndarray | None = None) -> np.ndarray:
            files: Any = self._files
            found: np.ndarray = files.read_part(self.locate(name).name, part, box)
            return found

        return self._selected(self.locate(name), index, None, read)

    def outer_axis(self, name: str) -> int:
        """Returns the axis along which a tensor is stored slice after slice: such slices are read fastest."""
        at = self.locate(name)
        stored = self._files.tensors[at.name]
        axes = len(stored.shape) - (at.place is not None)
        return int(axes == 2 and at.heads is None and at.transposed != stored.columns_first)

    def read(self, name: str, index: tuple[slice, ...], memory: np.ndarray | None = None) -> np.ndarray:
        """Reads a slice of a tensor, and no more of the file than it spans there.

        Args:
            name: canonical name.
            index: the slice.
            memory: an array for the result, used if it can be read straight into it.
        """
        at = self.locate(name)
        if at.heads is not None:
            values = self._files.read(at.name).reshape(-1)
            return (values if at.rows is None else values[at.rows])[index]
        read = partial(self._files.read, at.name)
        values = self._selected(at, index, None if at.offset else memory, read)
        return values - at.offset if at.offset else values

    def _selected(
        self, at: TensorMapping, index: tuple[slice, ...], memory: np.ndarray | None, read: _ReadBox
    ) -> np.ndarray:
        """Reads the rows of an index in their order."""
        if at.rows is None:
            return self._ordered(at, index, memory, read)
        wanted = at.rows[index[0]]
        first = int(wanted.min())
        values = self._ordered(at, (slice(first, int(wanted.max()) + 1), *index[1:]), None, read)
        if len(values) != len(wanted) or np.any(np.diff(wanted) != 1):
            values = values[wanted - first]
        return values

    def _ordered(
        self, at: TensorMapping, index: tuple[slice, ...], memory: np.ndarray | None, read: _ReadBox
    ) -> np.ndarray:
        """Reads an index of a tensor that may be transposed, or one of a stack."""
        if at.transposed:
            index, memory = index[::-1], None if memory is None else memory.T
        if at.place is None:
            values = read(index, memory)
        else:
            stacked = None if memory is None else memory[None]
            values = read((slice(at.place, at.place + 1), *index), stacked)[0]
        return values.T if at.transposed else values
