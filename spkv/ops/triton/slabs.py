"""Handing pages of a request's slabs to its chains, in one launch: see `spkv.serving.slabs`.

Legend: N requests, T new tokens of each, Hkv KV heads, C = N * Hkv chains, P pairs in a page, w window.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from spkv.ops.packed import PackedLayer
from spkv.ops.triton.launch import on_device_of

_COUNTED, _FILLED = 256, 64  # tokens and columns of the table that a program takes at a time, of each head


def take_pages(
    packed: PackedLayer, keep: Tensor, slabs: Tensor, taken: Tensor, per_slab: int, lengths: Tensor | None = None
) -> None:
    """Enter the pages that writing these tokens takes into `packed.table`, and count them. In place.

    Page n of a request is page n % per_slab of its slab n // per_slab. Never waits for the device.

    Args:
        packed: the layer's rings and chains, as they are before the tokens are written.
        keep: [N, Hkv, T] bool, which of the new pairs stay once they leave the window.
        slabs: [N, slabs of a request at most] int32.
        taken: [N] int32, pages of each request that are in use, by all layers.
        per_slab: pages of a slab.
        lengths: [N] int32, how many tokens of each request are not padding, the first of its T; None: all.
    """
    N, Hkv, T = keep.shape
    single = T == 1  # then the new token pushes one pair out, and a chain takes one page at most
    with on_device_of(taken):
        _take[(N,)](
            keep, packed.table, packed.rows, packed.seen, packed.kept, packed.ring_keep, slabs, taken, lengths,
            T, packed.window, packed.ring_pages, per_slab, slabs.shape[1],
            *keep.stride(), packed.table.stride(0), packed.ring_keep.stride(0), slabs.stride(0),
            Hkv=Hkv, HKV_PAD=triton.next_power_of_2(Hkv), P=packed.page_size,
            COUNTED=1 if single else _COUNTED, FILLED=1 if single else _FILLED, num_warps=1 if single else 4,
        )  # fmt: skip


# Neither lengths nor the alignment of one layer's rows of a table may ask for a compilation of their own.
_VARYING = (
    "T", "window", "ring_pages", "per_slab", "columns", "keep_stride_n", "keep_stride_h", "keep_stride_t",
    "table_stride", "ring_keep_stride", "slabs_stride",
)  # fmt: skip
_ANY_ALIGNMENT = ("keep", "table", "rows", "seen", "kept", "ring_keep", "slabs", "taken", "lengths")


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _take(
    keep, table, rows, seen, kept, ring_keep, slabs, taken, lengths, T, window, ring_pages, per_slab, columns,
    keep_stride_n, keep_stride_h, keep_stride_t, table_stride, ring_keep_stride, slabs_stride,
    Hkv: tl.constexpr, HKV_PAD: tl.constexpr, P: tl.constexpr, COUNTED: tl.constexpr, FILLED: tl.constexpr,
):  # fmt: skip
    """One request, all its heads."""
    n = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HKV_PAD)
    chain, exists = n * Hkv + head, head < Hkv
    position, used = tl.load(seen + n), tl.load(taken + n)
    if lengths is not None:
        T = tl.load(lengths + n)

    # New token j claims the ring's slot of position + j - window, and its pair leaves, if there ever was one.
    leaving = tl.zeros([HKV_PAD, COUNTED], tl.int32)
    old = ring_keep + chain[:, None] * ring_keep_stride
    for start in range(0, tl.minimum(T, window), COUNTED):
        j = start + tl.arange(0, COUNTED)[None, :]
        claims = exists[:, None] & (j < T) & (j < window) & (position + j >= window)
        leaving += (tl.load(old + (position + j) % window, mask=claims, other=0) != 0).to(tl.int32)
    # All but the last `window` of the new tokens pass through.
    new = keep + n * keep_stride_n + head[:, None] * keep_stride_h
    for start in range(0, T - window, COUNTED):
        t = start + tl.arange(0, COUNTED)[None, :]
        passes = exists[:, None] & (t < T - window)
        leaving += (tl.load(new + t.to(tl.int64) * keep_stride_t, mask=passes, other=0) != 0).to(tl.int32)

    end = tl.load(kept + chain, mask=exists, other=0)
    ring_held, kept_held = tl.cdiv(tl.minimum(position, window), P), tl.cdiv(end, P)
    ring_new = tl.cdiv(tl.minimum(position + T, window), P) - ring_held
    wanted = ring_new + tl.cdiv(end + tl.sum(leaving, 1), P) - kept_held
    wanted = tl.where(exists, wanted, 0)
    first = used + tl.cumsum(wanted, 0) - wanted
    row = chain
    if rows is not None:
        row = tl.load(rows + n).to(tl.int64) * Hkv + head
    for start in range(0, tl.max(wanted, 0), FILLED):
        nth = start + tl.arange(0, FILLED)[None, :]
        takes = nth < wanted[:, None]
        number = first[:, None] + nth
        slab = tl.load(slabs + n * slabs_stride + tl.minimum(number // per_slab, columns - 1), mask=takes, other=0)
        column = tl.where(nth < ring_new, ring_held + nth, ring_pages + kept_held[:, None] + nth - ring_new)
        tl.store(table + row[:, None] * table_stride + column, slab * per_slab + number % per_slab, mask=takes)
    # Every thread has read it.
    tl.debug_barrier()
    tl.store(taken + n, used + tl.sum(wanted, 0))
