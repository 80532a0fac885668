"""Names of the files of a model that is split over several GGUF files.

llama.cpp's ``llama-gguf-split`` and the gguf package name part 1 of 3 of ``M`` ``M-00001-of-00003.gguf``.
"""

from __future__ import annotations

import re

_PART = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)


def number_of(name: str) -> tuple[int, int] | None:
    """Returns the number of a part, from 1, and of all parts, as its name says; ``None``: it is no part."""
    found = _PART.fullmatch(name)
    return None if found is None else (int(found[2]), int(found[3]))


def names_of(name: str) -> list[str]:
    """Returns the names of all parts, the first one first; of a file that is no part its own alone.

    Args:
        name: the name of one part, with a folder or without.
    """
    found = _PART.fullmatch(name)
    if found is None or not 1 <= int(found[2]) <= int(found[3]):
        return [name]
    return [f"{found[1]}-{number:05}-of-{found[3]}.gguf" for number in range(1, int(found[3]) + 1)]
