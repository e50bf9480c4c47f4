"""The packed cache: rings and kept chains of all layers in pools of pages, one for each way of keeping pairs.

Legend: B sequences, H query heads, Hkv KV heads, C = B * Hkv chains, P pairs in a page, D head size, w window.

`write` hands pages out on the device, so before it runs the pools must have enough of them and the table the columns
for them: `reservation.py` sees to that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spkv.cache.pages import MemoryBound, PoolFullError
from spkv.cache.pool import PagePool, set_aside
from spkv.cache.reservation import Reservation
from spkv.config import PAGE_DTYPES, PageDtype, check_page_dtype
from spkv.ops.attention import packed_decode, pruned_prefill, write
from spkv.ops.codec import codec
from spkv.ops.packed import CodedPages, PackedLayer
from spkv.ops.triton import limits

_PAGE_DTYPES = (None, *PAGE_DTYPES)
# A table that is too narrow grows by at least this share.
_WIDENING = 1 / 8


class PackedCache:
    """Holds, for every layer, the window of each sequence and the kept pairs before it, and nothing else.

    Args:
        layers: number of layers that use this cache; they are addressed 0 to layers - 1.
        kv_heads: Hkv, equal in all layers.
        window: w.
        page_size: P.
        max_memory: bytes that the pages may take at most, of all kinds together; None for no bound. (On a GPU each
            growth takes up to one page more, to begin where a page can.) Kinds of pages do not exchange memory.
        page_dtype: "int8", "fp8" or "int4" code pairs when they leave the window (see `spkv.ops.codec`), and keep
            them in a pool of their own; None keeps them as they are. A sequence has one of them for each layer.
        slabs: whether the pool grows in slabs that stay where they are, which only Triton's kernels can read; if not,
            it is copied when it grows, and the old pool stands beside the new one for a moment. None: where Triton's
            kernels run all operators.

    Attributes:
        page_dtypes: the page_dtype of each layer.
        sequences: B; 0 until the first pairs tell it, with their dtype and device.
        moves: changes whenever a tensor that the operators are given was replaced; a CUDA graph captured before is
            of no use then.
    """

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
        page_dtype: PageDtype = None,
        slabs: bool | None = None,
    ) -> None:
        self.layers, self.kv_heads, self.window, self.page_size = layers, kv_heads, window, page_size
        self.max_memory, self.page_dtype, self.slabs = max_memory, check_page_dtype(page_dtype), slabs
        own = self.page_dtype
        self.page_dtypes: tuple[str | None, ...] = own if isinstance(own, tuple) else (own,) * layers
        if len(self.page_dtypes) != layers:
            raise ValueError(f"page_dtype has {len(self.page_dtypes)} entries, and the cache has {layers} layers")
        self._codecs = {name: codec(name) for name in self.page_dtypes if name is not None}
        self.ring_pages = -(-window // page_size)
        self._moves = 0
        # By page_dtype. That of None, pages [2, P, D], holds the rings, too; the others hold pages of bytes.
        self.pools: dict[str | None, PagePool] = {}
        self._forget()

    def _forget(self) -> None:
        self._moves = self.moves + 1  # never again a number seen before
        self.pools = {}
        for name in ("table", "seen", "kept", "ring_keep"):
            self.__dict__.pop(name, None)
        self.sequences = 0
        self._reservation = Reservation(self)
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
        return self._moves + sum(pool.moves for pool in self.pools.values())

    @property
    def pool(self) -> PagePool:
        """The pages of rings, and of kept pairs that are not coded."""
        return self.pools[None]

    def expect(self, layer: int, keep: Tensor, valid: Tensor | None = None) -> None:
        """Say ahead what `attend` will be given for all sequences, so that it need not wait for the device.

        It asks the device how many pages a chunk takes. Said before the layer's projections, the answer is there by
        the time that pages are needed, and the device has work meanwhile. Optional; another `keep` tensor than that
        of `attend` makes it wait as ever.
        """
        if keep.shape[2] > 1 and keep.shape[0] == self.sequences and keep.device == self.table.device:
            self._reservation.expect(layer, range(self.sequences), keep, valid)

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
                past = dataclasses.replace(packed, empty=self._reservation.empty[layer])
                out = pruned_prefill(query, key, value, keep, window=self.window, past=past, valid=valid, **options)
            packed = self._write(packed, layer, rows, key, value, keep, valid)
            return packed_decode(query, packed, **options) if out is None else out
        except (PoolFullError, torch.OutOfMemoryError):
            self._incomplete.update(rows)
            raise

    def append(
        self, layer: int, key: Tensor, value: Tensor, keep: Tensor, valid: Tensor | None = None, *, group: int
    ) -> None:
        """Write pairs that were made elsewhere: `attend` without queries, for all sequences.

        Args:
            layer, key, value, keep, valid: as in `attend`.
            group: the number of queries of a KV head that will attend.

        Raises:
            PoolFullError, ValueError, TypeError: as in `attend`.
        """
        if not self.sequences:
            self.allocate(key, group)
        rows = self._rows(None)
        self._check_batch(key, rows)
        try:
            self._write(self.layer(layer, rows), layer, rows, key, value, keep, valid)
        except (PoolFullError, torch.OutOfMemoryError):
            self._incomplete.update(rows)
            raise

    def _write(
        self,
        packed: PackedLayer,
        layer: int,
        rows: range,
        key: Tensor,
        value: Tensor,
        keep: Tensor,
        valid: Tensor | None,
    ) -> PackedLayer:
        """Set pages aside and write; returns the layer's storage, which may have moved."""
        moves = self.moves
        self._reservation.for_write(layer, rows, keep, valid)
        if self.moves != moves:
            packed = self.layer(layer, rows)
        write(packed, key.detach(), value.detach(), keep, valid)
        return packed

    def layer(self, layer: int, rows: range | None = None) -> PackedLayer:
        """The storage of one layer, as the operators take it, of all sequences or of a range.

        Valid until `moves` changes.
        """
        rows = range(self.sequences) if rows is None else rows
        chains = slice(rows.start * self.kv_heads, rows.stop * self.kv_heads)
        coded, page_dtype = None, self.page_dtypes[layer]
        if page_dtype is not None:
            kept = self.pools[page_dtype]
            coded = CodedPages(self._codecs[page_dtype], kept.pages, kept.free, kept.taken)
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
            coded=coded,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds, tables and free pages included."""
        if not self.sequences:
            return 0
        tensors = (self.table, self.seen, self.kept, self.ring_keep)
        pools = sum(pool.nbytes for pool in self.pools.values())
        return pools + sum(t.numel() * t.element_size() for t in tensors)

    @property
    def pair_bytes(self) -> int:
        """Bytes of a key and its value, not coded."""
        return self.pool.page_bytes // self.page_size

    def pages_in_use(self) -> int:
        """Pages that are not free."""
        return sum(pool.in_use() for pool in self.pools.values())

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
        return self._reservation.for_steps(tokens)

    def spend(self, tokens: int) -> None:
        """Every sequence has taken at most `tokens` single tokens in every layer, without `attend` (a CUDA graph)."""
        self._reservation.spend(tokens)

    def make_columns(self, tokens: int) -> None:
        """Widen the table for so many tokens more, which saves a graph from being captured anew for each widening."""
        self.widen(self._reservation.columns_for(tokens))

    def widen(self, columns: int) -> None:
        """Give the table at least so many columns."""
        missing = columns - self.table.shape[2]
        if missing > 0:
            spare = int(self.table.shape[2] * _WIDENING)
            self.table = torch.nn.functional.pad(self.table, (0, max(missing, spare)))
            self._moves += 1

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Passes inside change nothing that the host knows: they run on the device only, when a graph is replayed."""
        with self._reservation.suspended():
            yield

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
        self._reservation.dropped()
        self._incomplete.difference_update(sequences)

    def select(self, indices: Tensor) -> None:
        """Make sequence i what sequence indices[i] was; sequences not named are dropped (beam search).

        Raises:
            PoolFullError: if the copies would exceed `max_memory`. The sequences not named are dropped all the same.
        """
        if not self.sequences:
            return
        wanted: list[int] = indices.tolist()
        self._check_sequences(wanted)
        self.drop([i for i in range(self.sequences) if i not in wanted])
        self._reservation.cancel()
        self._hold_rings_back(self.pools, len(wanted))
        # A sequence's first use keeps its pages, every further use copies them.
        repeated = [n for n, i in enumerate(wanted) if i in wanted[:n]]
        used = {i: self._split(self._columns_in_use([i])) for i in {wanted[n] for n in repeated}}
        self._reservation.ask()
        copies = [sum(int(used[wanted[n]][index][1].sum()) for n in repeated) for index in range(len(self.pools))]
        set_aside(list(zip(self.pools.values(), copies, strict=True)))
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
        for name, (pool, mine) in zip(self.pools, self._split(used), strict=True):
            ids = self.table[mine]
            table[mine] = torch.arange(ids.numel(), dtype=table.dtype, device=table.device)
            state[_state_name(name)] = pool.gather(ids)
        state["page_dtypes"] = torch.tensor([_PAGE_DTYPES.index(name) for name in self.page_dtypes])
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
        coded = tuple(_PAGE_DTYPES[index] for index in state["page_dtypes"].tolist())
        if coded != self.page_dtypes:
            raise ValueError(f"the state's layers have page_dtypes {coded}, and those of this cache {self.page_dtypes}")
        self.reset()
        pages = state["pool"]
        with torch.no_grad():
            self.allocate(pages.new_empty(state["seen"].shape[1], self.kv_heads, 0, pages.shape[-1]))
        for name in ("table", "seen", "kept", "ring_keep"):
            setattr(self, name, state[name].clone())
        used = self._columns_in_use(list(range(self.sequences)))
        try:
            held = [state[_state_name(name)] for name in self.pools]
            set_aside([(pool, pages.shape[0]) for pool, pages in zip(self.pools.values(), held, strict=True)])
            for pages, (pool, mine) in zip(held, self._split(used), strict=True):
                ids = pool.take(pages.shape[0])
                pool.scatter(ids, pages)
                self.table[mine] = ids[self.table[mine].long()]
        except BaseException:
            self.reset()  # a part of a state would look like a whole one
            raise
        self._reservation.ask()
        self._reservation.empty = [False] * self.layers

    def allocate(self, key: Tensor, group: int = 1) -> None:
        """Make the tensors, without pages, for sequences and pairs like those of key [B, Hkv, T, D].

        `group` is the number of queries of a KV head.
        """
        B, Hkv, _, D = key.shape
        slabs = self.slabs
        if slabs is None:
            reasons = [limits.model(D, group, key.dtype, key.device)]
            reasons += [limits.codec(name, D, key.device) for name in self._codecs]
            # Gradients want implementations that find pages by index.
            slabs = key.is_cuda and not any(reasons) and not torch.is_grad_enabled()
        bound = MemoryBound(self.max_memory)
        pools: dict[str | None, PagePool] = {
            None: PagePool((2, self.page_size, D), key.dtype, key.device, slabs, bound)
        }
        for name, coded in self._codecs.items():
            if reason := coded.obstacle(D):
                raise ValueError(f"page_dtype={name!r}: {reason}")
            pools[name] = PagePool((coded.page_bytes(self.page_size, D),), torch.uint8, key.device, slabs, bound)
        rings = self._hold_rings_back(pools, B)
        largest = max(pool.page_bytes for name, pool in pools.items() if name is not None or not rings)
        if self.max_memory is not None and self.max_memory < rings + largest:
            beside = f" beside the windows' {rings} bytes" if rings else ""
            raise ValueError(f"max_memory is {self.max_memory} bytes, and a page takes {largest}{beside}")
        self.pools = pools
        self.table = torch.zeros(self.layers, B * Hkv, self.ring_pages, dtype=torch.int32, device=key.device)
        self.seen = torch.zeros(self.layers, B, dtype=torch.int32, device=key.device)
        self.kept = torch.zeros(self.layers, B * Hkv, dtype=torch.int32, device=key.device)
        self.ring_keep = torch.zeros(self.layers, B * Hkv, self.window, dtype=torch.bool, device=key.device)
        self.sequences = B
        self._moves += 1

    def _hold_rings_back(self, pools: dict[str | None, PagePool], sequences: int) -> int:
        """Let no pool of coded pairs grow into the room of the rings, whose size is known; returns their bytes.

        Memory does not go back from one pool to another, and a sequence could never begin otherwise.
        """
        if len(pools) == 1:
            return 0
        rings = pools[None].budget
        rings.held_back = self.layers * sequences * self.kv_heads * self.ring_pages
        return rings.held_back * rings.page_bytes

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

    def _split(self, used: Tensor) -> list[tuple[PagePool, Tensor]]:
        """Entries of the table [layers, chains, columns] bool, by the pool that their pages are of."""
        in_ring = torch.arange(used.shape[-1], device=used.device) < self.ring_pages
        parts = []
        for name, pool in self.pools.items():
            own = torch.tensor([kind == name for kind in self.page_dtypes], device=used.device)[:, None, None]
            parts.append((pool, used & (own | in_ring if name is None else own & ~in_ring)))
        return parts

    def _chains(self, sequences: list[int]) -> list[int]:
        return [b * self.kv_heads + h for b in sequences for h in range(self.kv_heads)]

    def _columns_in_use(self, sequences: list[int]) -> Tensor:
        """[layers, their chains, columns] bool: the entries of the table that are pages of these sequences."""
        column = torch.arange(self.table.shape[2], device=self.table.device)
        ring = -(-self.seen[:, sequences].clamp_max(self.window) // self.page_size)
        kept = -(-self.kept[:, self._chains(sequences)] // self.page_size)
        in_ring = column < ring.repeat_interleave(self.kv_heads, 1)[..., None]
        return in_ring | ((column >= self.ring_pages) & (column < self.ring_pages + kept[..., None]))


def _state_name(page_dtype: str | None) -> str:
    return "pool" if page_dtype is None else f"pool_{page_dtype}"
