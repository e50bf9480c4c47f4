"""Page bookkeeping on the host: how many pages there are, and how many are free at least. Integers only.

Pages are handed out on the device, where nobody tells the host how many. What the host knows is a bound: the free
pages at the time it last asked, less what every pass since then could have taken at most. It asks again, which waits
for the device, only when the bound does not suffice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class PoolFullError(RuntimeError):
    """The cache has reached its bound and cannot hold the pages asked for.

    Attributes:
        tokens: what a generation had made before, [B, new], or None.
    """

    tokens: Any = None


class MemoryBound:
    """The bytes that all pages of a cache take, and may take.

    Attributes:
        most: the bound, or None.
        used: by pages in use and free ones.
    """

    def __init__(self, most: int | None = None):
        if most is not None and most < 1:
            raise ValueError(f"max_memory must be at least 1 or None, not {most}")
        self.most, self.used = most, 0


class PageBudget:
    """The pages of one pool.

    Attributes:
        page_bytes: bytes of a page.
        bound: on the bytes, shared with other pools.
        capacity: pages in the pool, free or in use.
        free: pages that are free at least.
    """

    def __init__(self, page_bytes: int, bound: MemoryBound | None = None):
        self.page_bytes, self.bound = page_bytes, bound or MemoryBound()
        self.capacity, self.free = 0, 0

    def spend(self, count: int) -> None:
        """Set `count` pages aside, of those that are known to be free."""
        assert count <= self.free
        self.free -= count

    def learn(self, free: int) -> None:
        """The device says how many pages are free."""
        assert 0 <= free <= self.capacity
        self.free = free

    def grow(self, count: int) -> None:
        """`count` free pages were added."""
        self.capacity += count
        self.free += count
        self.bound.used += count * self.page_bytes


def plan_growth(needs: Sequence[tuple[PageBudget, int, int]]) -> list[int]:
    """How many pages to add to each pool.

    Args:
        needs: pools that share a bound: the budget, the pages that it must have free, and those that it should grow
            by if it has to grow at all and the bound allows it.

    Raises:
        PoolFullError: if the bound does not allow the pages that are missing.
    """
    missing = [max(0, count - budget.free) for budget, count, _ in needs]
    needed = sum(pages * budget.page_bytes for pages, (budget, _, _) in zip(missing, needs, strict=True))
    bound = needs[0][0].bound
    room = None if bound.most is None else bound.most - bound.used
    if room is not None and needed and needed > room:
        raise PoolFullError(
            f"{sum(missing)} more pages ({needed} bytes) are needed, and {max(0, room)} of max_memory's {bound.most} "
            "bytes are left; raise max_memory, or use fewer or shorter sequences"
        )
    growth = []
    for pages, (budget, _, wanted) in zip(missing, needs, strict=True):
        spare = max(0, wanted - pages) if pages else 0
        if room is not None:
            spare = min(spare, (room - needed) // budget.page_bytes)
            room -= spare * budget.page_bytes
        growth.append(pages + spare)
    return growth
