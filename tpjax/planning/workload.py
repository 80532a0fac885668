"""Batch, lengths and dtypes to plan for. Plain Python: ``tpjax plan --help`` shows them without JAX."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from tpjax.errors import ConfigError
from tpjax.step_time import Itemsizes

WeightDtype = Literal["bf16", "int8", "fp8", "int4", "float32", "stored"]
CacheDtype = Literal["auto", "bf16", "int8", "fp8", "float32"]
# int4: with the bfloat16 scale of each 128 inputs of an output
DTYPE_BYTES: dict[str, float] = {"bf16": 2, "int8": 1, "fp8": 1, "int4": 0.5 + 2 / 128, "float32": 4}
_SCALE_BYTES = 4  # float32
DEFAULT_CONTEXT = 2048  # tokens
STEP_BATCH, STEP_PROMPT_LEN = 8, 512  # sequences, tokens: of the steps that are compiled to be explained
LONGEST_DEFAULT_PROMPT = 1024  # tokens


@dataclass(frozen=True)
class Workload:
    """The requests to plan for.

    Attributes:
        batch: sequences decoded at once, over all replicas.
        context: tokens of each sequence in the cache.
        prompt_len: tokens of a prompt.
        dtype: dtype of the weights; norms, embedding and head keep at least 16 bits. ``stored``: as a
            quantised checkpoint stores them.
        cache_dtype: dtype of keys and values. ``auto`` is the dtype of the weights, thus 8 bits for 8-bit
            weights, as the published 8-bit measurements ran, and for those of 4 bits; 16 for ``stored``.
        stored_bytes: mean bytes of an element of ``stored`` weights, scales included.
    """

    batch: int = 1
    context: int = DEFAULT_CONTEXT
    prompt_len: int = LONGEST_DEFAULT_PROMPT
    dtype: str = "bf16"
    cache_dtype: str = "auto"
    stored_bytes: float | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "context", "prompt_len"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} is not a whole number, 1 or more")
        for name, known in (("dtype", get_args(WeightDtype)), ("cache_dtype", get_args(CacheDtype))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not known: use {', '.join(known)}")
        if self.dtype == "stored" and self.stored_bytes is None:
            raise ConfigError("dtype='stored' needs a model that is stored in 8 or 4 bits: this one is not")

    @property
    def weight_bytes(self) -> float:
        """Bytes of one element of a matrix of attention, MLPs or experts."""
        return DTYPE_BYTES[self.dtype] if self.dtype != "stored" else self.stored_bytes or 0.0

    @property
    def activation_bytes(self) -> int:
        """Bytes of one element of an activation, a norm, the embedding or the head."""
        return max(2, math.ceil(self.weight_bytes))

    @property
    def cache_bytes(self) -> int:
        """Bytes of one element of the cache."""
        of_weights = "bf16" if self.dtype == "stored" else self.dtype
        return math.ceil(DTYPE_BYTES[of_weights if self.cache_dtype == "auto" else self.cache_dtype])

    @property
    def cache_scale_bytes(self) -> int:
        """Bytes of the scale of a key or value, which has one if it is kept in 8 bits."""
        return _SCALE_BYTES if self.cache_bytes == 1 else 0

    @property
    def itemsizes(self) -> Itemsizes:
        """Bytes of one element of each kind."""
        return Itemsizes(
            self.weight_bytes,
            self.activation_bytes,
            self.cache_bytes,
            self.dtype == "fp8",
            self.cache_scale_bytes,
        )
