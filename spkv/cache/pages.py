"""Page bookkeeping on the host: how many pages there are, and how many are free at least. Integers only.

Pages are handed out on the device, where nobody tells the host how many. What the host knows is a bound: the free
pages at the time it last asked, less what every pass since then could have taken at most. It asks again, which waits
for the device, only when the bound does not suffice.
"""

from __future__ import annotations

from typing import Any


class PoolFullError(RuntimeError):
    """The pool has reached its bound and cannot hold the pages asked for.

    Attributes:
        tokens: what a generation had made before, [B, new], or None.
    """

    tokens: Any = None


class PageBudget:
    """The pages of a pool that can grow up to a limit.

    Attributes:
        capacity: pages in the pool, free or in use.
        limit: the most pages that the pool may have, or None.
        free: pages that are free at least.
    """

    def __init__(self, limit: int | None = None):
        if limit is not None and limit < 1:
            raise ValueError(f"the page limit must be at least 1 or None, not {limit}")
        self.capacity, self.limit, self.free = 0, limit, 0

    def spend(self, count: int) -> bool:
        """Set `count` pages aside, if so many are known to be free."""
        if count > self.free:
            return False
        self.free -= count
        return True

    def learn(self, free: int) -> None:
        """The device says how many pages are free."""
        assert 0 <= free <= self.capacity
        self.free = free

    def growth(self, count: int, wanted: int) -> int:
        """Pages to add so that `count`, more than are free, can be set aside: the missing ones, or up to `wanted`.

        Raises:
            PoolFullError: if the limit does not allow the missing ones.
        """
        missing = count - self.free
        if self.limit is None:
            return max(missing, wanted)
        room = self.limit - self.capacity
        if missing > room:
            raise PoolFullError(
                f"{count} pages are needed and {self.free} of {self.capacity} are free, but the pool may hold "
                f"{self.limit} at most; raise max_memory, or use fewer or shorter sequences"
            )
        return min(room, max(missing, wanted))

    def grow(self, count: int) -> None:
        """`count` free pages were added."""
        self.capacity += count
        self.free += count
        assert self.limit is None or self.capacity <= self.limit
