"""Which cache pages are free. Plain Python, no jax."""

from __future__ import annotations

from tpjax.errors import RequestError


class BlockManager:
    """Hands out cache pages; page 0 is never handed out.

    Args:
        num_pages: pages of the cache, the null page included.
        page_size: positions per page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.capacity = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def free(self) -> int:
        """Pages not in use."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many positions."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Takes pages.

        Raises:
            RequestError: fewer are free.
        """
        if count > len(self._free):
            raise RequestError(f"{count} cache pages are needed, but {len(self._free)} are free")
        return [self._free.pop() for _ in range(count)]

    def release(self, pages: list[int]) -> None:
        """Gives pages back, and empties the list."""
        self._free.extend(reversed(pages))
        pages.clear()
