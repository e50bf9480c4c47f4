"""The packed cache: rings and kept chains of all layers in one pool of pages.

Legend: B sequences, H query heads, Hkv KV heads, C = B * Hkv chains, P pairs in a page, D head size, w window.

`write` hands pages out on the device, so before it runs the pool must have enough of them and the table the columns
for them. `_reserve` sees to that from bounds that the host knows, and waits for the device only when they do not
suffice: in steady decoding once in P steps, for all layers together.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spkv.cache.pages import PoolFullError
from spkv.cache.pool import PagePool
from spkv.ops.attention import packed_decode, pruned_prefill, write
from spkv.ops.codec import codec
from spkv.ops.packed import CodedPages, PackedLayer
from spkv.ops.reference import count_leaving
from spkv.ops.triton import limits

# A table that is too narrow grows by at least this share.
_WIDENING = 1 / 8


class PackedCache:
    """Holds, for every layer, the window of each sequence and the kept pairs before it, and nothing else.

    Args:
        layers: number of layers that use this cache; they are addressed 0 to layers - 1.
        kv_heads: Hkv, equal in all layers.
        window: w.
        page_size: P.
        max_memory: bytes that the pages may take at most; None for no bound.
        page_dtype: "int8", "fp8" or "int4" code pairs when they leave the window (see `spkv.ops.codec`), and keep
            them in a pool of their own; None keeps them as they are.
        slabs: whether the pool grows in slabs that stay where they are, which only Triton's kernels can read; if not,
            it is copied when it grows, and the old pool stands beside the new one for a moment. None: where Triton's
            kernels run all operators.

    Attributes:
        sequences: B; 0 until the first pairs tell it, with their dtype and device.
        moves: changes whenever a tensor that the operators are given was replaced; a CUDA graph captured before is
            of no use then.
    """

    pool: PagePool  # of pages [2, P, D], for rings, and for kept pairs that are not coded
    kept_pool: PagePool  # of pages of bytes, for coded pairs; `pool` itself if they are not
    table: Tensor  # [layers, C, columns] int32
    seen: Tensor  # [layers, B] int32
    kept: Tensor  # [layers, C] int32
    ring_keep: Tensor  # [layers, C, w] bool

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        window: int,
        page_size: int = 16,
        max_memory: int | None = None,
        page_dtype: str | None = None,
        slabs: bool | None = None,
    ) -> None:
        self.layers, self.kv_heads, self.window, self.page_size = layers, kv_heads, window, page_size
        self.max_memory, self.page_dtype, self.slabs = max_memory, page_dtype, slabs
        self.codec = None if page_dtype is None else codec(page_dtype)
        self.ring_pages = -(-window // page_size)
        self._moves = 0
        self._forget()

    def _forget(self) -> None:
        self._moves += 1 + sum(pool.moves for pool in self._pools())  # never again a number seen before
        for name in ("pool", "kept_pool", "table", "seen", "kept", "ring_keep"):
            self.__dict__.pop(name, None)
        self.sequences = 0
        # What the host knows, by layer: the least tokens that a sequence has seen, the most pairs that a chain has
        # kept, and the single tokens for which pages were set aside.
        self._seen_least, self._kept_most, self._credit = ([0] * self.layers for _ in range(3))
        self._incomplete: set[int] = set()  # sequences whose last pass failed half-way

    def __getstate__(self) -> dict[str, Any]:
        # Ids of pages in slabs are distances between addresses, so copies and pickles take pages and not ids.
        names = ("layers", "kv_heads", "window", "page_size", "max_memory", "page_dtype", "slabs")
        arguments = {name: getattr(self, name) for name in names}
        return {"arguments": arguments, "state": self.state(), "incomplete": self._incomplete}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["arguments"])  # type: ignore[misc]
        self.load_state(state["state"])
        self._incomplete = state["incomplete"]

    @property
    def moves(self) -> int:
        return self._moves + sum(pool.moves for pool in self._pools())

    def _pools(self) -> list[PagePool]:
        if "pool" not in vars(self):
            return []
        return [self.pool] if self.kept_pool is self.pool else [self.pool, self.kept_pool]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keep: Tensor,
        valid: Tensor | None = None,
        *,
        sequences: slice | None = None,
        **options: Any,
    ) -> Tensor:
        """Write new pairs and return the attention of their queries against everything visible.

        Args:
            layer: 0 to layers - 1.
            query: [B, H, T, D]; key, value: [B, Hkv, T, D]; keep: [B, Hkv, T] bool; valid: [B, T] bool or None.
            sequences: a range of the cache's sequences, if not all take part; B is their number then.
            options: scale, softcap, sinks, implementation, handed to the operator.

        Returns:
            [B, H, T, D].

        Raises:
            PoolFullError: if the pages needed would exceed `max_memory`. The layers before this one have taken the
                tokens then, so these sequences are refused until they are dropped; others are as they were. After
                `prepare(1)` this cannot happen to single tokens.
            ValueError, TypeError: for shapes or dtypes that do not fit what the cache holds.
        """
        if not self.sequences:
            self.allocate(key, query.shape[1] // key.shape[1])
        rows = self._rows(sequences)
        self._check_batch(key, rows)
        packed, out = self.layer(layer, rows), None
        try:
            if query.shape[2] > 1:
                out = pruned_prefill(query, key, value, keep, window=self.window, past=packed, valid=valid, **options)
            moves = self.moves
            self._reserve(layer, rows, keep, valid)
            if self.moves != moves:
                packed = self.layer(layer, rows)
        except (PoolFullError, torch.OutOfMemoryError):
            self._incomplete.update(rows)
            raise
        write(packed, key.detach(), value.detach(), keep, valid)
        return packed_decode(query, packed, **options) if out is None else out

    def layer(self, layer: int, rows: range | None = None) -> PackedLayer:
        """The storage of one layer, as the operators take it, of all sequences or of a range.

        Valid until `moves` changes.
        """
        rows = range(self.sequences) if rows is None else rows
        chains = slice(rows.start * self.kv_heads, rows.stop * self.kv_heads)
        return PackedLayer(
            pool=self.pool.pages,
            table=self.table[layer, chains],
            seen=self.seen[layer, rows.start : rows.stop],
            kept=self.kept[layer, chains],
            ring_keep=self.ring_keep[layer, chains],
            window=self.window,
            free=self.pool.free,
            taken=self.pool.taken,
            scattered=self.pool.slabs,
            coded=None
            if self.codec is None
            else CodedPages(self.codec, self.kept_pool.pages, self.kept_pool.free, self.kept_pool.taken),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds, tables and free pages included."""
        if not self.sequences:
            return 0
        tensors = (self.table, self.seen, self.kept, self.ring_keep)
        pools = sum(pool.nbytes for pool in self._pools())
        return pools + sum(t.numel() * t.element_size() for t in tensors)

    @property
    def pair_bytes(self) -> int:
        """Bytes of a key and its value, not coded."""
        return self.pool.page_bytes // self.page_size

    def pages_in_use(self) -> int:
        """Pages that are not free."""
        return sum(pool.in_use() for pool in self._pools())

    def kept_pairs(self) -> Tensor:
        """[layers, B, Hkv] int64: pairs kept past the window."""
        return self.kept.view(self.layers, -1, self.kv_heads).long()

    def left_window(self) -> Tensor:
        """[layers, B] int64: tokens that have left the window."""
        return (self.seen - self.window).clamp_min(0).long()

    def prepare(self, tokens: int) -> int:
        """Set pages aside for the next single tokens of all sequences and layers, so that they need no word from the
        host; a captured CUDA graph can then be replayed as often.

        Returns:
            The number of tokens prepared for, `tokens` at most: one where a bounded pool may be nearly full.

        Raises:
            PoolFullError: if not even the next token surely fits. Nothing has changed then.
        """
        self._refuse_incomplete(range(self.sequences))
        if min(self._credit) >= tokens:
            return tokens
        self._credit = [0] * self.layers
        ahead = -(-tokens // self.page_size) * self.page_size
        try:
            self._provide(range(self.layers), self.sequences, ahead)
        except PoolFullError:
            ahead, whole = 1, self._all_layers()
            keep = torch.zeros(whole.seen.shape[0], self.kv_heads, 1, dtype=torch.bool, device=self.table.device)
            self._provide(range(self.layers), self.sequences, 1, lambda: self._needs(whole, keep, None))
        self._credit = [ahead] * self.layers
        return min(tokens, ahead)

    def make_columns(self, tokens: int) -> None:
        """Widen the table for so many tokens more, which saves a graph from being captured anew for each widening."""
        self._ask()
        self._widen(self._columns_for(max(self._kept_most) + tokens))

    def spend(self, tokens: int) -> None:
        """Every sequence has taken at most `tokens` single tokens in every layer, without `attend` (a CUDA graph)."""
        for layer in range(self.layers):
            self._credit[layer] -= tokens
            self._kept_most[layer] += tokens
            assert self._credit[layer] >= 0

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Passes inside change nothing that the host knows: they run on the device only, when a graph is replayed."""
        before = [*self._seen_least], [*self._kept_most], [*self._credit]
        try:
            yield
        finally:
            self._seen_least, self._kept_most, self._credit = before

    def drop(self, sequences: list[int]) -> None:
        """Forget sequences and free their pages; the others go on, and new ones can take their places."""
        sequences = sorted(set(sequences))
        self._check_sequences(sequences)
        if not sequences:
            return
        table, used = self.table[:, self._chains(sequences)], self._columns_in_use(sequences)
        for pool, mine in self._split(used):
            pool.give(table[mine])
        self.seen[:, sequences] = 0
        self.kept[:, self._chains(sequences)] = 0
        self._seen_least, self._credit = [0] * self.layers, [0] * self.layers
        self._incomplete.difference_update(sequences)

    def select(self, indices: Tensor) -> None:
        """Make sequence i what sequence indices[i] was; sequences not named are dropped (beam search)."""
        if not self.sequences:
            return
        wanted: list[int] = indices.tolist()
        self._check_sequences(wanted)
        self.drop([i for i in range(self.sequences) if i not in wanted])
        self._credit = [0] * self.layers
        # A sequence's first use keeps its pages, every further use copies them.
        repeated = [n for n, i in enumerate(wanted) if i in wanted[:n]]
        self._bound(self.pool, self.kept_pool, len(wanted))
        used = {i: self._split(self._columns_in_use([i])) for i in {wanted[n] for n in repeated}}
        self._ask()
        for index, pool in enumerate(self._pools()):
            pool.set_aside(sum(int(used[wanted[n]][index][1].sum()) for n in repeated))
        chains = self._chains(wanted)
        self.table, self.kept = self.table[:, chains], self.kept[:, chains]
        self.seen, self.ring_keep = self.seen[:, wanted], self.ring_keep[:, chains]
        for n in repeated:  # one by one, since each copy exists twice for a moment
            own = self.table[:, self._chains([n])]
            for pool, mine in used[wanted[n]]:
                old_ids = own[mine]
                own[mine] = new_ids = pool.take(old_ids.numel())
                pool.scatter(new_ids, pool.gather(old_ids))
            self.table[:, self._chains([n])] = own
        self.sequences = len(wanted)
        self._incomplete = {n for n, i in enumerate(wanted) if i in self._incomplete}
        self._moves += 1

    def reset(self) -> None:
        """Forget every sequence and free all memory."""
        self._forget()

    def state(self) -> dict[str, Tensor]:
        """The cache as tensors, compact (no free pages); `load_state` is the inverse."""
        if not self.sequences:
            return {}
        table, state = torch.zeros_like(self.table), {}
        used = self._columns_in_use(list(range(self.sequences)))
        for name, (pool, mine) in zip(("pool", "kept_pool"), self._split(used), strict=False):
            ids = self.table[mine]
            table[mine] = torch.arange(ids.numel(), dtype=table.dtype, device=table.device)
            state[name] = pool.gather(ids)
        if self.page_dtype is not None:
            state["codec"] = torch.tensor(list(self.page_dtype.encode()), dtype=torch.uint8)
        lengths = {name: getattr(self, name).clone() for name in ("seen", "kept", "ring_keep")}
        return state | {"table": table} | lengths

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over a `state` of a cache of the same sizes.

        Raises:
            ValueError: if the state is of a cache of other sizes or another page_dtype, or `max_memory` holds no page.
            PoolFullError: if it exceeds `max_memory`. The cache is empty then.
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
        coded = bytes(state["codec"].tolist()).decode() if "codec" in state else None
        if coded != self.page_dtype:
            raise ValueError(
                f"the state's kept pairs are coded as {coded}, and this cache's page_dtype is {self.page_dtype}"
            )
        self.reset()
        pages = state["pool"]
        self.allocate(pages.new_empty(state["seen"].shape[1], self.kv_heads, 0, pages.shape[-1]))
        for name in ("table", "seen", "kept", "ring_keep"):
            setattr(self, name, state[name].clone())
        used = self._columns_in_use(list(range(self.sequences)))
        try:
            for name, (pool, mine) in zip(("pool", "kept_pool"), self._split(used), strict=False):
                pool.set_aside(state[name].shape[0])
                ids = pool.take(state[name].shape[0])
                pool.scatter(ids, state[name])
                self.table[mine] = ids[self.table[mine].long()]
        except PoolFullError:
            self.reset()
            raise
        self._ask()

    def allocate(self, key: Tensor, group: int = 1) -> None:
        """Make the tensors, without pages, for sequences and pairs like those of key [B, Hkv, T, D].

        `group` is the number of queries of a KV head.
        """
        B, Hkv, _, D = key.shape
        slabs = self.slabs
        if slabs is None:
            reason = limits.model(D, group, key.dtype, key.device) or limits.codec(self.page_dtype, D, key.device)
            # Gradients want implementations that find pages by index.
            slabs = key.is_cuda and reason is None and not torch.is_grad_enabled()
        pool = kept_pool = PagePool((2, self.page_size, D), key.dtype, key.device, slabs)
        if self.codec is not None:
            if reason := self.codec.obstacle(D):
                raise ValueError(f"page_dtype={self.page_dtype!r}: {reason}")
            kept_pool = PagePool((self.codec.page_bytes(self.page_size, D),), torch.uint8, key.device, slabs)
        self._bound(pool, kept_pool, B)
        self.pool, self.kept_pool = pool, kept_pool
        self.table = torch.zeros(self.layers, B * Hkv, self.ring_pages, dtype=torch.int32, device=key.device)
        self.seen = torch.zeros(self.layers, B, dtype=torch.int32, device=key.device)
        self.kept = torch.zeros(self.layers, B * Hkv, dtype=torch.int32, device=key.device)
        self.ring_keep = torch.zeros(self.layers, B * Hkv, self.window, dtype=torch.bool, device=key.device)
        self.sequences = B
        self._moves += 1

    def _bound(self, pool: PagePool, kept_pool: PagePool, sequences: int) -> None:
        """Share `max_memory` between rings, which have a size, and coded pairs."""
        if self.max_memory is None:
            return
        if kept_pool is pool:
            pool.bound(self.max_memory)
            return
        rings = self.layers * sequences * self.kv_heads * self.ring_pages * pool.page_bytes
        kept_pool.bound(self.max_memory - rings)
        pool.bound(rings)

    def _rows(self, sequences: slice | None) -> range:
        rows = range(self.sequences)[slice(None) if sequences is None else sequences]
        if rows.step != 1 or not rows:
            raise ValueError(f"sequences must be a range of the cache's {self.sequences}, not {sequences}")
        self._refuse_incomplete(rows)
        return rows

    def _refuse_incomplete(self, rows: range) -> None:
        refused = sorted(self._incomplete.intersection(rows))
        if refused:
            raise PoolFullError(
                f"the pool was full in the middle of a pass, which left sequences {refused} incomplete: drop them, or "
                "reset the cache"
            )

    def _check_batch(self, key: Tensor, rows: range) -> None:
        if key.shape[0] != len(rows) or key.shape[1] != self.kv_heads:
            raise ValueError(
                f"the cache holds {len(rows)} sequences of {self.kv_heads} KV heads, but was given "
                f"{key.shape[0]} of {key.shape[1]}"
            )
        if key.device != self.pool.pages.device:
            raise ValueError(
                f"the cache lives on {self.pool.pages.device}, but was given pairs on {key.device}; "
                "a model spread over several devices is not supported"
            )

    def _check_sequences(self, sequences: list[int]) -> None:
        if any(not 0 <= i < self.sequences for i in sequences):
            raise ValueError(f"sequence indices must lie in 0 to {self.sequences - 1}, not {sequences}")

    def _reserve(self, layer: int, rows: range, keep: Tensor, valid: Tensor | None) -> None:
        """See to it that writing these tokens finds pages and columns."""
        tokens = keep.shape[2]

        def exact() -> tuple[int, int, int]:
            return self._needs(self.layer(layer, rows), keep, valid)

        if tokens > 1:
            # What was set aside for single tokens was counted from another fill of the last pages.
            self._credit = [0] * self.layers
            self._provide([layer], len(rows), tokens, exact)
        elif not self._credit[layer]:
            try:
                self._provide([layer], self.sequences, self.page_size)
                self._credit[layer] = self.page_size
            except PoolFullError:
                self._provide([layer], len(rows), 1, exact)
                self._credit[layer] = 1
        if tokens == 1:
            self._credit[layer] -= 1
        self._kept_most[layer] += tokens
        if valid is None and len(rows) == self.sequences:
            self._seen_least[layer] += tokens

    def _provide(
        self,
        layers: Sequence[int],
        sequences: int,
        tokens: int,
        exact: Callable[[], tuple[int, int, int]] | None = None,
    ) -> None:
        """Set pages aside for so many tokens more in each chain of these layers and sequences, and widen the table.

        `exact` tells the pages and the longest chain, for when the bounds are more than there is.
        """
        for attempt in range(2):
            if attempt:
                self._ask()
            most = [self._most_pages(layer, sequences, tokens) for layer in layers]
            ring, kept = (sum(pages) for pages in zip(*most, strict=True)) if most else (0, 0)
            columns = self._columns_for(max((self._kept_most[layer] for layer in layers), default=0) + tokens)
            if columns <= self.table.shape[2] and all(n <= pool.budget.free for pool, n in self._shares(ring, kept)):
                break
        else:
            if exact is not None:
                ring, kept, longest = exact()
                columns = self._columns_for(longest)
        for pool, pages in self._shares(ring, kept):
            pool.set_aside(pages)
        self._widen(columns)

    def _shares(self, ring: int, kept: int) -> list[tuple[PagePool, int]]:
        """Which pool gives pages of rings and kept ones."""
        return [(self.pool, ring + kept)] if self.codec is None else [(self.pool, ring), (self.kept_pool, kept)]

    def _split(self, used: Tensor) -> list[tuple[PagePool, Tensor]]:
        """Entries of the table [..., columns] bool, by the pool that their pages are of."""
        if self.codec is None:
            return [(self.pool, used)]
        in_ring = torch.arange(used.shape[-1], device=used.device) < self.ring_pages
        return [(self.pool, used & in_ring), (self.kept_pool, used & ~in_ring)]

    def _widen(self, columns: int) -> None:
        missing = columns - self.table.shape[2]
        if missing > 0:
            spare = int(self.table.shape[2] * _WIDENING)
            self.table = torch.nn.functional.pad(self.table, (0, max(missing, spare)))
            self._moves += 1

    def _most_pages(self, layer: int, sequences: int, tokens: int) -> tuple[int, int]:
        """Ring and kept pages that so many tokens more can take in one layer: ceil(a + b) <= ceil(a) + ceil(b)."""
        kept = -(-tokens // self.page_size)
        ring = min(kept, self.ring_pages) if self._seen_least[layer] < self.window else 0
        chains = sequences * self.kv_heads
        return chains * ring, chains * kept

    def _columns_for(self, kept: int) -> int:
        return self.ring_pages - (-kept // self.page_size)

    def _ask(self) -> None:
        """Read lengths and free pages from the device."""
        pools = self._pools()
        lengths = torch.cat([*(pool.taken for pool in pools), self.seen.amin(1), self.kept.amax(1)]).tolist()
        taken, lengths = lengths[: len(pools)], lengths[len(pools) :]
        self._seen_least, self._kept_most = lengths[: self.layers], lengths[self.layers :]
        # Pages set aside and not yet taken are none to set aside again.
        promised = [self._most_pages(i, self.sequences, n) for i, n in enumerate(self._credit) if n]
        shares = self._shares(sum(p[0] for p in promised), sum(p[1] for p in promised))
        for (pool, pages), gone in zip(shares, taken, strict=True):
            pool.budget.learn(max(0, pool.free.numel() - gone - pages))

    def _needs(self, packed: PackedLayer, keep: Tensor, valid: Tensor | None) -> tuple[int, int, int]:
        """Ring and kept pages that writing these tokens takes, and pairs of the then longest chain.

        Waits for the device.
        """
        P = self.page_size
        arriving = torch.full_like(packed.seen, keep.shape[2]) if valid is None else valid.sum(1).to(packed.seen)
        ring_have, ring_need = (-(-n.clamp_max(self.window) // P) for n in (packed.seen, packed.seen + arriving))
        kept = packed.kept + count_leaving(packed, keep, valid)
        new = (ring_need - ring_have).sum() * self.kv_heads, (-(-kept // P) + (-packed.kept // P)).sum()
        ring_pages, kept_pages, longest = torch.stack([*new, kept.max()]).tolist()
        return ring_pages, kept_pages, longest

    def _all_layers(self) -> PackedLayer:
        """All layers as one: their sequences side by side."""
        return dataclasses.replace(
            self.layer(0),
            table=self.table.flatten(0, 1),
            seen=self.seen.flatten(),
            kept=self.kept.flatten(),
            ring_keep=self.ring_keep.flatten(0, 1),
        )

    def _chains(self, sequences: list[int]) -> list[int]:
        return [b * self.kv_heads + h for b in sequences for h in range(self.kv_heads)]

    def _columns_in_use(self, sequences: list[int]) -> Tensor:
        """[layers, their chains, columns] bool: the entries of the table that are pages of these sequences."""
        column = torch.arange(self.table.shape[2], device=self.table.device)
        ring = -(-self.seen[:, sequences].clamp_max(self.window) // self.page_size)
        kept = -(-self.kept[:, self._chains(sequences)] // self.page_size)
        in_ring = column < ring.repeat_interleave(self.kv_heads, 1)[..., None]
        return in_ring | ((column >= self.ring_pages) & (column < self.ring_pages + kept[..., None]))
