"""Writing one token a sequence in Triton: ring insert, eviction and gated append of a layer in one launch.

Legend: B sequences, Hkv KV heads, C = B * Hkv chains, P pairs in a page, D head size, w window.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from spkv.ops.packed import PackedLayer


def write(packed: PackedLayer, key: Tensor, value: Tensor, keep: Tensor, valid: Tensor | None = None) -> None:
    """See `spkv.ops.attention.write`. Takes one token: key, value [B, Hkv, 1, D], keep [B, Hkv, 1], valid [B, 1]."""
    B, Hkv, T, D = key.shape
    assert T == 1
    pool, table, ring_keep = packed.pool, packed.table, packed.ring_keep
    assert packed.seen.is_contiguous()
    assert packed.kept.is_contiguous()
    if key.stride(3) != 1 or value.stride() != key.stride():
        key, value = key.contiguous(), value.contiguous()
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(key.device) if key.is_cuda else contextlib.nullcontext():
        _write[(B,)](
            key, value, keep, valid, pool, table, packed.seen, packed.kept, ring_keep,
            packed.window, packed.ring_pages,
            key.stride(0), key.stride(1), keep.stride(0), keep.stride(1), 0 if valid is None else valid.stride(0),
            pool.stride(0), pool.stride(1), pool.stride(2), table.stride(0), ring_keep.stride(0),
            Hkv=Hkv, D=D, P=packed.page_size, HKV_PAD=triton.next_power_of_2(Hkv), D_PAD=triton.next_power_of_2(D),
            num_warps=4,
        )  # fmt: skip


_VARYING = (
    "window", "ring_pages", "key_stride_b", "keep_stride_b", "keep_stride_h", "valid_stride_b", "table_stride",
    "ring_keep_stride",
)  # fmt: skip
_ANY_ALIGNMENT = ("keep", "valid", "table", "seen", "kept", "ring_keep")


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _write(
    key, value, keep, valid, pool, table, seen, kept, ring_keep,
    window, ring_pages,
    key_stride_b, key_stride_h, keep_stride_b, keep_stride_h, valid_stride_b,
    pool_stride_page, pool_stride_half, pool_stride_slot, table_stride, ring_keep_stride,
    Hkv: tl.constexpr, D: tl.constexpr, P: tl.constexpr, HKV_PAD: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """One sequence, all its heads: they share `seen`, which must not move before the last of them has read it."""
    b = tl.program_id(0)
    here = True
    if valid is not None:
        here = tl.load(valid + b.to(tl.int64) * valid_stride_b)
    h, d = tl.arange(0, HKV_PAD), tl.arange(0, D_PAD)
    heads = (h < Hkv) & here
    entries = heads[:, None] & (d[None, :] < D)
    chain = (b * Hkv + h).to(tl.int64)

    position = tl.load(seen + b)
    slot = position % window
    page = tl.load(table + chain * table_stride + slot // P, mask=heads, other=0).to(tl.int64)
    pair = pool + (page * pool_stride_page + (slot % P) * pool_stride_slot)[:, None] + d[None, :]

    # The slot's pair leaves the window: if kept, it moves to the end of the chain.
    keep_bit = ring_keep + chain * ring_keep_stride + slot
    leaves = tl.load(keep_bit, mask=heads & (position >= window), other=0) != 0
    end = tl.load(kept + chain, mask=heads, other=0)
    end_page = tl.load(table + chain * table_stride + ring_pages + end // P, mask=leaves, other=0).to(tl.int64)
    target = pool + (end_page * pool_stride_page + (end % P) * pool_stride_slot)[:, None] + d[None, :]
    moves = leaves[:, None] & (d[None, :] < D)
    old_key = tl.load(pair, mask=moves)
    old_value = tl.load(pair + pool_stride_half, mask=moves)
    tl.store(target, old_key, mask=moves)
    tl.store(target + pool_stride_half, old_value, mask=moves)
    # Every thread has read `seen`, `kept` and the old pair before any overwrites them.
    tl.debug_barrier()

    new = b.to(tl.int64) * key_stride_b + h[:, None] * key_stride_h + d[None, :]
    tl.store(pair, tl.load(key + new, mask=entries), mask=entries)
    tl.store(pair + pool_stride_half, tl.load(value + new, mask=entries), mask=entries)
    new_bit = tl.load(keep + b.to(tl.int64) * keep_stride_b + h * keep_stride_h, mask=heads, other=0)
    tl.store(keep_bit, new_bit, mask=heads)
    tl.store(kept + chain, end + 1, mask=leaves)
    tl.store(seen + b, position + 1, mask=here)
