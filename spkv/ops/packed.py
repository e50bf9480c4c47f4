"""The packed layout of one layer's pairs, as the operators see it.

Legend: B sequences, Hkv KV heads, C = B * Hkv chains (chain = sequence * Hkv + head), P pairs in a page,
D head size, w window. A chain is [ring pages | kept pages]: the ring holds the pairs in the window, position p in
slot p % w; the kept pages hold, in order, the kept pairs that have left the window.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
    """

    pool: Tensor
    table: Tensor
    seen: Tensor
    kept: Tensor
    ring_keep: Tensor
    window: int

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
