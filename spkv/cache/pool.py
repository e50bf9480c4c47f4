"""Memory for pages: one tensor that is copied when it grows, or slabs that stay where they are.

Legend: n pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spkv.cache.pages import MemoryBound, PageBudget, plan_growth

# A full pool grows by at least this share. Small, since unused pages count as allocated memory.
_GROWTH = 1 / 64
# With slabs, by at least this many bytes, if they are no larger a share than 1/16: what torch's allocator hands out.
_LEAST_SLAB = 2**21
_LEAST_STACK = 1024


class PagePool:
    """Pages of one size, and the stack of those that are free, on the device.

    A page's id says where it lies, counted in pages from the start of `pages`. Without slabs that is its index. With
    slabs, every growth is an allocation of its own and nothing moves: the ids of its pages lie outside of `pages`,
    even below zero, and only kernels that compute addresses from ids can follow them (Triton's; `gather` and `scatter`
    here serve everyone else). So a captured CUDA graph stays right while the pool grows, and growing takes no second
    pool's worth of memory.

    Args:
        shape: of a page.
        dtype, device: of the pages.
        slabs: whether growth leaves old pages where they are.
        bound: on the bytes of the pages, shared with other pools; None for none.

    Attributes:
        pages: [n, *shape]; with slabs, the first slab.
        budget: how many there are, and how many are free at least.
        free: int32, a stack of ids; those from index `taken` on are free. As long as the pool has pages, or longer.
        taken: [1] int32.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        slabs: bool,
        bound: MemoryBound | None = None,
    ):
        self.slabs = slabs
        self.pages = torch.empty(0, *shape, dtype=dtype, device=device)
        self.budget = PageBudget(self.page_bytes, bound)
        self.free = torch.empty(0, dtype=torch.int32, device=device)
        self.taken = torch.zeros(1, dtype=torch.int32, device=device)
        self.moves = 0  # how often a tensor that kernels are given was replaced
        self._slabs: list[tuple[int, Tensor]] = []  # first id, and pages

    @property
    def page_bytes(self) -> int:
        return self.pages.element_size() * self.pages.shape[1:].numel()

    @property
    def nbytes(self) -> int:
        pages = [slab for _, slab in self._slabs] if self.slabs else [self.pages]
        return sum(t.untyped_storage().nbytes() for t in (self.free, self.taken, *pages))

    def free_count(self) -> int:
        """Free pages; waits for the device."""
        return self.free.numel() - int(self.taken)

    def in_use(self) -> int:
        """Pages that are not free; waits for the device."""
        return self.budget.capacity - self.free_count()

    def usual_growth(self) -> int:
        """Pages that a full pool grows by if it can."""
        capacity = self.budget.capacity
        least = min(_LEAST_SLAB // self.page_bytes, capacity // 16) if self.slabs else 0
        return max(int(capacity * _GROWTH), least)

    def grow(self, count: int) -> None:
        """Add `count` free pages. Whatever fails here, the host believes in no page that is not there."""
        capacity = self.budget.capacity + count
        if capacity > self.free.numel():
            # Twice as long, so that this is rare. An entry is a small fraction of a page.
            longer = self.free.new_empty(max(2 * self.free.numel(), capacity, _LEAST_STACK))
            added = longer.numel() - self.free.numel()
            longer[added:] = self.free
            self.free = longer
            self.taken += added
            self.moves += 1
        if self.slabs:
            first = self._new_slab(count)
        else:
            first = self.pages.shape[0]
            pages = self._allocate(first + count)
            pages[:first] = self.pages
            self.pages = pages
            self.moves += 1
        self.give(torch.arange(first, first + count, dtype=torch.int32, device=self.free.device))
        self.budget.grow(count)

    def give(self, ids: Tensor) -> None:
        """Put pages back on the stack: [n] int32."""
        self.taken -= ids.numel()
        self.free[self.taken + torch.arange(ids.numel(), device=ids.device)] = ids

    def take(self, count: int) -> Tensor:
        """The ids [count] int32 of pages from the stack, which must have them."""
        ids = self.free[self.taken + torch.arange(count, device=self.free.device)]
        self.taken += count
        return ids

    def gather(self, ids: Tensor) -> Tensor:
        """Copies of pages: ids [n] -> [n, *shape]."""
        if not self.slabs:
            return self.pages[ids.long()]
        out = self.pages.new_empty(ids.numel(), *self.pages.shape[1:])
        for first, slab in self._slabs:
            here = ((ids >= first) & (ids < first + slab.shape[0])).nonzero()[:, 0]
            out[here] = slab[ids[here].long() - first]
        return out

    def scatter(self, ids: Tensor, pages: Tensor) -> None:
        """Overwrite pages: ids [n], pages [n, *shape]."""
        if not self.slabs:
            self.pages[ids.long()] = pages
            return
        for first, slab in self._slabs:
            here = ((ids >= first) & (ids < first + slab.shape[0])).nonzero()[:, 0]
            slab[ids[here].long() - first] = pages[here]

    def _new_slab(self, count: int) -> int:
        """Allocate pages a whole number of pages away from the first slab; returns the id of the first of them."""
        if not self._slabs:
            self.pages = self._allocate(count)
            self.moves += 1
            self._slabs.append((0, self.pages))
            return 0
        # One page more than asked for leaves room to start at the right place.
        memory = self._allocate(count + 1)
        distance = memory.data_ptr() - self.pages.data_ptr()
        first = -(-distance // self.page_bytes)
        if not -(2**31) <= first <= first + count < 2**31:
            raise RuntimeError(f"a slab of the page pool lies {distance} bytes from the first: too far for 32-bit ids")
        start = (first * self.page_bytes - distance) // memory.element_size()
        slab = memory.flatten()[start : start + count * memory[0].numel()].view(count, *memory.shape[1:])
        self._slabs.append((first, slab))
        return first

    def _allocate(self, count: int) -> Tensor:
        return self.pages.new_empty(count, *self.pages.shape[1:])


def set_aside(shares: Sequence[tuple[PagePool, int]]) -> None:
    """Set pages of pools that share a bound aside, all or none, growing them by what is missing or somewhat more.

    Raises:
        PoolFullError: if the bound does not allow it.
    """
    growth = plan_growth([(pool.budget, count, pool.usual_growth()) for pool, count in shares])
    for (pool, _), added in zip(shares, growth, strict=True):
        if added:
            pool.grow(added)
    for pool, count in shares:
        pool.budget.spend(count)
