"""Who holds which slabs, on the scheduler's side. Integers only.

vLLM hands out blocks; to us a block is a slab: room for `slab_tokens` pairs in every chain of the model, which the
chains of one request may use as they need it. How much a step uses is known only after it ran, on the worker. So a
request gets, before a step, the most that the step can use; the worker reports what it did use; what is left over
goes back while the request runs on. Several steps may be under way at a time, hence the numbers on them.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SlabSizes:
    """What a request of some length takes, in slabs.

    Attributes:
        window: pairs that every chain always holds.
        page_size: pairs in a page.
        slab_tokens: pairs of each chain that a slab has room for; a multiple of `page_size`.
        density: share of the pairs past the window that is expected to be kept.
        chunk: tokens of one request that may run, at most, before it is known what the first of them took.
    """

    window: int
    page_size: int
    slab_tokens: int
    density: float
    chunk: int

    def __post_init__(self) -> None:
        if self.slab_tokens % self.page_size:
            raise ValueError(
                f"vLLM's block size must be a multiple of the cache's page size, {self.page_size}, "
                f"not {self.slab_tokens}"
            )

    def most(self, tokens: int) -> int:
        """Slabs of a request with so many tokens that keeps every pair."""
        return self._slabs(self._ring(tokens) - (-self._left(tokens) // self.page_size))

    def growth(self, seen: int, new: int) -> int:
        """Slabs that `new` tokens can take at most, after `seen` of them, whatever was kept before.

        A chain's last page may have any fill, so that n pairs take ceil(n / page_size) pages at most.
        """
        kept = self._left(seen + new) - self._left(seen)
        return self._slabs(self._ring(seen + new) - self._ring(seen) - (-kept // self.page_size))

    def expected(self, tokens: int) -> int:
        """Slabs that a request is expected to hold while its last tokens are computed, their reservation included."""
        left = self._left(tokens)
        pages = self._ring(tokens) + self.density * left / self.page_size + (0.5 if left else 0.0)
        slabs = -int(-pages * self.page_size // self.slab_tokens)
        chunk = min(self.chunk, tokens)
        return min(self.most(tokens), slabs + self.growth(tokens - chunk, chunk))

    def _ring(self, tokens: int) -> int:
        return -(-min(tokens, self.window) // self.page_size)

    def _left(self, tokens: int) -> int:
        return max(0, tokens - self.window)

    def _slabs(self, pages: int) -> int:
        return -(-pages * self.page_size // self.slab_tokens)


@dataclass
class Orders:
    """What the worker is told before a step.

    Attributes:
        step: its number.
        grants: (row, index, slabs): the row's slabs from this index on. Index 0 starts a request in the row.
        rows: request -> row, of the requests whose use is to be reported.
    """

    step: int
    grants: list[tuple[int, int, list[int]]] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)


@dataclass
class _Request:
    row: int
    since: int  # the step that it started in
    tokens: int = 0  # scheduled so far
    held: int = 0  # slabs
    used: int = 0  # slabs, when last reported
    under_way: deque[tuple[int, int]] = field(default_factory=deque)  # steps not yet reported, and what they may take
    grants: list[tuple[int, list[int]]] = field(default_factory=list)  # since the last orders


class Ledger:
    """The slabs of all requests that have any.

    Attributes:
        step: the number of the step that is being scheduled.
        returned: slabs taken back from requests while they ran, in all.
    """

    def __init__(self, sizes: SlabSizes) -> None:
        self.sizes, self.step, self.returned = sizes, 0, 0
        self._requests: dict[str, _Request] = {}
        self._free_rows: list[int] = []
        self._rows = 0

    def missing(self, request: str, tokens: int) -> int:
        """Slabs that a request lacks to surely get to `tokens` tokens."""
        known = self._requests.get(request)
        return self.sizes.most(tokens) if known is None else max(0, self._needed(known, tokens) - known.held)

    def missing_expected(self, request: str, tokens: int) -> int:
        """Slabs that a request is expected to lack over its way to `tokens` tokens."""
        known = self._requests.get(request)
        return max(0, self.sizes.expected(tokens) - (0 if known is None else known.held))

    def grant(self, request: str, tokens: int, slabs: list[int]) -> None:
        """The step being scheduled runs the request up to `tokens` tokens, with these slabs in addition."""
        known = self._requests.get(request)
        if known is None:
            known = self._requests[request] = _Request(self._take_row(), self.step)
        growth = self.sizes.growth(known.tokens, max(0, tokens - known.tokens))
        known.under_way.append((self.step, growth))
        known.tokens = max(known.tokens, tokens)
        if slabs:
            known.grants.append((known.held, slabs))
            known.held += len(slabs)

    def orders(self) -> Orders:
        """Close the step being scheduled."""
        orders = Orders(self.step)
        for name, request in self._requests.items():
            orders.grants += [(request.row, index, slabs) for index, slabs in request.grants]
            request.grants = []
            if request.under_way and request.under_way[-1][0] == self.step:
                orders.rows[name] = request.row
        self.step += 1
        return orders

    def report(self, step: int, used: dict[str, int]) -> dict[str, int]:
        """A step has run, and its requests now use so many slabs.

        Returns:
            The number of slabs to take back from the end of each request's.
        """
        surplus = {}
        for name, slabs in used.items():
            request = self._requests.get(name)
            if request is None or step < request.since:  # it ended, or was preempted and started anew
                continue
            assert slabs <= request.held
            request.used = slabs
            while request.under_way and request.under_way[0][0] <= step:
                request.under_way.popleft()
            # What the next token needs would be asked for again at once.
            count = request.held - self._needed(request, request.tokens + 1)
            if count > 0:
                request.held -= count
                surplus[name] = count
        self.returned += sum(surplus.values())
        return surplus

    def totals(self) -> dict[str, int]:
        """Slabs of all requests: held, in use when last reported, those of a dense cache, and those returned so far."""
        requests = self._requests.values()
        return {
            "slabs_held": sum(request.held for request in requests),
            "slabs_used": sum(request.used for request in requests),
            "slabs_dense": sum(-(-request.tokens // self.sizes.slab_tokens) for request in requests),
            "slabs_returned": self.returned,
        }

    def release(self, request: str) -> None:
        """A request has ended or was preempted; all its slabs are free."""
        known = self._requests.pop(request, None)
        if known is not None:
            heapq.heappush(self._free_rows, known.row)

    def _needed(self, request: _Request, tokens: int) -> int:
        growth = self.sizes.growth(request.tokens, max(0, tokens - request.tokens))
        promised = sum(slabs for _, slabs in request.under_way)
        return min(self.sizes.most(tokens), request.used + promised + growth)

    def _take_row(self) -> int:
        if self._free_rows:
            return heapq.heappop(self._free_rows)
        self._rows += 1
        return self._rows - 1
