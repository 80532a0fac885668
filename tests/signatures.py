"""What the import hook of `conftest` puts round each function of the modules that write shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import beartype
import jax
import numpy as np

NUMBERS = beartype.BeartypeConf(is_pep484_tower=True)  # an int passes for a float, as in mypy
VALUES = (jax.Array, np.ndarray, bool, int, float, str)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the types of arguments and results, shapes included.

    A tree (a dataclass that JAX maps over) is checked where it holds values only: JAX builds trees of
    None, of shapes, of shardings and of its own bookkeeping too.
    """
    check = beartype.beartype(function, conf=NUMBERS)
    if function.__name__ != "__init__":
        return check

    @functools.wraps(function)
    def check_values(*args: Any, **kwargs: Any) -> None:
        leaves = jax.tree.leaves((args[1:], kwargs))
        if leaves and all(isinstance(leaf, VALUES) for leaf in leaves):
            check(*args, **kwargs)

    return check_values
