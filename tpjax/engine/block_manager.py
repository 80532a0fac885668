"""Which cache pages hold what, and which are free. Plain Python, no jax.

Pages whose content is known are found again by it: a page's key is a SHA-256 over the key of the page before
it, its tokens, and the salt of the first, so that equal keys mean equal sequences up to the page's end.
Pages in use are counted; pages in no one's use stay findable until their place is needed, least recently
used first (Kwon et al. 2023, section 4.4; RadixAttention, https://arxiv.org/abs/2312.07104, section 3).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from tpjax.errors import RequestError

PageKey = bytes


def root_key(salt: str) -> PageKey:
    """What stands for the page before the first: requests with different salts share nothing."""
    return hashlib.sha256(b"tpjax\0" + salt.encode("utf-8", "surrogatepass")).digest()


def page_key(parent: PageKey, tokens: Sequence[int]) -> PageKey:
    """Key of a full page of tokens."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class BlockManager:
    """Hands out cache pages; page 0 is never handed out.

    Args:
        num_pages: pages of the cache, the null page included.
        page_size: positions per page.

    Attributes:
        changes: how often pages have become free or findable: what could not be had before may be had after.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.changes = 0
        self.page_size = page_size
        self.capacity = num_pages - 1
        self._blank: list[int] = []
        self._users: dict[int, int] = {}  # of pages in use
        self._kept: OrderedDict[int, None] = OrderedDict()  # unused pages with known content, oldest first
        self._key_of: dict[int, PageKey] = {}
        self._page_of: dict[PageKey, int] = {}
        self.clear()

    def clear(self) -> None:
        """Forgets the content of all pages and who used them: all are free."""
        for known in (self._users, self._kept, self._key_of, self._page_of):
            known.clear()
        self._blank[:] = range(self.capacity, 0, -1)
        self.changes += 1

    @property
    def free(self) -> int:
        """Pages not in use, those with known content included."""
        return len(self._blank) + len(self._kept)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many positions."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Takes pages for new content.

        Raises:
            RequestError: fewer are free.
        """
        if count > self.free:
            raise RequestError(f"{count} cache pages are needed, but {self.free} are free")
        pages = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._users[page] = 1
            pages.append(page)
        return pages

    def find(self, keys: Sequence[PageKey]) -> list[int]:
        """The pages of the longest known run of ``keys`` from the first on; takes nothing."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def unused(self, pages: Sequence[int]) -> int:
        """How many of these found pages nobody uses: taking them makes fewer free."""
        return sum(page in self._kept for page in pages)

    def take(self, pages: Sequence[int]) -> list[int]:
        """Becomes one more user of found pages."""
        for page in pages:
            self._kept.pop(page, None)
            self._users[page] = self._users.get(page, 0) + 1
        return list(pages)

    def register(self, page: int, key: PageKey) -> None:
        """Makes the content of a page in use findable; of pages with equal content, the first stays so."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key
            self.changes += 1

    def release(self, pages: list[int]) -> None:
        """Gives pages back, and empties the list."""
        self.changes += bool(pages)
        for page in reversed(pages):  # a sequence's end is worth less than its beginning, and goes first
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                if page in self._key_of:
                    self._kept[page] = None
                else:
                    self._blank.append(page)
        pages.clear()
