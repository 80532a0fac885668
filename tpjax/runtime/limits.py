"""Sizes that are fixed at start: slots, context, cache pages, chunk sizes, and the dtype."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tpjax.config import Dtype, check_choice
from tpjax.errors import ConfigError

PAGE_SIZE = 128  # positions per cache page
CHUNK_SIZES = (32, 64, 128, 256, 512)  # tokens of a prefill chunk


@dataclass(frozen=True)
class Limits:
    """Sizes fixed at start; the shapes of all compiled programs follow from them.

    Attributes:
        max_slots: sequences decoded at once.
        max_model_len: tokens of one sequence, prompt and output.
        num_pages: pages of the cache, including the null page.
        page_size: positions per cache page.
        chunk_sizes: prefill lengths in tokens, ascending; each divides the page size or is a multiple of it.
        steps: decode steps of a long dispatch.

    Raises:
        ConfigError: a size is too small, or two of them do not fit together.
    """

    max_slots: int
    max_model_len: int
    num_pages: int
    page_size: int = PAGE_SIZE
    chunk_sizes: tuple[int, ...] = CHUNK_SIZES
    steps: int = 4

    def __post_init__(self) -> None:
        for name in ("max_slots", "max_model_len", "page_size", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is less than 1")
        for size in self.chunk_sizes:
            if size % self.page_size and self.page_size % size:
                raise ConfigError(
                    f"chunk size {size} neither divides page_size={self.page_size} nor is a multiple"
                )
        if self.chunk_sizes[-1] % self.page_size:
            raise ConfigError(
                f"the largest chunk, {self.chunk_sizes[-1]}, is not a multiple of page_size={self.page_size}"
            )
        if self.num_pages < self.blocks + 1:
            raise ConfigError(
                f"num_pages={self.num_pages} cannot hold one sequence of max_model_len={self.max_model_len}: "
                f"that takes {self.blocks + 1} pages of {self.page_size}, the null page included"
            )

    @property
    def blocks(self) -> int:
        """Pages of the longest sequence: the width of a block table."""
        return -(-self.max_model_len // self.page_size)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Decode batches: powers of two up to ``max_slots``, and ``max_slots``."""
        powers = [2**i for i in range(self.max_slots.bit_length()) if 2**i < self.max_slots]
        return (*powers, self.max_slots)

    @property
    def usable_chunk_sizes(self) -> tuple[int, ...]:
        """Chunk sizes up to the first that holds the longest sequence."""
        sizes = self.chunk_sizes
        enough = next((i for i, size in enumerate(sizes) if size >= self.max_model_len), len(sizes) - 1)
        return sizes[: enough + 1]


def resolve_dtype(name: str) -> jnp.dtype:
    """Returns the dtype called ``name``; ``auto`` is float32 on CPU and bfloat16 elsewhere.

    Raises:
        ConfigError: the name is not in ``config.Dtype``.
    """
    check_choice("dtype", name, Dtype)
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
