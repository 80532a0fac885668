"""The shapes in signatures can be evaluated, and are checked at each call while the tests run."""

from __future__ import annotations

import ast
import importlib
import inspect
import typing
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import modules_with_shapes
from jaxtyping import AbstractArray, TypeCheckError

from tpjax.attention.reference import reference_attention
from tpjax.sampling import History, SamplingRows

MODULES = modules_with_shapes()


def described(module: Any) -> Iterator[Any]:
    """The functions, classes and methods of a module."""
    for member in vars(module).values():
        if getattr(member, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(member):
            yield member
            for one in vars(member).values():
                if isinstance(one, (classmethod, staticmethod)):
                    one = one.__func__
                if inspect.isfunction(one) and one.__module__ == module.__name__:
                    yield one
        elif inspect.isfunction(member):
            yield member


def shapes(hint: Any) -> int:
    """Array shapes in a type, after evaluation."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return 1
    return sum(shapes(part) for part in typing.get_args(hint))


def test_modules_with_shapes_are_found():
    assert {"tpjax.model", "tpjax.sampling", "tpjax.runtime.steps", "tpjax.layers.moe"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_every_shape_can_be_evaluated(name):
    """A name that is not there would be passed over in silence, and nothing be checked."""
    module = importlib.import_module(name)
    found = 0
    for member in described(module):
        hints = typing.get_type_hints(member, include_extras=True)
        found += sum(shapes(hint) for hint in hints.values())
    written = [
        node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Subscript)
    ]
    kinds = {"Float", "Int", "Bool", "UInt"}
    assert found > 0
    assert all(
        isinstance(node.slice, ast.Tuple) and isinstance(node.slice.elts[1], ast.Constant)
        for node in written
        if isinstance(node.value, ast.Name) and node.value.id in kinds
    ), "a shape is not a string"


def test_a_wrong_shape_is_refused():
    query, keys = jnp.zeros((2, 3, 4, 1, 8)), jnp.zeros((2, 5, 4, 8))
    right = reference_attention(query, keys, keys, jnp.ones((2, 3), int), scale=1.0, window=None)
    assert right.shape == query.shape
    for wrong in (jnp.ones((1, 3), int), jnp.ones((2, 3))):  # of another batch; not integers
        with pytest.raises(TypeCheckError, match="positions"):
            reference_attention(query, keys, keys, wrong, scale=1.0, window=None)


def test_a_wrong_shape_in_a_tree_is_refused():
    with pytest.raises(TypeCheckError, match="floats"):
        SamplingRows(np.zeros((4, 1), np.float32), np.zeros((4, 1), np.int32))
    seen, counts = np.zeros((3, 8), bool), np.zeros((3, 9), np.int32)
    with pytest.raises(TypeCheckError, match="counts"):
        History(seen, counts, np.zeros((3, 8), np.float32), np.zeros((4, 2), np.uint32))
