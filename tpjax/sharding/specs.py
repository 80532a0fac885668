"""The named partition specs, and the two functions that fix a layout inside a program."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from tpjax.mesh import AXIS

if TYPE_CHECKING:
    Leaf: TypeAlias = jax.Array
else:  # of a tree that a program takes or returns: on devices, or still (or again) on the host
    Leaf = jax.Array | np.ndarray

REPLICATED = P()
COLUMN = P(AXIS, None)  # [out, in]: each device computes some outputs; no collective
ROW = P(None, AXIS)  # [out, in]: each device sums over some inputs; one all-reduce follows
VOCAB = P(AXIS, None)  # [V, D]: each device holds the rows of some tokens
BIAS = P(AXIS)  # [out] of a column-parallel product
PARTIAL_SUMS = P(AXIS)  # [tp, ...]: one partial sum per device
SEQUENCE_PARALLEL = P(AXIS, None)  # [N, D]: a residual of which each device holds some tokens
FEATURES = P(None, AXIS)  # [N, F]: of an MLP, between its products
LOGITS = P(None, AXIS)  # [B, V]
HEADS = P(None, AXIS, None, None)  # [N, K, parts of a head slot, h]
PAGES = P(None, AXIS, None, None)  # [pages, K, page_size, h]


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Fixes the layout of ``x`` at this point of the program; the partitioner moves data as needed."""
    fixed: jax.Array = jax.lax.with_sharding_constraint(x, spec)
    return fixed


def reduce_partials(partial_sums: jax.Array, spec: P) -> jax.Array:
    """Adds up partial sums [tp, ...] and fixes the layout of the total, which makes the partitioner reduce.

    The sum keeps its dtype: ``jnp.sum`` adds bfloat16 up as float32, and GPUs would then move float32.
    """
    return constrain(jax.lax.reduce_sum(partial_sums, (0,)), spec)
