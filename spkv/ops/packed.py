"""The packed layout of one layer's pairs, as the operators see it.

Legend: B sequences, Hkv KV heads, C = B * Hkv chains (chain = sequence * Hkv + head), P pairs in a page,
D head size, w window. A chain is [ring pages | kept pages]: the ring holds the pairs in the window, position p in
slot p % w; the kept pages hold, in order, the kept pairs that have left the window.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from spkv.ops.codec import Codec


@dataclass(frozen=True)
class CodedPages:
    """The kept pages of chains whose pairs are coded, which then do not lie in `PackedLayer.pool`.

    Attributes:
        codec: how.
        pool: [pages, codec.page_bytes(P, D)] uint8, shared by the layers of this codec.
        free, taken: a stack of page ids as `PackedLayer`'s own, for the kept pages; given where that has one.
    """

    codec: Codec
    pool: Tensor
    free: Tensor | None = None
    taken: Tensor | None = None

    def rows(self, page_size: int, head_size: int) -> tuple[Tensor, Tensor]:
        """Views of the pool: codes [pages, 2, P, code_bytes] uint8 and scales [pages, 2, P, scales] float16."""
        width, numbers = self.codec.code_bytes(head_size), self.codec.scales(head_size)
        split = 2 * page_size * width
        codes = self.pool[:, :split].unflatten(1, (2, page_size, width))
        return codes, self.pool[:, split:].view(torch.float16).unflatten(1, (2, page_size, numbers))


@dataclass(frozen=True)
class PackedLayer:
    """Views of one layer's storage. Operators read it; `write` updates the tensors in place.

    Attributes:
        pool: [pages, 2, P, D], keys at index 0 and values at 1; shared by all layers.
        table: [C, max_pages] int32, the page ids of each chain.
        seen: [B] int32, tokens each sequence has passed through this layer.
        kept: [C] int32, pairs in each chain's kept pages.
        ring_keep: [C, w] bool, the keep bit of the pair in each ring slot.
        window: w.
        free: [pages] int32, a stack of page ids that belong to no chain, or None; shared by all layers.
        taken: [1] int32, given with `free`: how many of its pages, from the start, were handed out so far.
        scattered: page ids say how many pages' bytes a page lies from the start of `pool`, and may lead out of it, to
            another allocation. Only implementations that compute addresses themselves can read such pages.
        empty: a promise that no sequence has seen a token, which saves `pruned_prefill` looking.
        coded: where the kept pages are, if pairs are coded when they leave the window; None: in `pool`, as they are.
        rows: [B] int32, for a `table` of more sequences, in any order: where the chains of each sequence stand in it,
            chain h of sequence b in row rows[b] * Hkv + h. None: they are its rows. Not with `free`.

    With `free`, `write` hands pages out: a ring gets one when the first token enters it, a chain's end when an append
    begins it. Without, the table must hold the pages before `write` is called. Either way the table needs the columns
    for them: ring_pages and a column for every P kept pairs, which nothing checks; with max_tokens as the bound of a
    sequence's length, ring_pages + ceil(max_tokens / P) always suffice.

    If the stack does not go round, `taken` ends above `free.numel()`: it counts the pages asked for, and that is how
    the host can tell. Nobody's pages are touched then. A kept pair without a page is dropped as if its gate had been
    closed, and `kept` does not count it; a sequence with a ring without its page drops the tokens of this call, and
    `seen` does not count them. Of the stack's last pages some may be in the table of no chain then, so that what is
    in use must be read from the tables and lengths.
    """

    pool: Tensor
    table: Tensor
    seen: Tensor
    kept: Tensor
    ring_keep: Tensor
    window: int
    free: Tensor | None = None
    taken: Tensor | None = None
    scattered: bool = False
    empty: bool = False
    coded: CodedPages | None = None
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and self.free is not None:
            raise ValueError("pages are handed out to chains that are the rows of their table: not with rows")
        if (self.free is None) != (self.taken is None):
            raise ValueError("free and taken must be given together")
        if self.coded is not None and (self.coded.free is None) != (self.free is None):
            raise ValueError("ring pages and coded pages must both come from stacks, or neither")

    def in_order(self) -> PackedLayer:
        """The same with a table of these chains alone, a copy if there are `rows`."""
        if self.rows is None:
            return self
        heads = torch.arange(self.kv_heads, device=self.table.device)
        chains = (self.rows.long()[:, None] * self.kv_heads + heads).flatten()
        return dataclasses.replace(self, table=self.table[chains], rows=None)

    @property
    def page_size(self) -> int:
        return self.pool.shape[2]

    @property
    def ring_pages(self) -> int:
        """Pages of a ring: the window in whole pages."""
        return -(-self.window // self.page_size)

    @property
    def kv_heads(self) -> int:
        return self.kept.shape[0] // self.seen.shape[0]
