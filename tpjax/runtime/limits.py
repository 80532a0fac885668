"""Sizes that are fixed at start: slots, context, cache pages, shapes of prompt chunks, and the dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tpjax.config import Dtype, check_choice
from tpjax.errors import ConfigError
from tpjax.windows import ONE_GROUP, Windows, pages_held

MASK_BATCH = 16  # slots whose masks one upload sets, at most
PAGE_SIZE = 128  # positions per cache page
STEPS = {"cpu": 4, "tpu": 4}  # decode steps of one dispatch at most; elsewhere 1
_FEW_SLOTS = 8  # up to here decode batches double, beyond they grow fourfold
_DECODE_SHAPES = 5  # where each is for so many blocks of pages


class ChunkShape(NamedTuple):
    """The prompt chunks of one step: so many, of so many tokens each.

    A prompt takes as many of them as its part of the step needs: its next one continues where the one before
    it ends. A chunk lies within a page, or is whole pages long.
    """

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of all chunks."""
        return self.rows * self.length


class DecodeShape(NamedTuple):
    """What a decode step is compiled for.

    Attributes:
        rows: sequences, padding included.
        blocks: blocks of pages that all of them have together, at most; 0: any number.
    """

    rows: int
    blocks: int = 0

    def holds(self, rows: int, blocks: int) -> bool:
        """Returns whether so many sequences with so many blocks fit."""
        return rows <= self.rows and (not self.blocks or blocks <= self.blocks)


MAX_PROMPT_TOKENS = 2048  # of one step
# A CPU computes every token for itself, so that padding costs time: short prompts get short chunks there. A
# long one gets a long chunk: the page walk of several goes on, for all, to the page that the last one needs.
_CPU_CHUNKS = (
    ChunkShape(1, 32),
    ChunkShape(2, 32),
    ChunkShape(1, 128),
    ChunkShape(4, 32),
    ChunkShape(1, 256),
    ChunkShape(8, 32),
    ChunkShape(1, 512),
)
_CHUNKS = tuple(ChunkShape(rows, 128) for rows in (1, 2, 4, 8, 16))


def chunk_shapes(platform: str) -> tuple[ChunkShape, ...]:
    """Returns the shapes of prompt chunks that steps are compiled for on a platform, smallest first."""
    return _CPU_CHUNKS if platform == "cpu" else _CHUNKS


def mixed_chunk_shapes(platform: str) -> tuple[ChunkShape, ...]:
    """Returns those of :func:`chunk_shapes` that steps beside decode rows are compiled for."""
    shapes = chunk_shapes(platform)
    return shapes[:2] if platform == "cpu" else shapes[::2]


