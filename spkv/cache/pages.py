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
    """The bytes that the pages of several pools may take together.

    Attributes:
        most: the bound, or None.
        budgets: those of the pools.
    """

    def __init__(self, most: int | None = None):
        if most is not None and most < 1:
            raise ValueError(f"max_memory must be at least 1 or None, not {most}")
        self.most, self.budgets = most, list[PageBudget]()

    def used(self) -> int:
        """Bytes of all pages, free ones and those held back included."""
        return sum(budget.used() for budget in self.budgets)


class PageBudget:
    """The pages of one pool.

    Attributes:
        page_bytes: bytes of a page.
        bound: on the bytes, shared with other pools.
        capacity: pages in the pool, free or in use.
        free: pages that are free at least.
        held_back: pages that other pools must leave room for, in the pool already or not.
    """

    def __init__(self, page_bytes: int, bound: MemoryBound | None = None):
        self.page_bytes, self.bound = page_bytes, bound or MemoryBound()
        self.capacity, self.free, self.held_back = 0, 0, 0
        self.bound.budgets.append(self)

    def used(self, more: int = 0) -> int:
        """Bytes that count against the bound, if `more` pages were added."""
        return max(self.capacity + more, self.held_back) * self.page_bytes

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


def plan_growth(needs: Sequence[tuple[PageBudget, int, int]]) -> list[int]:
    """How many pages to add to each pool.

    Args:
        needs: pools that share a bound: the budget, the pages that it must have free, and those that it should grow
            by if it has to grow at all and the bound allows it.

    Raises:
        PoolFullError: if the bound does not allow the pages that are missing.
    """
    growth = [max(0, count - budget.free) for budget, count, _ in needs]
    bound = needs[0][0].bound
    needed = sum(budget.used(pages) - budget.used() for pages, (budget, _, _) in zip(growth, needs, strict=True))
    left = None if bound.most is None else bound.most - bound.used() - needed
    if left is not None and needed and left < 0:
        raise PoolFullError(
            f"{sum(growth)} more pages ({needed} bytes) are needed, and {max(0, left + needed)} of max_memory's "
            f"{bound.most} bytes are left; raise max_memory, or use fewer or shorter sequences"
        )
    for index, (budget, _, wanted) in enumerate(needs):
        spare = max(0, wanted - growth[index]) if growth[index] else 0
        if left is not None:
            spare = max(0, min(spare, left // budget.page_bytes))
            left -= spare * budget.page_bytes
        growth[index] += spare
    return growth
