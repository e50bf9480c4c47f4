"""The packed cache: rings and kept chains of all layers in one pool of pages.

Legend: B sequences, H query heads, Hkv KV heads, C = B * Hkv chains, P pairs in a page, D head size, w window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spkv.cache.pages import PageList, PoolFullError
from spkv.ops.attention import packed_decode, pruned_prefill, write
from spkv.ops.packed import PackedLayer
from spkv.ops.reference import count_leaving

# A full pool grows by at least this share. Small, since unused pages count as allocated memory; each growth copies
# the pool once, which decoding does anyway at every step.
_GROWTH = 1 / 64
_TENSORS = ("pool", "table", "seen", "kept", "ring_keep")


class PackedCache:
    """Holds, for every layer, the window of each sequence and the kept pairs before it, and nothing else.

    Args:
        layers: number of layers that use this cache; they are addressed 0 to layers - 1.
        kv_heads: Hkv, equal in all layers.
        window: w.
        page_size: P.
        max_memory: bytes that the pool may take at most; None for no bound. While it grows, the old pool stands
            beside the new one for a moment.
    """

    pool: Tensor  # [pages, 2, P, D]
    table: Tensor  # [layers, C, max_pages]
    seen: Tensor  # [layers, B]
    kept: Tensor  # [layers, C]
    ring_keep: Tensor  # [layers, C, w]

    def __init__(
        self, layers: int, kv_heads: int, window: int, page_size: int = 16, max_memory: int | None = None
    ) -> None:
        self.layers, self.kv_heads, self.window, self.page_size = layers, kv_heads, window, page_size
        self.max_memory = max_memory
        self.ring_pages = -(-window // page_size)
        self.pages = PageList()
        self._overflowed = False
        self.sequences = 0  # B; the tensors are made when the first pairs tell it, with dtype and device

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keep: Tensor,
        valid: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Write new pairs and return the attention of their queries against everything visible.

        Args:
            layer: 0 to layers - 1.
            query: [B, H, T, D]; key, value: [B, Hkv, T, D]; keep: [B, Hkv, T] bool; valid: [B, T] bool or None.
            options: scale, softcap, sinks, implementation, handed to the operator.

        Returns:
            [B, H, T, D].

        Raises:
            PoolFullError: if the pages needed would exceed `max_memory`. Earlier layers have taken the tokens then, so
                the cache refuses everything but `reset`.
            ValueError, TypeError: for shapes or dtypes that do not fit what the cache holds.
        """
        if self._overflowed:
            raise PoolFullError("the pool was full in the middle of a pass, which left it incomplete: reset the cache")
        if not self.sequences:
            self._allocate(key)
        self._check_batch(key)
        if query.shape[2] == 1:
            self._write(layer, key, value, keep, valid)
            return packed_decode(query, self.layer(layer), **options)
        past = self.layer(layer)
        out = pruned_prefill(query, key, value, keep, window=self.window, past=past, valid=valid, **options)
        self._write(layer, key, value, keep, valid)
        return out

    def layer(self, layer: int) -> PackedLayer:
        """The storage of one layer, as the operators take it. Valid until the cache next grows."""
        return PackedLayer(
            pool=self.pool,
            table=self.table[layer],
            seen=self.seen[layer],
            kept=self.kept[layer],
            ring_keep=self.ring_keep[layer],
            window=self.window,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds, tables and free pages included."""
        if not self.sequences:
            return 0
        return sum(t.numel() * t.element_size() for t in (self.pool, self.table, self.seen, self.kept, self.ring_keep))

    def kept_pairs(self) -> Tensor:
        """[layers, B, Hkv] int64: pairs kept past the window."""
        return self.kept.view(self.layers, -1, self.kv_heads).long()

    def left_window(self) -> Tensor:
        """[layers, B] int64: tokens that have left the window."""
        return (self.seen - self.window).clamp_min(0).long()

    def select(self, indices: Tensor) -> None:
        """Make sequence i what sequence indices[i] was; sequences not named are dropped (beam search)."""
        if not self.sequences:
            return
        wanted = [int(i) for i in indices]
        if any(not 0 <= i < self.sequences for i in wanted):
            raise ValueError(f"sequence indices must lie in 0 to {self.sequences - 1}, not {wanted}")
        # A sequence's first use keeps its pages, every further use copies them; those of dropped ones are freed.
        for source in set(range(self.sequences)) - set(wanted):
            for (layer, chain), columns in self._pages_of(source).items():
                self.pages.give(self.table[layer, chain, columns].tolist())
        copies = [i for n, i in enumerate(wanted) if i in wanted[:n]]
        self._ensure_free(sum(len(pages) for i in copies for pages in self._pages_of(i).values()))
        old_table, chains = self.table, self._chains(wanted)
        self.table = old_table[:, chains].clone()
        used: set[int] = set()
        for target, source in enumerate(wanted):
            if source in used:
                for (layer, chain), columns in self._pages_of(source).items():
                    pages = self._take(len(columns))
                    head = chain % self.kv_heads
                    self.pool[pages] = self.pool[old_table[layer, chain, columns].long()]
                    self.table[layer, target * self.kv_heads + head, columns] = pages.to(self.table.dtype)
            used.add(source)
        self.sequences = len(wanted)
        self.seen, self.kept = self.seen[:, wanted].clone(), self.kept[:, chains].clone()
        self.ring_keep = self.ring_keep[:, chains].clone()

    def reset(self) -> None:
        """Forget every sequence and free all memory."""
        self.sequences, self.pages, self._overflowed = 0, PageList(), False
        for name in _TENSORS:
            self.__dict__.pop(name, None)

    def state(self) -> dict[str, Tensor]:
        """The cache as tensors, compact (no free pages); `load_state` is the inverse."""
        if not self.sequences:
            return {}
        used = self._used_pages()
        number = torch.zeros(self.pages.capacity, dtype=torch.int32, device=self.pool.device)
        number[used] = torch.arange(used.numel(), dtype=torch.int32, device=self.pool.device)
        return {
            "pool": self.pool[used],
            "table": number[self.table.long()],
            "seen": self.seen.clone(),
            "kept": self.kept.clone(),
            "ring_keep": self.ring_keep.clone(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over a `state` of a cache of the same sizes.

        Raises:
            ValueError: if the state is of a cache of other sizes.
        """
        if not state:
            self.reset()
            return
        (layers, chains, window), page_size = state["ring_keep"].shape, state["pool"].shape[2]
        sizes = (layers, chains // state["seen"].shape[1], window, page_size)
        own = (self.layers, self.kv_heads, self.window, self.page_size)
        if sizes != own:
            raise ValueError(
                "the state has {} layers, {} KV heads, window {} and pages of {}; this cache has "
                "{} layers, {} KV heads, window {} and pages of {}".format(*sizes, *own)
            )
        self.reset()
        for name in _TENSORS:
            setattr(self, name, state[name].clone())
        self.sequences = self.seen.shape[1]
        self.pages = PageList(self._page_limit())
        self.pages.grow(self.pool.shape[0])
        self.pages.take(self.pool.shape[0])

    def _allocate(self, key: Tensor) -> None:
        B, Hkv, _, D = key.shape
        self.pool = key.new_empty(0, 2, self.page_size, D)
        self.table = torch.zeros(self.layers, B * Hkv, self.ring_pages, dtype=torch.int32, device=key.device)
        self.seen = torch.zeros(self.layers, B, dtype=torch.int32, device=key.device)
        self.kept = torch.zeros(self.layers, B * Hkv, dtype=torch.int32, device=key.device)
        self.ring_keep = torch.zeros(self.layers, B * Hkv, self.window, dtype=torch.bool, device=key.device)
        self.pages = PageList(self._page_limit())
        self.sequences = B

    def _page_limit(self) -> int | None:
        if self.max_memory is None:
            return None
        page_bytes = 2 * self.page_size * self.pool.shape[-1] * self.pool.element_size()
        limit = self.max_memory // page_bytes
        if limit < 1:
            raise ValueError(f"max_memory={self.max_memory} bytes do not hold one page")
        return limit

    def _check_batch(self, key: Tensor) -> None:
        if key.shape[0] != self.sequences or key.shape[1] != self.kv_heads:
            raise ValueError(
                f"the cache holds {self.sequences} sequences of {self.kv_heads} KV heads, but was given "
                f"{key.shape[0]} of {key.shape[1]}"
            )
        if key.device != self.pool.device:
            raise ValueError(
                f"the cache lives on {self.pool.device}, but was given pairs on {key.device}; "
                "a model spread over several devices is not supported"
            )

    def _write(self, layer: int, key: Tensor, value: Tensor, keep: Tensor, valid: Tensor | None) -> None:
        try:
            self._reserve(layer, keep, valid)
        except PoolFullError:
            self._overflowed = True
            raise
        write(self.layer(layer), key.detach(), value.detach(), keep, valid)

    def _reserve(self, layer: int, keep: Tensor, valid: Tensor | None) -> None:
        """Put the pages into the table that writing these tokens needs."""
        packed, P = self.layer(layer), self.page_size
        arriving = torch.full_like(packed.seen, keep.shape[2]) if valid is None else valid.sum(1).to(packed.seen)
        ring_have, ring_need = (-(-n.clamp_max(self.window) // P) for n in (packed.seen, packed.seen + arriving))
        kept_have, kept_need = (-(-n // P) for n in (packed.kept, packed.kept + count_leaving(packed, keep, valid)))
        ring_new = (ring_need - ring_have).repeat_interleave(self.kv_heads).long()
        kept_new = kept_need - kept_have
        total = int(ring_new.sum() + kept_new.sum())
        if total == 0:
            return
        self._ensure_free(total)
        self._widen_table(self.ring_pages + int(kept_need.max()))
        first = torch.stack([ring_have.repeat_interleave(self.kv_heads), self.ring_pages + kept_have], dim=1).long()
        count = torch.stack([ring_new, kept_new], dim=1)
        # One row per (chain, ring or kept): its columns are consecutive from `first`.
        row = torch.arange(count.numel(), device=count.device).repeat_interleave(count.flatten())
        start = count.flatten().cumsum(0) - count.flatten()
        column = first.flatten()[row] + torch.arange(total, device=count.device) - start[row]
        self.table[layer, row // 2, column] = self._take(total).to(self.table.dtype)

    def _widen_table(self, columns: int) -> None:
        missing = columns - self.table.shape[2]
        if missing > 0:
            # Some room to spare: widening copies the table, and every layer grows at about the same time.
            self.table = torch.nn.functional.pad(self.table, (0, missing + columns // 64))

    def _ensure_free(self, count: int) -> None:
        missing = self.pages.shortfall(count)
        if missing:
            before = self.pages.capacity
            self.pages.grow(max(missing, int(before * _GROWTH)))
            pool = self.pool.new_empty(self.pages.capacity, *self.pool.shape[1:])
            pool[:before] = self.pool
            self.pool = pool

    def _take(self, count: int) -> Tensor:
        return torch.tensor(self.pages.take(count), dtype=torch.long, device=self.pool.device)

    def _chains(self, sequences: list[int]) -> list[int]:
        return [b * self.kv_heads + h for b in sequences for h in range(self.kv_heads)]

    def _pages_of(self, sequence: int) -> dict[tuple[int, int], list[int]]:
        """The table columns in use, by (layer, chain), of one sequence."""
        P = self.page_size
        columns = {}
        for layer in range(self.layers):
            ring = -(-min(int(self.seen[layer, sequence]), self.window) // P)
            for chain in self._chains([sequence]):
                kept = -(-int(self.kept[layer, chain]) // P)
                columns[layer, chain] = [*range(ring), *range(self.ring_pages, self.ring_pages + kept)]
        return columns

    def _used_pages(self) -> Tensor:
        pages = [
            self.table[layer, chain, columns]
            for sequence in range(self.sequences)
            for (layer, chain), columns in self._pages_of(sequence).items()
        ]
        return torch.cat(pages).long()