@dataclass(frozen=True)
class Limits:
    """Sizes fixed at start; the shapes of all compiled programs follow from them.

    Attributes:
        max_slots: sequences decoded at once.
        max_model_len: tokens of one sequence, prompt and output.
        num_pages: pages of the cache, including the null page.
        page_size: positions per cache page.
        chunk_shapes: shapes of the prompt chunks of a step, by their tokens, ascending. Each length divides
            the page size or is a multiple of it.
        mixed_shapes: those of steps that decode other rows too.
        steps: decode steps of one dispatch, at most.
        max_histories: sequences with penalties or biases decoded at once; ``None``: ``max_slots``.
        windows: window of each page group: see :mod:`tpjax.cache`.
        stages: pipeline stages. Decode rows form as many groups, whose dispatches are in flight together, so
            that all stages work at once; a dispatch has one step.

    Raises:
        ConfigError: a size is too small, or two of them do not fit together.
    """

    max_slots: int
    max_model_len: int
    num_pages: int
    page_size: int = PAGE_SIZE
    chunk_shapes: tuple[ChunkShape, ...] = _CPU_CHUNKS
    mixed_shapes: tuple[ChunkShape, ...] = _CPU_CHUNKS[:2]
    steps: int = 4
    max_histories: int | None = None
    windows: Windows = ONE_GROUP
    stages: int = 1

    def __post_init__(self) -> None:
        for name in ("max_slots", "max_model_len", "page_size", "steps", "stages"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is less than 1")
        if self.stages > 1 and self.steps > 1:
            raise ConfigError(
                f"steps={self.steps} of one dispatch are not supported with stages={self.stages}"
            )
        if not 1 <= self.history_rows <= self.max_slots:
            raise ConfigError(
                f"max_histories={self.max_histories} is not between 1 and max_slots={self.max_slots}"
            )
        for shape in self.chunk_shapes:
            if shape.length % self.page_size and self.page_size % shape.length:
                raise ConfigError(
                    f"chunk length {shape.length} neither divides page_size={self.page_size} nor is "
                    "a multiple"
                )
        if self.largest_chunks.tokens % self.page_size:
            raise ConfigError(
                f"the largest chunks, {self.largest_chunks.tokens} tokens, are not a multiple of "
                f"page_size={self.page_size}"
            )
        if self.num_pages < (least := self.pages_held(self.max_model_len) + 1):
            raise ConfigError(
                f"num_pages={self.num_pages} cannot hold one sequence of max_model_len={self.max_model_len}: "
                f"that takes {least} pages of {self.page_size}, the null page included"
            )

    @property
    def mask_batch(self) -> int:
        """Slots whose masks one upload sets."""
        return min(self.max_slots, MASK_BATCH)

    @property
    def max_rows(self) -> int:
        """Decode rows of one dispatch, at most: ``max_slots``, shared by the groups of a pipeline."""
        return -(-self.max_slots // self.stages)

    @property
    def history_rows(self) -> int:
        """Sequences with penalties or biases decoded at once."""
        return self.max_slots if self.max_histories is None else self.max_histories

    @property
    def blocks(self) -> int:
        """Pages of the longest sequence in a page group without a window."""
        return -(-self.max_model_len // self.page_size)

    @cached_property
    def table_columns(self) -> tuple[int, ...]:
        """Columns of the block tables of each page group.

        With a window these are the blocks that the tokens of a row see in one dispatch, wherever in a page
        the first of them is.
        """
        tokens = max(self.steps, *(shape.length for shape in self.chunk_shapes))
        return tuple(
            self.blocks if window is None else -(-(window + tokens - 2) // self.page_size) + 1
            for window in self.windows
        )

    def pages_held(self, tokens: int) -> int:
        """Returns the pages that a sequence of so many tokens holds at once, at most, in all page groups."""
        return pages_held(tokens, self.windows, self.page_size, self.largest_chunks.tokens)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Decode batches: ``max_rows``, a half of it and so on; of more than 8 rows, a quarter and so on.

        Rows of padding walk no page; what else they cost is little where slots are many.
        """
        fraction, sizes = 2 if self.max_rows <= _FEW_SLOTS else 4, [self.max_rows]
        while sizes[0] > 1:
            sizes.insert(0, -(-sizes[0] // fraction))
        return tuple(sizes)

    def decode_shapes(self, block_pages: int | None) -> tuple[DecodeShape, ...]:
        """Returns the shapes that decode steps are compiled for, smallest first; the last holds everything.

        Args:
            block_pages: pages of a block, where attention visits as many blocks as a program is compiled for;
                ``None``: it finds out itself how many there are, and only rows count. Rows of padding have no
                blocks, and cost little: so blocks alone grow, fourfold, and rows with them.
        """
        if block_pages is None:
            return tuple(map(DecodeShape, self.batch_sizes))
        most = self.max_rows * -(-self.blocks // block_pages)
        # all that the cache holds, each row's last block part full; rows that share pages may have more
        unshared = min(most, self.num_pages // block_pages + self.max_rows)
        sizes = [most if most <= 4 * unshared else 0]
        if 2 * unshared <= most:
            sizes.append(unshared)
        while len(sizes) < _DECODE_SHAPES and sizes[-1] > 1:
            sizes.append(-(-sizes[-1] // 4))
        return tuple(DecodeShape(min(self.max_rows, size or self.max_rows), size) for size in sizes[::-1])

    @property
    def mixed_batch_sizes(self) -> tuple[int, ...]:
        """Decode batches of steps that run prompt chunks too."""
        return self.batch_sizes[-1:] if self.max_rows <= _FEW_SLOTS else self.batch_sizes[-2:]

    @property
    def mixed_chunk_shapes(self) -> tuple[ChunkShape, ...]:
        """Those of ``mixed_shapes`` up to the first that holds the longest sequence."""
        return self._usable(self.mixed_shapes)

    @property
    def largest_chunks(self) -> ChunkShape:
        """The chunk shape with the most tokens."""
        return self.chunk_shapes[-1]

    @property
    def score_chunks(self) -> ChunkShape:
        """The chunk shape of a step with prompt log-probabilities: their logits are held at once."""
        fitting = [shape for shape in self.usable_chunk_shapes if shape.tokens <= self.page_size]
        return fitting[-1] if fitting else self.chunk_shapes[0]

    def fitting(self, spans: Sequence[tuple[int, int]], among: Sequence[ChunkShape] = ()) -> ChunkShape:
        """Returns the smallest chunk shape that holds parts of prompts together.

        Args:
            spans: first position and one past the last of each part.
            among: shapes to choose from; none given: all usable ones.

        Raises:
            ConfigError: none does.
        """
        for shape in among or self.usable_chunk_shapes:
            if self.holds(shape, spans):
                return shape
        raise ConfigError(f"no shape of {self.usable_chunk_shapes} holds prompt chunks at {list(spans)}")

    def holds(self, shape: ChunkShape, spans: Sequence[tuple[int, int]]) -> bool:
        """Returns whether a chunk shape holds parts of prompts together: see :meth:`fitting`."""
        unit = min(shape.length, self.page_size)
        needed = sum(-(-(stop - start) // shape.length) for start, stop in spans)
        return needed <= shape.rows and not any(start % unit for start, _ in spans)

    @property
    def usable_chunk_shapes(self) -> tuple[ChunkShape, ...]:
        """Chunk shapes up to the first that holds the longest sequence."""
        return self._usable(self.chunk_shapes)

    def _usable(self, shapes: tuple[ChunkShape, ...]) -> tuple[ChunkShape, ...]:
        enough = next(
            (i for i, shape in enumerate(shapes) if shape.tokens >= self.max_model_len), len(shapes) - 1
        )
        return shapes[: enough + 1]


def resolve_dtype(name: str) -> jnp.dtype:
    """Returns the dtype called ``name``; ``auto`` is float32 on CPU and bfloat16 elsewhere.

    Raises:
        ConfigError: the name is not in ``config.Dtype``.
    """
    check_choice("dtype", name, Dtype)
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
