"""Which modules a quantised checkpoint's configuration leaves out: names, ``*``, and regular expressions.

Published lists have 600 entries, and a model of experts 36,000 modules: names are looked up, not matched.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from functools import cache
from math import prod
from re import _parser  # type: ignore[attr-defined]  # the only way to see how an expression repeats
from typing import Any

from tpjax.config import brief
from tpjax.errors import ConfigError

# Ways to match a module's name that an expression may have, a repetition counted as 64: six of `.*` in a row.
_MOST_WAYS = 64**6
# Those ways in all modules' names take at most this; usual expressions take 1 µs a name.
_MOST_SECONDS = 60.0


def matcher_of(skipped: Iterable[str]) -> Callable[[str], bool]:
    """Returns what tells whether a module is one of those that are not quantised.

    Names stand for themselves and for all modules inside of them, wherever they begin, and ``*`` for any part
    of one; behind ``re:`` is a regular expression that the name begins with.

    Args:
        skipped: the entries, as the configuration has them.

    Raises:
        ConfigError: what is behind ``re:`` is no regular expression, or could take exponential time; from the
            returned function: all of them take too long.
    """
    skipped = tuple(dict.fromkeys(skipped))
    names = {name for name in skipped if not name.startswith("re:") and "*" not in name}
    globs = [_glob(name) for name in skipped if not name.startswith("re:") and "*" in name]
    expressions = [_expression(name) for name in skipped if name.startswith("re:")]
    seconds = 0.0

    @cache
    def is_skipped(module: str) -> bool:
        nonlocal seconds
        parts = module.split(".")
        ends = range(1, len(parts) + 1)
        if any(".".join(parts[start:end]) in names for end in ends for start in range(end)):
            return True
        if any(glob.search(module) for glob in globs):
            return True
        begin = time.perf_counter()
        found = any(expression.match(module) for expression in expressions)
        seconds += time.perf_counter() - begin
        if seconds > _MOST_SECONDS:
            raise ConfigError(
                f"{len(expressions)} regular expressions for modules that are quantised or not, "
                f"{brief('re:' + expressions[0].pattern)} first, took over {_MOST_SECONDS:.0f} s"
            )
        return found

    return is_skipped


def _glob(name: str) -> re.Pattern[str]:
    """Returns what finds a name in which ``*`` stands for any part without a dot.

    All but the last ``*`` of a part end where what follows first occurs, so that there is one way to match.
    """
    parts = []
    for part in name.split("."):
        first, *middle = map(re.escape, re.split(r"\*+", part))
        last = [f"[^.]*{middle.pop()}"] if middle else []
        parts.append("".join((first, *(f"(?>[^.]*?{one})" for one in middle), *last)))
    return re.compile(rf"(?:^|\.){re.escape('.').join(parts)}(?:\.|$)")


def _expression(entry: str) -> re.Pattern[str]:
    pattern = entry.removeprefix("re:")
    try:
        ways = _ways(_parser.parse(pattern))
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{brief(entry)}, of modules that are quantised or not, is not a regular expression: {error}"
        ) from error
    if ways > _MOST_WAYS:
        raise ConfigError(
            f"{brief(entry)}, of modules that are quantised or not, could take exponential time: it repeats "
            "what repeats or branches, or too often"
        )
    return compiled


def _ways(parsed: Any) -> int:
    """Returns about how many ways a backtracking matcher may have to try; at most one over the limit."""
    ways = 1
    for _, value in parsed:
        ways = min(ways * _ways_of(value), _MOST_WAYS + 1)
    return ways


def _ways_of(value: Any) -> int:
    """Returns the ways of one part of an expression from its argument, in which others are nested."""
    if isinstance(value, _parser.SubPattern):
        return _ways(value)
    if not isinstance(value, tuple | list):
        return 1
    nested = [one for one in value if isinstance(one, _parser.SubPattern)]
    if len(value) == 3 and len(nested) == 1 and value[2] is nested[0]:  # least, most and what is repeated
        least, most = (min(int(count), 64) for count in value[:2])
        return (most - least + 1) * _ways(nested[0]) ** most
    if len(value) == 2 and isinstance(value[1], list):  # branches
        return sum(map(_ways, value[1]))
    return prod(map(_ways, nested))
