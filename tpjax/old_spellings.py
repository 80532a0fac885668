"""Public options under the names they had before; they work for one release, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# old keyword -> new keyword, and old value -> new value
KEYWORDS: dict[str, tuple[str, dict[str, str]]] = {
    "expert_sharding": ("expert_parallel", {"experts": "on", "width": "off"}),
    "residual": ("sequence_parallel", {"positions": "on", "replicated": "off"}),
}

_OPTIONS = ("expert_sharding",)  # those that the command line had


def accepts_old_spellings(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorates a public function: it takes the keywords of :data:`KEYWORDS` under both names."""

    @functools.wraps(function)
    def translated(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        for old, (new, values) in KEYWORDS.items():
            if old in kwargs:
                value: Any = kwargs.pop(old)
                if new in kwargs:
                    raise TypeError(f"{new} is given twice: {old} is its old name")
                kwargs[new] = values.get(value, value)
                message = (
                    f"{old}={value!r} is now {new}={kwargs[new]!r}; the old name goes with the next release"
                )
                warnings.warn(message, FutureWarning, stacklevel=2)
        return function(*args, **kwargs)

    return translated


def translate_arguments(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns arguments with the options' present names and values, and a message for each one changed."""
    translated, messages = [], []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        option, equals, value = word.partition("=")
        old = option[2:].replace("-", "_")
        if option[:2] != "--" or old not in _OPTIONS:
            translated.append(word)
            continue
        new, values = KEYWORDS[old]
        value = value if equals or not remaining else remaining.pop(0)
        option_now, value_now = f"--{new.replace('_', '-')}", values.get(value, value)
        translated += [option_now, value_now]
        messages.append(
            f"{option} {value} is now {option_now} {value_now}; the old name goes with the next release"
        )
    return translated, messages
