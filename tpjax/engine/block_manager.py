"""Allocates cache pages and finds cached prefixes. Plain Python, no jax.

Pages with known content are found again by it: a page's key is a SHA-256 over the key of the page before it
and its tokens, starting from a salt, so that equal keys mean equal sequences up to the page's end. Pages in
use are counted; pages that nobody uses stay in the prefix cache until their memory is needed, and are evicted
least recently used first (Kwon et al. 2023, section 4.4; RadixAttention, https://arxiv.org/abs/2312.07104,
section 3).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from tpjax.errors import RequestError

PageKey = bytes


def root_key(salt: str) -> PageKey:
    """Returns the key that a first page's key follows; requests with different salts share no page."""
    return hashlib.sha256(b"tpjax\0" + salt.encode("utf-8", "surrogatepass")).digest()


def page_key(parent: PageKey, token_ids: Sequence[int]) -> PageKey:
    """Returns the key of a full page of tokens after the page with key ``parent``."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


class BlockManager:
    """Allocates cache pages; page 0, the null page, is never allocated.

    Args:
        num_pages: pages of the cache, including the null page.
        page_size: positions per page.

    Attributes:
        page_size: as given.
        capacity: pages that can be allocated.
        changes: incremented whenever pages become free or are inserted into the prefix cache: a request that
            did not fit before may fit after.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.changes = 0
        self.page_size = page_size
        self.capacity = num_pages - 1
        self._free_list: list[int] = []  # unused pages that are not cached
        self._users: dict[int, int] = {}  # page in use -> number of its users
        self._evictable: OrderedDict[int, None] = OrderedDict()  # unused cached pages, oldest first
        self._key_of: dict[int, tuple[int, PageKey]] = {}  # page group and key
        self._page_of: dict[tuple[int, PageKey], int] = {}
        self.clear()

    def clear(self) -> None:
        """Empties the prefix cache and frees all pages."""
        for known in (self._users, self._evictable, self._key_of, self._page_of):
            known.clear()
        self._free_list[:] = range(self.capacity, 0, -1)
        self.changes += 1

    @property
    def free(self) -> int:
        """Number of pages that can be allocated now, evictable ones included."""
        return len(self._free_list) + len(self._evictable)

    @property
    def evictable(self) -> int:
        """Number of pages that nobody uses and the prefix cache keeps."""
        return len(self._evictable)

    def pages_for(self, tokens: int) -> int:
        """Returns the number of pages that hold ``tokens`` positions."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Allocates pages for new content; evicts cached ones if the free list is empty.

        Raises:
            RequestError: fewer than ``count`` are free.
        """
        if count > self.free:
            raise RequestError(f"{count} cache pages are needed, but {self.free} are free")
        pages = []
        for _ in range(count):
            if self._free_list:
                page = self._free_list.pop()
            else:
                page, _ = self._evictable.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._users[page] = 1
            pages.append(page)
        return pages

    def cached(self, group: int, key: PageKey) -> int | None:
        """Returns the cached page of a page group with this key, if there is one, without acquiring it."""
        return self._page_of.get((group, key))

    def count_evictable(self, pages: Sequence[int]) -> int:
        """Returns how many of these cached pages nobody uses: acquiring them leaves that many fewer free."""
        return sum(page in self._evictable for page in pages)

    def acquire(self, pages: Sequence[int]) -> None:
        """Adds a user to cached pages."""
        for page in pages:
            self._evictable.pop(page, None)
            self._users[page] = self._users.get(page, 0) + 1

    def insert(self, group: int, page: int, key: PageKey) -> None:
        """Inserts a page in use into the prefix cache; of pages with equal content only the first."""
        if (group, key) not in self._page_of and page not in self._key_of:
            self._page_of[group, key] = page
            self._key_of[page] = group, key
            self.changes += 1

    def release(self, pages: Sequence[int]) -> None:
        """Removes a user from pages."""
        self.changes += bool(pages)
        for page in reversed(pages):  # a sequence's end is worth less than its beginning: it is evicted first
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                if page in self._key_of:
                    self._evictable[page] = None
                else:
                    self._free_list.append(page)
