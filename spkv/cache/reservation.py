"""Seeing to it that `write` finds pages and columns, which are handed out on the device.

Bounds that the host knows suffice mostly: the pages that so many tokens can take at most. It waits for the device
only when they do not: in steady decoding once in P steps, for all layers together; for a chunk of a prompt in each
layer, where it asks ahead, so that the answer is there by the time it is needed.

Legend: B sequences, Hkv KV heads, P pairs in a page, w window.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spkv.cache.pages import PoolFullError
from spkv.cache.pool import PagePool, set_aside
from spkv.ops.attention import count_pages
from spkv.ops.reference import pages_held_and_new

if TYPE_CHECKING:
    from spkv.cache.packed import PackedCache

# Pages of rings and kept pages that each of some layers needs, by layer.
_Needs = Iterable[tuple[int, int, int]]


class _Question:
    """Integers [n] that the device was asked for, on their way to the host."""

    def __init__(self, about: tuple[int, range, Tensor], numbers: Tensor):
        self._about = about
        self._numbers, self._there = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._there = torch.cuda.current_stream(numbers.device).record_event()

    def is_about(self, layer: int, rows: range, keep: Tensor) -> bool:
        return self._about[:2] == (layer, rows) and self._about[2] is keep

    def answer(self) -> list[int]:
        if self._there is not None:
            self._there.synchronize()
        return self._numbers.tolist()  # type: ignore[no-any-return]


class Reservation:
    """What was set aside for the passes to come, and what the host knows of lengths meanwhile.

    Attributes:
        seen_least: by layer, the least tokens that a sequence has seen.
        kept_most: by layer, the most pairs that a chain has kept.
        credit: by layer, single tokens of all sequences for which pages are set aside.
        empty: by layer, whether surely nothing was ever written.
    """

    def __init__(self, cache: PackedCache) -> None:
        # Not a reference of its own: a cycle would keep the pages of a cache that nobody uses until Python looks for
        # cycles, and it does not know how much memory they are.
        self.cache: PackedCache = weakref.proxy(cache)
        self.seen_least, self.kept_most, self.credit = ([0] * cache.layers for _ in range(3))
        self.empty = [True] * cache.layers
        self._question: _Question | None = None

    def expect(self, layer: int, rows: range, keep: Tensor, valid: Tensor | None) -> None:
        """Ask ahead what `for_write` of the same chunk, the next of this layer, will have to know."""
        self._question = self._ask_for([layer], rows, keep, valid)

    def for_write(self, layer: int, rows: range, keep: Tensor, valid: Tensor | None) -> None:
        """Provide for a pass of one layer over a range of sequences: keep [B, Hkv, T], valid [B, T] or None."""
        tokens, page_size = keep.shape[2], self.cache.page_size

        asked, self._question = self._question, None

        def exact() -> tuple[_Needs, int]:
            if asked is not None and asked.is_about(layer, rows, keep):
                return self._needs([layer], asked)
            return self._needs([layer], self._ask_for([layer], rows, keep, valid))

        if tokens > 1:
            self.cancel()  # it was counted from another fill of the last pages
            self._provide([layer], len(rows), tokens, exact)
        elif not self.credit[layer]:
            try:
                self._provide([layer], self.cache.sequences, page_size)
                self.credit[layer] = page_size
            except PoolFullError:
                self._provide([layer], len(rows), 1, exact)
                self.credit[layer] = 1
        if tokens == 1:
            self.credit[layer] -= 1
        self.kept_most[layer] += tokens
        self.empty[layer] = False
        if valid is None and len(rows) == self.cache.sequences:
            self.seen_least[layer] += tokens

    def for_steps(self, tokens: int) -> int:
        """Provide for single tokens of all sequences and layers; see `PackedCache.prepare`."""
        cache = self.cache
        if min(self.credit) >= tokens:
            return tokens
        self.cancel()
        ahead = -(-tokens // cache.page_size) * cache.page_size
        layers = range(cache.layers)
        try:
            self._provide(layers, cache.sequences, ahead)
        except PoolFullError:
            ahead = 1
            keep = torch.zeros(cache.sequences, cache.kv_heads, 1, dtype=torch.bool, device=cache.table.device)
            question = self._ask_for(layers, range(cache.sequences), keep, None)
            self._provide(layers, cache.sequences, 1, lambda: self._needs(layers, question))
        self.credit = [ahead] * cache.layers
        return min(tokens, ahead)

    def spend(self, tokens: int) -> None:
        """Every sequence has taken at most `tokens` single tokens in every layer."""
        for layer in range(self.cache.layers):
            self.credit[layer] -= tokens
            self.kept_most[layer] += tokens
            assert self.credit[layer] >= 0
        self.empty = [False] * self.cache.layers

    def cancel(self) -> None:
        """Forget what was set aside: its pages are free, and counted so when the device is asked next."""
        self.credit = [0] * self.cache.layers

    def dropped(self) -> None:
        """Some sequences are empty now."""
        self.seen_least = [0] * self.cache.layers
        self.cancel()

    def columns_for(self, tokens: int) -> int:
        """Columns that the table needs for so many tokens more in every chain. Waits for the device."""
        self.ask()
        return self._columns(max(self.kept_most) + tokens)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Nothing that happens inside counts."""
        before = [*self.seen_least], [*self.kept_most], [*self.credit], [*self.empty]
        try:
            yield
        finally:
            self.seen_least, self.kept_most, self.credit, self.empty = before

    def ask(self) -> None:
        """Read lengths and free pages from the device."""
        self._learn(self._state().tolist())

    def _state(self) -> Tensor:
        """What `_learn` reads, [pools + 2 * layers]: free pages and lengths."""
        cache = self.cache
        return torch.cat([*(pool.taken for pool in cache.pools.values()), cache.seen.amin(1), cache.kept.amax(1)])

    def _learn(self, numbers: list[int]) -> list[int]:
        """Take `_state` over; returns what follows it."""
        cache, pools = self.cache, list(self.cache.pools.values())
        taken, lengths, others = numbers[: len(pools)], numbers[len(pools) :], numbers[len(pools) + 2 * cache.layers :]
        self.seen_least, self.kept_most = lengths[: cache.layers], lengths[cache.layers : 2 * cache.layers]
        # Pages set aside and not yet taken are none to set aside again.
        promised = [(i, *self._most_pages(i, cache.sequences, n)) for i, n in enumerate(self.credit)]
        for (pool, pages), gone in zip(self._shares(promised), taken, strict=True):
            pool.budget.learn(max(0, pool.free.numel() - gone - pages))
        return others

    def _provide(
        self, layers: Sequence[int], sequences: int, tokens: int, exact: Callable[[], tuple[_Needs, int]] | None = None
    ) -> None:
        """Set pages aside for so many tokens more in each chain of these layers and sequences, and widen the table.

        `exact` asks the device for the pages and columns, for when the bounds are more than there is.
        """

        def bounds() -> tuple[list[tuple[PagePool, int]], int]:
            shares = self._shares((layer, *self._most_pages(layer, sequences, tokens)) for layer in layers)
            return shares, self._columns(max((self.kept_most[layer] for layer in layers), default=0) + tokens)

        shares, columns = bounds()
        if columns > self.cache.table.shape[2] or any(pages > pool.budget.free for pool, pages in shares):
            if exact is None:
                self.ask()
                shares, columns = bounds()
            else:
                needs, columns = exact()
                shares = self._shares(needs)
        set_aside(shares)
        self.cache.widen(columns)

    def _shares(self, needs: _Needs) -> list[tuple[PagePool, int]]:
        """How many pages each pool must give."""
        pages = dict.fromkeys(self.cache.pools, 0)
        for layer, ring, kept in needs:
            pages[None] += ring
            pages[self.cache.page_dtypes[layer]] += kept
        return [(self.cache.pools[name], count) for name, count in pages.items()]

    def _most_pages(self, layer: int, sequences: int, tokens: int) -> tuple[int, int]:
        """Ring and kept pages that so many tokens more can take in one layer: ceil(a + b) <= ceil(a) + ceil(b)."""
        cache = self.cache
        kept = -(-tokens // cache.page_size)
        ring = min(kept, cache.ring_pages) if self.seen_least[layer] < cache.window else 0
        chains = sequences * cache.kv_heads
        return chains * ring, chains * kept

    def _columns(self, kept: int) -> int:
        return self.cache.ring_pages - (-kept // self.cache.page_size)

    def _needs(self, layers: Sequence[int], question: _Question) -> tuple[_Needs, int]:
        """Pages that writing takes in each of the layers, and columns for the then longest chain."""
        counts = self._learn(question.answer())
        ring, kept, longest = (counts[i::3] for i in range(3))
        return list(zip(layers, ring, kept, strict=True)), self.cache.ring_pages + max(longest)

    def _ask_for(self, layers: Sequence[int], rows: range, keep: Tensor, valid: Tensor | None) -> _Question:
        """Ask for `_state`, and what writing these tokens to each of the layers takes. Does not wait."""
        cache, L = self.cache, len(layers)
        if L == 1:
            counts = count_pages(cache.layer(layers[0], rows), keep, valid)
        else:
            # All layers and sequences side by side, as if there were so many more sequences.
            assert (L, len(rows)) == (cache.layers, cache.sequences)
            assert valid is None
            seen, kept, ring_keep = cache.seen.flatten(), cache.kept.flatten(), cache.ring_keep.flatten(0, 1)
            packed = dataclasses.replace(cache.layer(0), seen=seen, kept=kept, ring_keep=ring_keep)
            _, ring, held, new = (n.view(L, -1) for n in pages_held_and_new(packed, keep.repeat(L, 1, 1)))
            counts = torch.stack([ring.sum(1) * cache.kv_heads, new.sum(1), (held + new).amax(1)], 1).flatten()
        return _Question((layers[0], rows, keep), torch.cat([self._state(), counts]))
