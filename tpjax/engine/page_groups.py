"""Which pages a sequence holds in each page group. Plain Python, no jax.

Layers of a group attend to the keys of all positions, or of a sliding window (see :mod:`tpjax.cache`). Of a
group with a window, a sequence has pages for the blocks that its next tokens see, and gives the others back.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from tpjax.engine.block_manager import BlockManager, PageKey
from tpjax.errors import RequestError
from tpjax.windows import pages_held

NO_PAGE = 0  # the null page: in a list of pages, a block that has none
Pages = list[list[int]]  # of each page group, the page of each block; windows' early blocks have ``NO_PAGE``


class Prefix(NamedTuple):
    """A cached prefix.

    Attributes:
        blocks: its length.
        pages: its pages, not acquired.
    """

    blocks: int
    pages: Pages


class PageGroups:
    """Gives a sequence its pages in each page group.

    Args:
        blocks: the pages, which all groups share.
        windows: of each group, the keys that its layers see; ``None``: all.
        step_tokens: tokens of a prompt that a step runs, at most.

    Attributes:
        blocks: as given.
        windows: as given.
    """

    def __init__(self, blocks: BlockManager, windows: Sequence[int | None], step_tokens: int) -> None:
        self.blocks = blocks
        self.windows = tuple(windows)
        self._step_tokens = step_tokens
        self._window = next((window for window in windows if window is not None), None)  # all have the same

    def held(self, tokens: int) -> int:
        """Returns the pages that a sequence of so many tokens holds at once, at most."""
        return pages_held(tokens, self.windows, self.blocks.page_size, self._step_tokens)

    def count(self, pages: Pages) -> int:
        """Returns how many pages a sequence holds: with a window, only early blocks lack one."""
        return sum(
            len(of_group) - (0 if window is None else bisect_left(of_group, True, key=bool))
            for window, of_group in zip(self.windows, pages, strict=False)
        )

    def find(self, keys: Sequence[PageKey]) -> Prefix:
        """Returns the longest cached prefix of ``keys``.

        Of a group with a window the pages are enough that the tokens after the prefix see.
        """
        numbers = range(len(self.windows))
        whole = [number for number in numbers if self.windows[number] is None]
        windowed = [number for number in numbers if self.windows[number] is not None]
        pages: Pages = [[] for _ in numbers]
        longest, run = 0, 0  # ``run`` blocks in a row, up to this one, have pages in all groups with a window
        for block, key in enumerate(keys):
            here = [self.blocks.cached(number, key) for number in numbers]
            if any(here[number] is None for number in whole):
                break
            for number in numbers:
                pages[number].append(here[number] or NO_PAGE)
            run = run + 1 if all(here[number] is not None for number in windowed) else 0
            stop = block + 1
            if run >= stop - self._first_kept(stop * self.blocks.page_size):
                longest = stop
        first = self._first_kept(longest * self.blocks.page_size)
        for number in numbers:
            del pages[number][longest:]
            if number in windowed:
                pages[number][:first] = [NO_PAGE] * first
        return Prefix(longest, pages)

    def missing_at_start(self, prefix: Prefix, tokens: int) -> int:
        """Returns the pages that :meth:`start` allocates."""
        return sum(self._at_start(window, prefix, tokens) - prefix.blocks for window in self.windows)

    def start(self, prefix: Prefix, tokens: int) -> Pages:
        """Acquires the pages of a prefix and allocates those of the tokens after it.

        Of a group with a window these are the pages of a step; :meth:`extend` adds further ones.

        Raises:
            RequestError: too few pages are free; none has been taken.
        """
        own = [page for pages in prefix.pages for page in pages if page != NO_PAGE]
        self.blocks.acquire(own)
        try:
            new = iter(self.blocks.allocate(self.missing_at_start(prefix, tokens)))
        except RequestError:
            self.blocks.release(own)
            raise
        counts = (self._at_start(window, prefix, tokens) - prefix.blocks for window in self.windows)
        return [[*pages, *islice(new, count)] for count, pages in zip(counts, prefix.pages, strict=True)]

    def missing(self, pages: Pages, stop: int) -> int:
        """Returns the pages that :meth:`extend` allocates."""
        blocks = self.blocks.pages_for(stop)
        return sum(max(0, blocks - len(of_group)) for of_group in pages)

    def extend(self, pages: Pages, stop: int) -> None:
        """Allocates pages for positions up to ``stop``.

        Raises:
            RequestError: too few pages are free; none has been taken.
        """
        blocks = self.blocks.pages_for(stop)
        new = iter(self.blocks.allocate(self.missing(pages, stop)))
        for of_group in pages:
            of_group += islice(new, max(0, blocks - len(of_group)))

    def unseen(self, pages: Pages, position: int) -> bool:
        """Whether :meth:`give_back` has pages to give back."""
        last = self._first_kept(position) - 1
        return last >= 0 and any(
            window is not None and last < len(of_group) and of_group[last] != NO_PAGE
            for window, of_group in zip(self.windows, pages, strict=True)
        )

    def give_back(self, pages: Pages, position: int) -> None:
        """Releases the pages that no token of the page of ``position``, or of a later one, sees."""
        stop = self._first_kept(position)
        for window, of_group in zip(self.windows, pages, strict=True):
            if window is None:
                continue
            start = stop
            while start and of_group[start - 1] != NO_PAGE:
                start -= 1
            unseen = of_group[start:stop]
            of_group[start:stop] = [NO_PAGE] * len(unseen)
            self.blocks.release(unseen)

    def insert(self, pages: Pages, first: int, keys: Sequence[PageKey]) -> None:
        """Inserts the pages of blocks ``first`` and later into the prefix cache, each under its key."""
        for number, of_group in enumerate(pages):
            for page, key in zip(of_group[first : len(keys)], keys[first:], strict=False):
                if page != NO_PAGE:
                    self.blocks.insert(number, page, key)

    def release(self, pages: Pages) -> None:
        """Releases all pages of a sequence.

        Those of windows last, which are then evicted last: its other pages are of no use without them.
        """
        kinds = zip(self.windows, pages, strict=False)
        for _, of_group in sorted(kinds, key=lambda kind: kind[0] is not None):
            self.blocks.release([page for page in of_group if page != NO_PAGE])
        pages.clear()

    def _at_start(self, window: int | None, prefix: Prefix, tokens: int) -> int:
        if window is not None:
            tokens = min(tokens, prefix.blocks * self.blocks.page_size + self._step_tokens)
        return self.blocks.pages_for(tokens)

    def _first_kept(self, position: int) -> int:
        """Returns the first block that groups with a window keep for the page of ``position``."""
        if self._window is None:
            return 0
        start = position - position % self.blocks.page_size
        return max(0, start - (self._window - 1)) // self.blocks.page_size
