"""The packed cache on the worker's side: rings and kept chains of all layers in slabs that vLLM hands out.

Legend: R rows, one a request; Hkv KV heads; C = R * Hkv chains; P pairs in a page; D head size; w window; B requests
of a step; T tokens of each of N of them.

A slab is a number of pages in a row, as many for each chain of a request. Any chain may use any page of its request's
slabs: a request's pages are numbered through, page n being page n % per_slab of its slab n // per_slab, and a cursor
says how many are taken. Chains only grow, so the cursor only advances. It does so on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spkv.ops.attention import packed_decode, pruned_prefill, write
from spkv.ops.packed import PackedLayer
from spkv.ops.reference import pages_held_and_new
from spkv.ops.triton import limits
from spkv.serving.ledger import Orders


class SlabCache:
    """Rings and chains of all layers and requests.

    Steps of a fixed number of requests, as CUDA graphs replay, are padded with requests that were never started; their
    first slab is vLLM's null block. They share a row of their own, which is empty when a step begins.

    Args:
        pool: [pages, 2, P, D], the memory of all slabs.
        layers, kv_heads: of this worker.
        window: w.
        slab_tokens: pairs of each chain that a slab has room for.
        rows: requests at a time.
        max_tokens: of one request.
    """

    def __init__(
        self, pool: Tensor, layers: int, kv_heads: int, window: int, slab_tokens: int, rows: int, max_tokens: int
    ) -> None:
        self.pool, self.layers, self.kv_heads, self.window = pool, layers, kv_heads, window
        self.page_size = pool.shape[2]
        self.per_slab = layers * kv_heads * (slab_tokens // self.page_size)
        self.ring_pages = -(-window // self.page_size)
        pages = self.ring_pages - (-max_tokens // self.page_size)  # of a chain, at most
        self.padding_row = rows
        total = rows + 1
        integers: dict[str, Any] = dict(dtype=torch.int32, device=pool.device)
        # The last column belongs to nobody: what is not to be written is written there.
        self.table = torch.zeros(layers, total * kv_heads, pages + 1, **integers)
        self.seen = torch.zeros(layers, total, **integers)
        self.kept = torch.zeros(layers, total * kv_heads, **integers)
        self.ring_keep = torch.zeros(layers, total * kv_heads, window, dtype=torch.bool, device=pool.device)
        self.slabs = torch.zeros(total, -(-pages * self.page_size // slab_tokens) + 1, **integers)
        self.taken = torch.zeros(total, **integers)
        # A request's first slab stays its own while it runs, and so tells whose it is.
        self.row_of_slab = torch.full((pool.shape[0] // self.per_slab,), self.padding_row, **integers)

    def apply(self, orders: Orders) -> None:
        """Start requests and enter the slabs that a step was granted."""
        if not orders.grants:
            return
        flat = [slab for _, _, slabs in orders.grants for slab in slabs]
        # Pinned, and all at once, so that the host waits for no copy.
        granted = torch.tensor(flat, dtype=torch.int32, pin_memory=self.pool.is_cuda)
        pieces = granted.to(self.pool.device, non_blocking=True).split([len(slabs) for _, _, slabs in orders.grants])
        for (row, index, slabs), ids in zip(orders.grants, pieces, strict=True):
            self.slabs[row, index : index + len(slabs)] = ids
            if index == 0:
                self.row_of_slab[slabs[0]].fill_(row)
                self.clear(row)

    def clear(self, row: int) -> None:
        """Forget what a row holds; filled in place, since assigning a number to one element copies it from the host."""
        self.taken[row].zero_()
        self.seen[:, row].zero_()
        self.kept[:, row * self.kv_heads : (row + 1) * self.kv_heads].zero_()

    def begin(self, first_slabs: Tensor) -> Step:
        """Begin a step of requests, told by their first slabs [B]."""
        return Step(self, self.row_of_slab[first_slabs])

    def slabs_of(self, pages: int) -> int:
        """Slabs that so many pages of a request lie in."""
        return -(-pages // self.per_slab)


class Step:
    """What a cache holds of the requests of a step, side by side, for all layers; call `end` after the last.

    Lengths are gathered at once, since requests lie in rows anywhere, and a layer's part is little work for many
    launches. Tables, which are large, stay where they are.

    Args:
        cache: whose lengths change when the step ends.
        rows: [B] int32, all different but for the padding row.
    """

    def __init__(self, cache: SlabCache, rows: Tensor) -> None:
        self.cache, self.rows, index = cache, rows, rows.long()
        self.chains = (index[:, None] * cache.kv_heads + torch.arange(cache.kv_heads, device=rows.device)).flatten()
        self.seen, self.kept = cache.seen[:, index], cache.kept[:, self.chains]
        self.ring_keep = cache.ring_keep[:, self.chains]
        self.slabs, self.taken = cache.slabs[index], cache.taken[index]

    def attend(
        self,
        layer: int,
        requests: slice,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keep: Tensor,
        *,
        lengths: Tensor | None = None,
        valid: Tensor | None = None,
        scale: float,
    ) -> Tensor:
        """Write new pairs and return the attention of their queries against everything visible.

        Args:
            layer: 0 to layers - 1.
            requests: N of the step's.
            query: [N, H, T, D]; key, value: [N, Hkv, T, D]; keep: [N, Hkv, T] bool.
            lengths: [N] int32, how many tokens each has; the rest of its T is padding. None: all have T.
            valid: [N, T] bool, the same as a mask.
            scale: factor on the scores.

        Returns:
            [N, H, T, D]; what stands at padding means nothing.
        """
        packed = self.layer(layer, requests)
        # What can count pages can take them.
        if limits.count_pages({"packed": packed}) is None:
            from spkv.ops.triton.slabs import take_pages

            take_pages(packed, keep, self.slabs[requests], self.taken[requests], self.cache.per_slab, lengths)
        else:
            self._take_pages(requests, packed, keep, valid)
        out = None
        if query.shape[2] > 1:
            window = self.cache.window
            out = pruned_prefill(query, key, value, keep, window=window, scale=scale, past=packed, valid=valid)
        write(packed, key, value, keep, valid)
        return packed_decode(query, packed, scale=scale) if out is None else out

    def layer(self, layer: int, requests: slice) -> PackedLayer:
        """The storage of some requests in one layer, as the operators take it."""
        heads = self.cache.kv_heads
        chains = slice(requests.start * heads, requests.stop * heads)
        return PackedLayer(
            pool=self.cache.pool,
            table=self.cache.table[layer],
            rows=self.rows[requests],
            seen=self.seen[layer, requests],
            kept=self.kept[layer, chains],
            ring_keep=self.ring_keep[layer, chains],
            window=self.cache.window,
        )

    def end(self) -> None:
        """Put everything back."""
        cache, index = self.cache, self.rows.long()
        cache.seen[:, index], cache.kept[:, self.chains] = self.seen, self.kept
        cache.ring_keep[:, self.chains], cache.taken[index] = self.ring_keep, self.taken
        cache.clear(cache.padding_row)

    def _take_pages(self, requests: slice, packed: PackedLayer, keep: Tensor, valid: Tensor | None = None) -> None:
        """Enter the pages that writing these tokens takes into the table, and advance the cursors."""
        (N, Hkv, T), page_size, per_slab = keep.shape, self.cache.page_size, self.cache.per_slab
        ring_held, ring_new, kept_held, kept_new = pages_held_and_new(packed, keep, valid)
        ring_held, ring_new = (n[:, None].expand(N, Hkv) for n in (ring_held, ring_new))
        kept_held, kept_new = (n.view(N, Hkv) for n in (kept_held, kept_new))
        # [N, Hkv, 2]: pages of ring and kept pages, and the first column for each.
        count = torch.stack([ring_new, kept_new], 2)
        column = torch.stack([ring_held, self.cache.ring_pages + kept_held], 2)
        before = (count.flatten(1).cumsum(1) - count.flatten(1)).view_as(count)
        # As many as there can be for each, so that the host need not know how many there are.
        nth = torch.arange(-(-T // page_size), device=keep.device)
        wanted = nth < count[..., None]
        number = self.taken[requests].view(N, 1, 1, 1) + before[..., None] + nth
        last = self.slabs.shape[1] - 1
        slab = self.slabs[requests].gather(1, (number // per_slab).clamp_max(last).flatten(1))
        page = slab.view_as(number) * per_slab + number % per_slab
        columns = torch.where(wanted, column[..., None] + nth, packed.table.shape[1] - 1)
        chains = self.chains.view(-1, Hkv, 1)[requests]
        packed.table[chains, columns.flatten(2)] = page.flatten(2).to(packed.table.dtype)
        self.taken[requests] += count.sum((1, 2)).to(self.taken.dtype)


class UseReader:
    """Tells how many slabs the requests of a step use after it, of a GPU one step late.

    The host runs ahead of a GPU. What it asks about the step that it has just launched it gets when that step is done,
    with nothing launched behind it. So it asks for a copy, and reads it when the next step is launched; that wait, for
    the step before, leaves the GPU with work. All workers are late by the same, so that their reports go together.
    """

    def __init__(self, cache: SlabCache, late: bool) -> None:
        self._cache, self._late = cache, late
        pinned = cache.taken.is_cuda
        # One is read while the other is written.
        self._copies = [torch.empty(cache.taken.shape, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._asked: tuple[Orders, Tensor, torch.cuda.Event | None] | None = None

    def after(self, orders: Orders) -> tuple[int, dict[str, int]] | None:
        """Call once the step of these orders is launched.

        Returns:
            A step and the slabs in use after it by each of its requests; None where there is nothing to tell.
        """
        asked, self._asked = self._asked, None
        if orders.rows:
            copy = self._copies[0].copy_(self._cache.taken, non_blocking=True)
            self._copies.reverse()
            done = torch.cuda.Event() if self._cache.taken.is_cuda else None
            if done is not None:
                done.record()
            self._asked = orders, copy, done
        if not self._late:
            asked, self._asked = self._asked, None
        if asked is None:
            return None
        orders, copy, done = asked
        if done is not None:
            done.synchronize()
        pages = copy.tolist()
        return orders.step, {name: self._cache.slabs_of(pages[row]) for name, row in orders.rows.items()}
