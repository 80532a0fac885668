"""Products of a few rows of activations with a weight, on a CPU."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tpjax.layers.products import product
from tpjax.mesh import AXIS, make_mesh

INPUTS, OUTPUTS = 576, 1536
by_rows = partial(product, subscripts="...i,oi->...o", dtype=jnp.float32)


@pytest.mark.parametrize("rows", (1, 2, 8, 64, 65))
@pytest.mark.parametrize("spec", (PartitionSpec(AXIS, None), PartitionSpec(None, AXIS)), ids=("out", "in"))
@pytest.mark.parametrize("tp", (1, 3))
def test_product(rows: int, spec: PartitionSpec, tp: int) -> None:
    rng = np.random.default_rng(rows)
    x, weight = (rng.normal(size=(n, INPUTS)).astype(np.float32) for n in (rows, OUTPUTS))
    mesh = make_mesh(tp)
    with jax.set_mesh(mesh):
        found = jax.jit(by_rows)(x, jax.device_put(weight, NamedSharding(mesh, spec)))
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    np.testing.assert_allclose(found, expected, atol=1e-6 * INPUTS)


@pytest.mark.parametrize("rows", (2, 8, 64))
def test_a_few_rows_are_the_right_operand(rows: int) -> None:
    """The weight is not: a product that packs it takes about twice as long."""
    x, weight = (jax.ShapeDtypeStruct((n, INPUTS), jnp.float32) for n in (rows, OUTPUTS))
    text = jax.jit(by_rows).lower(x, weight).compile().as_text()
    assert re.search(rf"= f32\[{OUTPUTS},{rows}\]\S* dot\(", text)
    assert not re.search(rf"= f32\[({OUTPUTS},{INPUTS}|{INPUTS},{OUTPUTS})\]\S* (copy|transpose)\(", text)
