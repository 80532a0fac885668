"""When requests arrive and how long they are: a Poisson process, or a trace. Plain Python."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tpjax.config import brief
from tpjax.errors import ConfigError


@dataclass(frozen=True)
class Arrival:
    """A request to come.

    Attributes:
        at: seconds after the first could come.
        input_len: tokens of the prompt.
        output_len: tokens of the response.
    """

    at: float
    input_len: int
    output_len: int


def poisson(
    count: int, rate: float, input_len: int, output_len: int, range_ratio: float, rng: random.Random
) -> list[Arrival]:
    """Samples requests whose lengths are uniform around a mean, and that arrive as a Poisson process.

    Args:
        count: number of requests.
        rate: requests a second; ``inf``: all at once.
        input_len: mean tokens of a prompt.
        output_len: mean tokens of a response.
        range_ratio: lengths are between ``(1 - r)`` and ``(1 + r)`` times these.
        rng: source of lengths and times.
    """

    def length(mean: int) -> int:
        spread = int(mean * range_ratio)
        return max(1, rng.randint(mean - spread, mean + spread))

    sizes = [Arrival(0.0, length(input_len), length(output_len)) for _ in range(count)]
    return at_rate(sizes, rate, rng)


def at_rate(arrivals: Sequence[Arrival], rate: float, rng: random.Random) -> list[Arrival]:
    """Returns requests of the same lengths that arrive as a Poisson process; the first comes at once."""
    moment, timed = 0.0, []
    for arrival in arrivals:
        timed.append(replace(arrival, at=moment))
        moment += rng.expovariate(rate) if math.isfinite(rate) else 0.0
    return timed


_INPUT = ("input_length", "ContextTokens", "input_len", "prompt_tokens")
_OUTPUT = ("output_length", "GeneratedTokens", "output_len", "output_tokens")
_MOST_TOKENS = 10**9
_TIME = ("timestamp", "TIMESTAMP", "at")
_FINER = re.compile(r"(\.\d{6})\d+")  # a fraction of a second finer than Python's dates


def read_trace(file: Path) -> list[Arrival]:
    """Reads requests from a trace, in order of arrival: JSON lines as Mooncake's, or CSV as Azure's.

    A line has a time and the tokens of prompt and response: ``timestamp`` (milliseconds), ``input_length``
    and ``output_length`` in https://github.com/kvcache-ai/Mooncake; ``TIMESTAMP`` (date and time, or
    seconds), ``ContextTokens`` and ``GeneratedTokens`` in https://github.com/Azure/AzurePublicDataset.

    Raises:
        ConfigError: the file cannot be read, or a line lacks a field or has an invalid one.
    """
    try:
        text = file.read_text().removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace {file}: {getattr(error, 'strerror', None) or error}") from error
    arrivals = [_arrival(f"--trace {file}: {where}", row) for where, row in _rows(file, text)]
    if not arrivals:
        raise ConfigError(f"--trace {file} has no requests")
    arrivals.sort(key=lambda one: one.at)
    first = arrivals[0].at
    return [replace(one, at=one.at - first) for one in arrivals]


def _rows(file: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields where each row stands, and its fields."""
    if not text.lstrip().startswith("{"):
        reader = csv.DictReader(text.split("\n"))
        try:
            yield from ((f"line {reader.line_num}", row) for row in reader)
        except csv.Error as error:  # an open quote takes the lines after it
            raise ConfigError(f"--trace {file}: line {reader.line_num}: {error}") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--trace {file}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"--trace {file}: line {number} is not an object")
        yield f"line {number}", row


def _arrival(where: str, row: dict[str, Any]) -> Arrival:
    def value(names: Sequence[str]) -> Any:
        found = next((name for name in names if row.get(name) not in (None, "")), None)
        if found is None:
            raise ConfigError(f"{where} has none of {', '.join(names)}")
        return row[found]

    def tokens(names: Sequence[str]) -> int:
        given = value(names)
        try:
            count = int(given)
        except (TypeError, ValueError, OverflowError):
            count = 0
        if isinstance(given, bool) or (isinstance(given, float) and given != count):
            count = 0
        if not 1 <= count <= _MOST_TOKENS:
            raise ConfigError(f"{where}: {brief(given)} is not a number of tokens, 1 to {_MOST_TOKENS}")
        return count

    return Arrival(_seconds(where, row, value(_TIME)), tokens(_INPUT), tokens(_OUTPUT))


def _seconds(where: str, row: dict[str, Any], time: Any) -> float:
    """Returns a time in seconds: Mooncake's are milliseconds, Azure's dates or seconds."""
    try:
        seconds = float(time) * (1e-3 if "timestamp" in row else 1.0)
    except OverflowError:
        seconds = math.inf
    except (TypeError, ValueError):
        try:
            moment = datetime.fromisoformat(_FINER.sub(r"\1", str(time)))
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"{where}: {brief(time)} is neither a number nor a date") from error
    if not math.isfinite(seconds):
        raise ConfigError(f"{where}: {brief(time)} is not a time")
    return seconds
