"""Handing pages of a request's slabs to its chains, for a step of one token, in one launch: see `spkv.serving.slabs`.

Legend: N requests, Hkv KV heads, C = N * Hkv chains, P pairs in a page, w window.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from spkv.ops.packed import PackedLayer
from spkv.ops.triton.launch import on_device_of


def take_pages(packed: PackedLayer, slabs: Tensor, taken: Tensor, per_slab: int) -> None:
    """Enter the pages that writing one token a request takes into `packed.table`, and count them. In place.

    Page n of a request is page n % per_slab of its slab n // per_slab.

    Args:
        packed: the layer's rings and chains.
        slabs: [N, slabs of a request at most] int32.
        taken: [N] int32, pages of each request that are in use, by all layers.
        per_slab: pages of a slab.
    """
    N, Hkv = taken.shape[0], packed.kv_heads
    with on_device_of(taken):
        _take[(N,)](
            packed.table, packed.rows, packed.seen, packed.kept, packed.ring_keep, slabs, taken,
            packed.window, packed.ring_pages, per_slab, slabs.shape[1],
            packed.table.stride(0), packed.ring_keep.stride(0), slabs.stride(0),
            Hkv=Hkv, HKV_PAD=triton.next_power_of_2(Hkv), P=packed.page_size, num_warps=1,
        )  # fmt: skip


# Neither lengths nor the alignment of one layer's rows of a table may ask for a compilation of their own.
_VARYING = ("window", "ring_pages", "per_slab", "columns", "table_stride", "ring_keep_stride", "slabs_stride")
_ANY_ALIGNMENT = ("table", "rows", "seen", "kept", "ring_keep", "slabs", "taken")


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _take(
    table, rows, seen, kept, ring_keep, slabs, taken, window, ring_pages, per_slab, columns,
    table_stride, ring_keep_stride, slabs_stride, Hkv: tl.constexpr, HKV_PAD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One request, all its heads."""
    n = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HKV_PAD)
    chain = n * Hkv + head
    position, used = tl.load(seen + n), tl.load(taken + n)
    filling = position < window  # nothing leaves the window yet
    leaves = (head < Hkv) & (position >= window)
    leaves = leaves & (tl.load(ring_keep + chain * ring_keep_stride + position % window, mask=leaves, other=0) != 0)
    end = tl.load(kept + chain, mask=leaves, other=0)
    begins = ((head < Hkv) & filling & (position % P == 0)) | (leaves & (end % P == 0))
    number = used + tl.cumsum(begins.to(tl.int32), 0) - 1
    slab = tl.load(slabs + n * slabs_stride + tl.minimum(number // per_slab, columns - 1), mask=begins, other=0)
    column = tl.where(filling, position // P, ring_pages + end // P)
    row = chain
    if rows is not None:
        row = tl.load(rows + n).to(tl.int64) * Hkv + head
    tl.store(table + row * table_stride + column, slab * per_slab + number % per_slab, mask=begins)
    # Every thread has read it.
    tl.debug_barrier()
    tl.store(taken + n, used + tl.sum(begins.to(tl.int32), 0))
