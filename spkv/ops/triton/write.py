"""Writing in Triton: ring insert, eviction, gated append and page hand-out of a layer, with no word from the host.

One token a sequence takes one launch, a program a sequence. How many pages a chunk will take can be counted ahead, in
one launch. A chunk itself takes a few: mark which pairs leave the window
kept, count them along each chain (a prefix sum gives every pair its place at the chain's end), hand out pages, move
the pairs, advance the lengths. Lengths are read by every program of a launch, so each launch either reads or writes
them.

Legend: B sequences, Hkv KV heads, C = B * Hkv chains, T tokens of the chunk, P pairs in a page, D head size, w window,
N columns that a program handles. i: number of a token among the valid ones of its sequence's chunk; n: how many these
are. What may leave the window is one line of w + T columns a chain: column j < w is the pair whose ring slot new token
j claims first, column w + t is token t of the chunk. In this order pairs leave.

A slot of a chain is a ring slot below ring_slots = ring_pages * P, and ring_slots + m for its m-th kept pair: slot s
lies in the page at column s // P of the chain's row of the table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spkv.ops.packed import PackedLayer
from spkv.ops.triton import coded
from spkv.ops.triton.coded import store_coded
from spkv.ops.triton.launch import on_device_of

_TILE = 4096  # elements of keys that a program of the chunk's scatter moves
_MARKED = 1024  # columns that a program marks
_SCANNED = 1024  # chains whose needs a program adds up at a time
_FILLED = 128  # columns of the table filled at a time


def write(packed: PackedLayer, key: Tensor, value: Tensor, keep: Tensor, valid: Tensor | None = None) -> None:
    """See `spkv.ops.attention.write`. Never waits for the device, and so can be captured in a CUDA graph."""
    if key.numel() == 0:
        return
    for tensor in (packed.seen, packed.kept, packed.free):
        assert tensor is None or tensor.is_contiguous()
    assert packed.pool.stride(3) == packed.table.stride(1) == packed.ring_keep.stride(1) == 1
    if key.stride(3) != 1 or value.stride() != key.stride():
        key, value = key.contiguous(), value.contiguous()
    with on_device_of(key):
        (_write_token if key.shape[2] == 1 else _write_chunk)(packed, key, value, keep, valid)


def count_pages(packed: PackedLayer, keep: Tensor, valid: Tensor | None = None) -> Tensor:
    """See `spkv.ops.attention.count_pages`. Never waits for the device."""
    B, Hkv, T = keep.shape
    assert packed.ring_keep.stride(1) == 1
    order = None if valid is None else valid.cumsum(1, dtype=torch.int32)
    counts = torch.zeros(3, dtype=torch.int32, device=keep.device)
    with on_device_of(keep):
        _count[(B * Hkv,)](
            keep, valid, order, packed.seen, packed.kept, packed.ring_keep, counts, T, packed.window,
            keep.stride(0), keep.stride(1), keep.stride(2), *_strides(valid), packed.ring_keep.stride(0),
            Hkv=Hkv, P=packed.page_size, N=_MARKED, num_warps=4,
        )  # fmt: skip
    return counts


def _write_token(packed: PackedLayer, key: Tensor, value: Tensor, keep: Tensor, valid: Tensor | None) -> None:
    B, Hkv, _, D = key.shape
    pool, table, ring_keep, free = packed.pool, packed.table, packed.ring_keep, packed.free
    kept_free, kept_taken = _kept_stack(packed)
    _token[(B,)](
        key, value, keep, valid, pool, table, packed.rows, packed.seen, packed.kept, ring_keep, free, packed.taken,
        kept_free, kept_taken, *coded.operands(packed),
        packed.window, packed.ring_pages, _size(free), _size(kept_free),
        key.stride(0), key.stride(1), keep.stride(0), keep.stride(1), 0 if valid is None else valid.stride(0),
        pool.stride(0), pool.stride(1), pool.stride(2), table.stride(0), ring_keep.stride(0),
        Hkv=Hkv, D=D, P=packed.page_size, HKV_PAD=triton.next_power_of_2(Hkv), D_PAD=triton.next_power_of_2(D),
        CODEC=coded.name(packed), num_warps=4,
    )  # fmt: skip


def _write_chunk(packed: PackedLayer, key: Tensor, value: Tensor, keep: Tensor, valid: Tensor | None) -> None:
    packed = packed.in_order()
    B, Hkv, T, D = key.shape
    C, w, P, D_PAD = B * Hkv, packed.window, packed.page_size, triton.next_power_of_2(D)
    pool, table, seen, kept, ring_keep, free = (
        packed.pool, packed.table, packed.seen, packed.kept, packed.ring_keep, packed.free,
    )  # fmt: skip
    order = None if valid is None else valid.cumsum(1, dtype=torch.int32)  # [B, T], i + 1 at each valid token
    leaves = torch.empty(C, w + T, dtype=torch.int8, device=key.device)
    _mark[(C, triton.cdiv(w + T, _MARKED))](
        keep, valid, order, seen, ring_keep, leaves, T, w,
        keep.stride(0), keep.stride(1), keep.stride(2), *_strides(valid), ring_keep.stride(0),
        Hkv=Hkv, N=_MARKED, num_warps=4,
    )  # fmt: skip
    ends = leaves.cumsum(1, dtype=torch.int32)  # [C, w + T], of a pair that leaves kept: its place at the end, plus 1
    enters = room = wanted = None
    kept_free, kept_taken = _kept_stack(packed)
    if free is not None:
        enters = torch.empty(B, dtype=torch.int32, device=key.device)  # 1: the rings have their pages
        room = torch.empty(C, dtype=torch.int32, device=key.device)  # kept pairs that the chain has pages for
        wanted = torch.empty(2, dtype=torch.int32, device=key.device)  # from the ring's stack, from the kept pages'
        _hand_out[(C,)](
            order, ends, seen, kept, table, free, packed.taken, kept_free, kept_taken, enters, room, wanted,
            C, T, w, packed.ring_pages, free.numel(), _size(kept_free), table.stride(0),
            Hkv=Hkv, P=P, SCANNED=min(_SCANNED, triton.next_power_of_2(C)), FILLED=_FILLED, num_warps=4,
        )  # fmt: skip
    N = max(16, _TILE // D_PAD)
    _scatter[(C, triton.cdiv(T, N))](
        key, value, keep, valid, order, leaves, ends, pool, table, seen, kept, ring_keep, enters, room,
        *coded.operands(packed), T, w, packed.ring_pages * P,
        key.stride(0), key.stride(1), key.stride(2), keep.stride(0), keep.stride(1), keep.stride(2), *_strides(valid),
        pool.stride(0), pool.stride(1), pool.stride(2), table.stride(0), ring_keep.stride(0),
        Hkv=Hkv, D=D, P=P, N=N, D_PAD=D_PAD, CODEC=coded.name(packed), num_warps=4,
    )  # fmt: skip
    _advance[(C,)](order, ends, seen, kept, packed.taken, kept_taken, enters, room, wanted, T, w, Hkv=Hkv, num_warps=1)


def _kept_stack(packed: PackedLayer) -> tuple[Tensor | None, Tensor | None]:
    """The stack of pages for coded pairs and its count; None where kept pages come from the ring's stack."""
    return (None, None) if packed.coded is None else (packed.coded.free, packed.coded.taken)


