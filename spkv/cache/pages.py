"""Page bookkeeping: which pages of the pool are free. Integers only, so that plain tests cover it."""

from __future__ import annotations


class PoolFullError(RuntimeError):
    """The pool has reached its bound and cannot hand out the pages asked for."""


class PageList:
    """The free pages of a pool whose capacity can grow up to a bound.

    Attributes:
        capacity: pages in the pool, free or in use.
        limit: the most pages the pool may have, or None.
    """

    def __init__(self, limit: int | None = None):
        if limit is not None and limit < 1:
            raise ValueError(f"the page limit must be at least 1 or None, not {limit}")
        self.capacity = 0
        self.limit = limit
        self._free: list[int] = []

    @property
    def in_use(self) -> int:
        return self.capacity - len(self._free)

    def shortfall(self, count: int) -> int:
        """Pages the pool must grow by before `take(count)`; raises PoolFullError if the bound forbids it."""
        missing = max(0, count - len(self._free))
        if self.limit is not None and self.capacity + missing > self.limit:
            raise PoolFullError(
                f"{count} pages are needed and {len(self._free)} of {self.capacity} are free, but the pool may hold "
                f"{self.limit} at most; raise max_memory, or use fewer or shorter sequences"
            )
        return missing

    def grow(self, count: int) -> None:
        """Add `count` new pages, up to the limit."""
        if self.limit is not None:
            count = min(count, self.limit - self.capacity)
        # Lowest ids are handed out first, which keeps a young pool's pages together.
        self._free[:0] = range(self.capacity + count - 1, self.capacity - 1, -1)
        self.capacity += count

    def take(self, count: int) -> list[int]:
        """Hand out `count` pages. The pool must have them: see `shortfall`."""
        if count > len(self._free):
            raise PoolFullError(f"{count} pages were asked for and {len(self._free)} are free")
        taken = self._free[len(self._free) - count :][::-1]
        del self._free[len(self._free) - count :]
        return taken

    def give(self, pages: list[int]) -> None:
        """Take pages back."""
        self._free.extend(reversed(pages))
