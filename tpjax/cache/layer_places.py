"""Page groups of an architecture: which layers share block tables, and which of them a buffer."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from tpjax.config import ModelConfig
from tpjax.windows import ONE_GROUP, Windows

MOST_PAGE_GROUPS = 8  # each has a block table of every row, which every dispatch uploads
_NEARLY_AS_MANY = 1.25


class LayerPlace(NamedTuple):
    """Where the keys and values of a layer are.

    Attributes:
        group: the page group whose block tables it reads.
        entry: which of the cache's entries holds them; other groups have pages there too.
    """

    group: int
    entry: int


def page_groups(config: ModelConfig) -> Windows:
    """Returns the windows of the page groups that suit an architecture.

    Groups have the same number of layers, padded where that does not divide: as many as see all keys, or as
    see a window if these are fewer or little more. The padding is memory that is not used.
    """
    counts = Counter(config.attention.window_of(kind) for kind in config.attention.layer_types)
    fewest, most = min(counts.values()), max(counts.values())
    size = most if most < _NEARLY_AS_MANY * fewest else fewest
    while sum(-(-count // size) for count in counts.values()) > MOST_PAGE_GROUPS:
        size += 1
    windows = sorted(counts, key=lambda window: (window is not None, window or 0))
    return tuple(window for window in windows for _ in range(-(-counts[window] // size)))


def layer_places(config: ModelConfig, windows: Windows) -> tuple[LayerPlace, ...]:
    """Returns the place of each layer, given the window of each page group."""
    kinds = [config.attention.window_of(kind) for kind in config.attention.layer_types]
    if windows == ONE_GROUP:
        kinds = [None] * len(kinds)
    size = max(-(-count // windows.count(window)) for window, count in Counter(kinds).items())
    numbers: Counter[int | None] = Counter()
    places = []
    for window in kinds:
        number = numbers[window]
        numbers[window] += 1
        places.append(LayerPlace(windows.index(window) + number // size, number % size))
    return tuple(places)


def num_entries(config: ModelConfig, windows: Windows) -> int:
    """Returns the number of the cache's entries: the layers of a page group."""
    return 1 + max(place.entry for place in layer_places(config, windows))