def _size(free: Tensor | None) -> int:
    return 0 if free is None else free.numel()


def _strides(valid: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if valid is None else valid.stride()


# Neither lengths nor the alignment of one layer's rows of a table may ask for a compilation of their own.
_VARYING = (
    "C", "T", "window", "ring_pages", "ring_slots", "free_pages", "kept_free_pages", "key_stride_b", "key_stride_t",
    "keep_stride_b", "keep_stride_h", "keep_stride_t", "valid_stride_b", "valid_stride_t", "table_stride",
    "ring_keep_stride",
)  # fmt: skip
_ANY_ALIGNMENT = (
    "keep", "valid", "table", "rows", "seen", "kept", "ring_keep", "free", "taken", "kept_free", "kept_taken",
)  # fmt: skip
_kernel = triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_ANY_ALIGNMENT)


@_kernel
def _token(
    key, value, keep, valid, pool, table, rows, seen, kept, ring_keep, free, taken,
    kept_free, kept_taken, codes, numbers, page_bytes,
    window, ring_pages, free_pages, kept_free_pages,
    key_stride_b, key_stride_h, keep_stride_b, keep_stride_h, valid_stride_b,
    pool_stride_page, pool_stride_half, pool_stride_slot, table_stride, ring_keep_stride,
    Hkv: tl.constexpr, D: tl.constexpr, P: tl.constexpr, HKV_PAD: tl.constexpr, D_PAD: tl.constexpr,
    CODEC: tl.constexpr,
):  # fmt: skip
    """One sequence, all its heads: they share `seen`, which must not move before the last of them has read it."""
    b = tl.program_id(0)
    h, d = tl.arange(0, HKV_PAD), tl.arange(0, D_PAD)
    heads = h < Hkv
    # Read early: these do not depend on the reads below, of which each waits for the one before.
    new = b.to(tl.int64) * key_stride_b + h[:, None] * key_stride_h + d[None, :]
    exists = heads[:, None] & (d[None, :] < D)
    new_key, new_value = tl.load(key + new, mask=exists), tl.load(value + new, mask=exists)
    new_bit = tl.load(keep + b.to(tl.int64) * keep_stride_b + h * keep_stride_h, mask=heads, other=0)
    if valid is not None:
        heads = heads & (tl.load(valid + b.to(tl.int64) * valid_stride_b) != 0)
    chain = (b * Hkv + h).to(tl.int64)
    row = table + chain * table_stride
    if rows is not None:
        row = table + (tl.load(rows + b).to(tl.int64) * Hkv + h) * table_stride

    position = tl.load(seen + b)
    slot = position % window
    filling = position < window  # nothing leaves the window yet
    keep_bit = ring_keep + chain * ring_keep_stride + slot
    leaves = tl.load(keep_bit, mask=heads & (position >= window), other=0) != 0
    end = tl.load(kept + chain, mask=heads, other=0)

    begins = heads & False  # needs a page from the stack
    new_page = tl.zeros([HKV_PAD], tl.int32)
    if free is not None:
        begins = heads & tl.where(filling, slot % P == 0, leaves & (end % P == 0))
        wanted = begins.to(tl.int32)
        total = tl.sum(wanted, 0)
        nth = tl.cumsum(wanted, 0) - 1
        if kept_free is None:
            place = tl.atomic_add(taken, total, mask=total > 0, sem="relaxed") + nth
            gets = begins & (place < free_pages)
            new_page = tl.load(free + place, mask=gets, other=0)
        else:  # all heads fill their rings, or none does
            ring_place = tl.atomic_add(taken, total, mask=(total > 0) & filling, sem="relaxed") + nth
            kept_place = tl.atomic_add(kept_taken, total, mask=(total > 0) & (filling == 0), sem="relaxed") + nth
            gets = begins & tl.where(filling, ring_place < free_pages, kept_place < kept_free_pages)
            new_page = tl.load(free + ring_place, mask=gets & filling, other=0)
            new_page += tl.load(kept_free + kept_place, mask=gets & (filling == 0), other=0)
        # Heads share `seen`: a token enters all rings, or none. A kept pair goes or stays for itself.
        refused = tl.sum((begins & (gets == 0)).to(tl.int32), 0) > 0
        heads = heads & ((position >= window) | (refused == 0))
        leaves = leaves & ((end % P != 0) | gets)
        begins = gets & heads
        tl.store(row + tl.where(filling, slot // P, ring_pages + end // P), new_page, mask=begins)

    page = tl.load(row + slot // P, mask=heads & ((position >= window) | (begins == 0)), other=0)
    page = tl.where(filling & begins, new_page, page).to(tl.int64)
    pair = pool + (page * pool_stride_page + (slot % P) * pool_stride_slot)[:, None] + d[None, :]

    # The slot's pair leaves the window: if kept, it moves to the end of the chain.
    end_page = tl.load(row + ring_pages + end // P, mask=leaves & (begins == 0), other=0)
    end_page = tl.where(begins, new_page, end_page).to(tl.int64)
    moves = leaves[:, None] & (d[None, :] < D)
    if CODEC == "":
        target = pool + (end_page * pool_stride_page + (end % P) * pool_stride_slot)[:, None] + d[None, :]
        old_key = tl.load(pair, mask=moves)
        old_value = tl.load(pair + pool_stride_half, mask=moves)
        tl.store(target, old_key, mask=moves)
        tl.store(target + pool_stride_half, old_value, mask=moves)
    else:
        old_key = tl.load(pair, mask=moves, other=0.0)
        old_value = tl.load(pair + pool_stride_half, mask=moves, other=0.0)
        store_coded(codes, numbers, end_page, end % P, leaves, old_key, page_bytes, HKV_PAD, D, D_PAD, P, CODEC)
        store_coded(codes, numbers, end_page, P + end % P, leaves, old_value, page_bytes, HKV_PAD, D, D_PAD, P, CODEC)
    # Every thread has read `seen`, `kept` and the old pair before any overwrites them.
    tl.debug_barrier()

    entries = heads[:, None] & (d[None, :] < D)
    tl.store(pair, new_key, mask=entries)
    tl.store(pair + pool_stride_half, new_value, mask=entries)
    tl.store(keep_bit, new_bit, mask=heads)
    tl.store(kept + chain, end + 1, mask=leaves)
    tl.store(seen + b, position + 1, mask=tl.sum(heads.to(tl.int32), 0) > 0)


@triton.jit
def _ring_pages(position, window, P: tl.constexpr):
    return tl.cdiv(tl.minimum(position, window), P)


@triton.jit
def _arriving(order, b, T, mask):
    """n of each sequence b; 0 where masked."""
    n = tl.where(mask, T, 0)
    if order is not None:
        n = tl.load(order + b.to(tl.int64) * T + T - 1, mask=mask, other=0)
    return n


@triton.jit
def _tokens(valid, order, b, t, mask, T, valid_stride_b, valid_stride_t):
    """The number i of each token t of sequence b, and whether it is one: within `mask`, and no padding."""
    i, real = t, mask
    if order is not None:
        real = tl.load(valid + b * valid_stride_b + t.to(tl.int64) * valid_stride_t, mask=mask, other=0) != 0
        i = tl.load(order + b * T + t, mask=real, other=0) - 1
    return i, real


@triton.jit
def _leaves(
    keep, valid, order, ring_keep, chain, column, position, n, T, window,
    keep_stride_b, keep_stride_h, keep_stride_t, valid_stride_b, valid_stride_t, ring_keep_stride,
    Hkv: tl.constexpr,
):  # fmt: skip
    """Whether the pairs in these columns of a chain's line leave the window and are kept."""
    b, h = chain // Hkv, chain % Hkv
    # Token j claims the slot of position seen + j - w, if there ever was one.
    old = (column < window) & (column < n) & (position + column >= window)
    old_bit = tl.load(ring_keep + chain * ring_keep_stride + (position + column) % window, mask=old, other=0)
    t = column - window
    i, real = _tokens(valid, order, b, t, (t >= 0) & (t < T), T, valid_stride_b, valid_stride_t)
    bits = keep + b * keep_stride_b + h * keep_stride_h + t.to(tl.int64) * keep_stride_t
    new_bit = tl.load(bits, mask=real & (i < n - window), other=0)
    return (old_bit != 0) | (new_bit != 0)


@_kernel
def _mark(
    keep, valid, order, seen, ring_keep, leaves, T, window,
    keep_stride_b, keep_stride_h, keep_stride_t, valid_stride_b, valid_stride_t, ring_keep_stride,
    Hkv: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """N columns of a chain's line: 1 where the pair leaves the window and is kept."""
    chain = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    b = chain // Hkv
    bit = _leaves(
        keep, valid, order, ring_keep, chain, column, tl.load(seen + b), _arriving(order, b, T, True), T, window,
        keep_stride_b, keep_stride_h, keep_stride_t, valid_stride_b, valid_stride_t, ring_keep_stride, Hkv,
    )  # fmt: skip
    tl.store(leaves + chain * (window + T) + column, bit.to(tl.int8), mask=column < window + T)


@_kernel
def _count(
    keep, valid, order, seen, kept, ring_keep, counts, T, window,
    keep_stride_b, keep_stride_h, keep_stride_t, valid_stride_b, valid_stride_t, ring_keep_stride,
    Hkv: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One chain: the pages that its ring and its kept pairs newly need, added to those of the others."""
    chain = tl.program_id(0).to(tl.int64)
    b = chain // Hkv
    position, n, end = tl.load(seen + b), _arriving(order, b, T, True), tl.load(kept + chain)
    leaving = tl.zeros([N], tl.int32)
    for start in range(0, window + T, N):
        leaving += _leaves(
            keep, valid, order, ring_keep, chain, start + tl.arange(0, N), position, n, T, window,
            keep_stride_b, keep_stride_h, keep_stride_t, valid_stride_b, valid_stride_t, ring_keep_stride, Hkv,
        ).to(tl.int32)  # fmt: skip
    ring_new = _ring_pages(position + n, window, P) - _ring_pages(position, window, P)
    kept_then = tl.cdiv(end + tl.sum(leaving, 0), P)
    # Sums and maxima of integers do not depend on their order.
    tl.atomic_add(counts, ring_new, sem="relaxed")
    tl.atomic_add(counts + 1, kept_then - tl.cdiv(end, P), sem="relaxed")
    tl.atomic_max(counts + 2, kept_then, sem="relaxed")


@triton.jit
def _needs(order, ends, seen, kept, chain, C, T, window, Hkv: tl.constexpr, P: tl.constexpr):
    """Pages of each chain's ring and of its kept pairs: held, and newly needed; nothing needed from chain C on."""
    exists = chain < C
    b = chain // Hkv
    position = tl.load(seen + b, mask=exists, other=0)
    end = tl.load(kept + chain, mask=exists, other=0)
    line = chain.to(tl.int64) * (window + T)
    leaving = tl.load(ends + line + window + T - 1, mask=exists, other=0)
    n = _arriving(order, b, T, exists)
    ring_held, kept_held = _ring_pages(position, window, P), tl.cdiv(end, P)
    ring_new = _ring_pages(position + n, window, P) - ring_held
    return ring_held, ring_new, kept_held, tl.cdiv(end + leaving, P) - kept_held


@triton.jit
def _fill(row, free, place, count, FILLED: tl.constexpr):
    """Enter pages place .. place + count of the stack into the table from `row` on."""
    for start in range(0, count, FILLED):
        column = start + tl.arange(0, FILLED)
        page = tl.load(free + place + column, mask=column < count, other=0)
        tl.store(row + column, page, mask=column < count)


@_kernel
def _hand_out(
    order, ends, seen, kept, table, free, taken, kept_free, kept_taken, enters, room, wanted,
    C, T, window, ring_pages, free_pages, kept_free_pages, table_stride,
    Hkv: tl.constexpr, P: tl.constexpr, SCANNED: tl.constexpr, FILLED: tl.constexpr,
):  # fmt: skip
    """One chain: its share of the stack, which goes first to all rings, then to the chains' ends, in order."""
    chain = tl.program_id(0)
    ring_before, kept_before, ring_until, ring_all, kept_all = 0, 0, 0, 0, 0
    for start in range(0, C, SCANNED):
        other = start + tl.arange(0, SCANNED)
        _, ring_new, _, kept_new = _needs(order, ends, seen, kept, other, C, T, window, Hkv, P)
        ring_before += tl.sum(tl.where(other < chain, ring_new, 0), 0)
        kept_before += tl.sum(tl.where(other < chain, kept_new, 0), 0)
        ring_until += tl.sum(tl.where(other // Hkv <= chain // Hkv, ring_new, 0), 0)
        ring_all += tl.sum(ring_new, 0)
        kept_all += tl.sum(kept_new, 0)
    first = tl.load(taken)
    row = table + chain.to(tl.int64) * table_stride
    ring_held, ring_new, kept_held, kept_new = _needs(order, ends, seen, kept, chain, C, T, window, Hkv, P)
    # Heads share `seen`: a sequence whose rings do not all get their pages takes nothing.
    enter = (ring_new == 0) | (first + ring_until <= free_pages)
    _fill(row + ring_held, free, first + ring_before, tl.where(enter, ring_new, 0), FILLED)
    if kept_free is None:
        place = first + ring_all + kept_before
        kept_new = tl.minimum(kept_new, tl.maximum(free_pages - place, 0))
        _fill(row + ring_pages + kept_held, free, place, kept_new, FILLED)
        ring_all += kept_all
    else:
        place = tl.load(kept_taken) + kept_before
        kept_new = tl.minimum(kept_new, tl.maximum(kept_free_pages - place, 0))
        _fill(row + ring_pages + kept_held, kept_free, place, kept_new, FILLED)
    tl.store(room + chain, (kept_held + kept_new) * P)
    tl.store(enters + chain // Hkv, enter.to(tl.int32), mask=chain % Hkv == 0)
    # Programs still read `taken`; it is advanced with the lengths.
    tl.store(wanted, ring_all, mask=chain == 0)
    tl.store(wanted + 1, kept_all, mask=chain == 0)


@triton.jit
def _pairs(pool, row, slot, mask, d, stride_page, stride_slot, P: tl.constexpr):
    """Pointers [N, D_PAD] to the keys in slots [N] of the chain that `row` of the table belongs to."""
    page = tl.load(row + slot // P, mask=mask, other=0).to(tl.int64)
    return pool + (page * stride_page + (slot % P) * stride_slot)[:, None] + d[None, :]


@_kernel
def _scatter(
    key, value, keep, valid, order, leaves, ends, pool, table, seen, kept, ring_keep, enters, room,
    codes, numbers, page_bytes, T, window, ring_slots,
    key_stride_b, key_stride_h, key_stride_t, keep_stride_b, keep_stride_h, keep_stride_t,
    valid_stride_b, valid_stride_t,
    pool_stride_page, pool_stride_half, pool_stride_slot, table_stride, ring_keep_stride,
    Hkv: tl.constexpr, D: tl.constexpr, P: tl.constexpr, N: tl.constexpr, D_PAD: tl.constexpr,
    CODEC: tl.constexpr,
):  # fmt: skip
    """N tokens of a chain: the last w enter the ring, and what they displace leaves; earlier ones leave at once.

    Several tokens of a chunk may claim one ring slot, and the last gets it: its program alone touches the slot, so it
    can move the old pair away before the new one comes.
    """
    chain = tl.program_id(0).to(tl.int64)
    b, h = chain // Hkv, chain % Hkv
    t, d = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, D_PAD)
    inside = t < T
    if enters is not None:
        inside = inside & (tl.load(enters + b) != 0)
    position, end, n = tl.load(seen + b), tl.load(kept + chain), _arriving(order, b, T, True)
    i, real = _tokens(valid, order, b, t, inside, T, valid_stride_b, valid_stride_t)
    row = table + chain * table_stride
    line = chain * (window + T)

    stays = real & (i >= n - window)
    ring_slot = (position + i) % window
    old_end = end + tl.load(ends + line + i % window, mask=stays, other=0) - 1
    moves = stays & (tl.load(leaves + line + i % window, mask=stays, other=0) != 0)
    goes = real & (tl.load(leaves + line + window + t, mask=real, other=0) != 0)
    new_end = end + tl.load(ends + line + window + t, mask=goes, other=0) - 1
    if room is not None:
        space = tl.load(room + chain)
        moves = moves & (old_end < space)
        goes = goes & (new_end < space)

    ring_pair = _pairs(pool, row, ring_slot, moves, d, pool_stride_page, pool_stride_slot, P)
    mask = moves[:, None] & (d[None, :] < D)
    new = b * key_stride_b + h * key_stride_h + (t.to(tl.int64) * key_stride_t)[:, None] + d[None, :]
    if CODEC == "":
        target = _pairs(pool, row, ring_slots + old_end, moves, d, pool_stride_page, pool_stride_slot, P)
        old_key = tl.load(ring_pair, mask=mask)
        old_value = tl.load(ring_pair + pool_stride_half, mask=mask)
        tl.store(target, old_key, mask=mask)
        tl.store(target + pool_stride_half, old_value, mask=mask)
    else:
        # The old pair of a token that stays, or the token itself if it goes at once.
        inside = goes[:, None] & (d[None, :] < D)
        old_key = tl.load(ring_pair, mask=mask, other=0.0)
        old_value = tl.load(ring_pair + pool_stride_half, mask=mask, other=0.0)
        old_key = tl.where(inside, tl.load(key + new, mask=inside, other=0.0), old_key)
        old_value = tl.where(inside, tl.load(value + new, mask=inside, other=0.0), old_value)
        end_slot = ring_slots + tl.where(goes, new_end, old_end)
        coded_page = tl.load(row + end_slot // P, mask=moves | goes, other=0).to(tl.int64)
        offset = end_slot % P
        store_coded(codes, numbers, coded_page, offset, moves | goes, old_key, page_bytes, N, D, D_PAD, P, CODEC)
        store_coded(codes, numbers, coded_page, P + offset, moves | goes, old_value, page_bytes, N, D, D_PAD, P, CODEC)
    # Every thread has read the old pairs before any overwrites them.
    tl.debug_barrier()

    lands = stays | goes
    if CODEC != "":
        lands = stays
    slot = tl.where(stays, ring_slot, ring_slots + new_end)
    target = _pairs(pool, row, slot, lands, d, pool_stride_page, pool_stride_slot, P)
    mask = lands[:, None] & (d[None, :] < D)
    tl.store(target, tl.load(key + new, mask=mask), mask=mask)
    tl.store(target + pool_stride_half, tl.load(value + new, mask=mask), mask=mask)
    bits = keep + b * keep_stride_b + h * keep_stride_h + t.to(tl.int64) * keep_stride_t
    tl.store(ring_keep + chain * ring_keep_stride + ring_slot, tl.load(bits, mask=stays, other=0), mask=stays)


@_kernel
def _advance(order, ends, seen, kept, taken, kept_taken, enters, room, wanted, T, window, Hkv: tl.constexpr):
    """One chain: its length, with the first head its sequence's, and with the first chain the stacks'."""
    chain = tl.program_id(0).to(tl.int64)
    b = chain // Hkv
    end = tl.load(kept + chain)
    new_end = end + tl.load(ends + chain * (window + T) + window + T - 1)
    n = _arriving(order, b, T, True)
    if enters is not None:
        enter = tl.load(enters + b) != 0
        n = tl.where(enter, n, 0)
        new_end = tl.where(enter, tl.minimum(new_end, tl.load(room + chain)), end)
        tl.store(taken, tl.load(taken) + tl.load(wanted), mask=chain == 0)
        if kept_taken is not None:
            tl.store(kept_taken, tl.load(kept_taken) + tl.load(wanted + 1), mask=chain == 0)
    tl.store(kept + chain, new_end)
    tl.store(seen + b, tl.load(seen + b) + n, mask=chain % Hkv == 0)
