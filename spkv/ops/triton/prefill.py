"""pruned_prefill in Triton: a chunk with hard gates against the cache and itself, at a cost that follows density.

Legend: B sequences, H query heads, Hkv KV heads, C = B * Hkv chains, T tokens of the chunk, n valid ones, D head size
(WIDTH: the power of two that holds it), w window, P pairs in a page, R recent pairs, L recent pairs that may leave
the window in this chunk; M rows (queries) and N columns (keys) of a tile of scores. q, k, v are tiles [rows, WIDTH].

The recent pairs of a sequence are those of its ring, oldest first, and the chunk's; token i is recent pair
`offset + i`, where `offset` is w with a cache and 0 without. A query walks three lists with one online softmax:

    old   the kept pages of its chain, through the page table; all visible. The last tile is masked by length.
    far   the kept recent pairs, past the window: copied together per chain, in order, so that they have no holes.
          `rank[i]` kept pairs have a recent index of at most i, so query i sees the first `rank[offset + i - w]`:
          tiles below what the block's first query sees are full and need no mask.
    near  the recent pairs within the window of the block's queries, kept or not: (tokens + w) / N tiles, masked.

The M rows of a program are the queries of a whole group (up to 16 heads) for M / heads tokens: near tiles, and those
that only some rows see, get fewer as the rows span fewer tokens, and a short chunk still fills its tiles.

All lengths are read on the device. Nothing here waits for the GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spkv.ops.packed import PackedLayer
from spkv.ops.triton import coded
from spkv.ops.triton.coded import check_int4_tile, load_coded, rounded
from spkv.ops.triton.launch import INTERPRETED, on_device_of, padded
from spkv.ops.triton.limits import MAX_HEAD_SIZE, is_tuned_for
from spkv.ops.triton.primitives import LOG2_E, dot, tanh


class Tile(NamedTuple):
    M: int  # rows: queries of a group's heads
    N: int  # keys; 32 at least for pages in int4
    warps: int
    stages: int  # tiles of keys and values on the way or in use


# Chosen for an H100 (227 KiB of shared memory and 64 Ki registers a multiprocessor) by the head size rounded up to a
# power of two, without spills in a loop. Measured: 128 at 32,768 tokens, of seven tiles the fastest (but for 3 % at
# density 0.1); 64 at 8 × 4,096 tokens and density 0.25, of five. 256 and float32 are not measured.
# - A program reads its keys from L2: half the rows M would mean twice the traffic, more than L2 gives.
# - Copies are issued at the end of a step: with 2 stages none is on the way while a step computes, with 3 a tile is.
# - N as large as the 3 stages allow: each tile costs a rescaling of the accumulator and a reduction over its rows.
# - float32 runs without tensor cores ("ieee" products): small tiles, so that operands fit in registers.
_TILES_HALF = {
    64: Tile(128, 64, 8, 3),
    128: Tile(128, 128, 8, 3),
    256: Tile(128, 32, 8, 3),
}
_TILES_FLOAT = {
    64: Tile(64, 32, 8, 3),
    128: Tile(64, 16, 8, 3),
    256: Tile(32, 16, 8, 3),
}
# For other GPUs: within 99 KiB of shared memory and, compiled for them, almost without spills. Not measured on any.
_TILES_PORTABLE = {
    64: Tile(128, 64, 8, 2),
    128: Tile(128, 32, 8, 2),
    256: Tile(32, 32, 4, 2),
}
_COLLECTED = 8192  # elements of keys, and of values, that a program of `_collect` moves: 64 registers a thread
_MOST_HEADS = 16  # of a group, in one program


class Recent(NamedTuple):
    """The recent pairs of a chunk, in the order and the places where queries look for them.

    Attributes:
        key, value: [B, Hkv, R, D], for the near walk; the last stride is 1.
        far_key, far_value: [C, L, D]; the first rank[c, -1] of each chain are there.
        rank: [C, L] int32, kept pairs up to and including each recent index.
        offset: recent index of the chunk's first token.
        order: [B, T] int32, the chunk's valid columns, then others; None: all are valid.
        tokens: [B] int32, n; None with `order`.
    """

    key: Tensor
    value: Tensor
    far_key: Tensor
    far_value: Tensor
    rank: Tensor
    offset: int
    order: Tensor | None
    tokens: Tensor | None


def pruned_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    *,
    window: int,
    scale: float,
    past: PackedLayer | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """See `spkv.ops.attention.pruned_prefill`. `tile` is for tests and tuning; None takes the table's."""
    tile = tile or choose_tile(query)
    if not query.numel():
        return torch.zeros_like(query)
    codec = coded.name(past)
    if past is not None and (past.empty or not past.pool.shape[0]):
        past = None
    recent = collect(key, value, keep, window=window, past=past, valid=valid, codec=codec)
    return attend(query, recent, tile, window=window, scale=scale, past=past, softcap=softcap, sinks=sinks)


def choose_tile(query: Tensor) -> Tile:
    """The row of the table for a query's head size, dtype and device."""
    D = query.shape[-1]
    if D > MAX_HEAD_SIZE:
        raise ValueError(f"the Triton kernels take head sizes up to {MAX_HEAD_SIZE}, not {D}")
    half = _TILES_HALF if is_tuned_for(query.device) else _TILES_PORTABLE
    table = _TILES_FLOAT if query.dtype == torch.float32 else half
    return table[max(64, padded(D))]


def collect(
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    *,
    window: int,
    past: PackedLayer | None,
    valid: Tensor | None,
    codec: str = "",
) -> Recent:
    """Bring a chunk's recent pairs together: those for the near walk, and the kept ones for the far walk.

    The latter are what is left of them once they are coded.
    """
    B, Hkv, T, D = key.shape
    key, value = _rows_together(key), _rows_together(value)
    order = tokens = None
    if valid is not None:
        # Valid columns first, in order: near keys are then neighbours, whatever lies between them.
        order = valid.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        tokens = valid.sum(1, dtype=torch.int32)
        keep = keep.gather(2, order[:, None].expand(-1, Hkv, -1)) & (_range(T, key) < tokens[:, None])[:, None]
        order = order.to(torch.int32)
    offset = 0
    if past is not None:
        offset = window
        position = past.seen[:, None] - window + _range(window, key)
        slot = (position % window).long()[:, None].expand(-1, Hkv, -1)
        ring_keep = past.ring_keep.reshape(B, Hkv, window).gather(2, slot) & (position >= 0)[:, None]
        keep = torch.cat([ring_keep, keep], dim=2)
    # The last query's window holds the last w pairs.
    L = max(0, offset + T - window)
    rank = keep[:, :, :L].cumsum(2, dtype=torch.int32).reshape(B * Hkv, L).contiguous()
    far_key, far_value = (torch.empty(B * Hkv, L, D, dtype=key.dtype, device=key.device) for _ in range(2))
    # Pairs that follow on each other already are read where they are.
    copied = past is not None or valid is not None
    near_key, near_value, pairs = key, value, L
    if copied:
        pairs = offset + T
        near_key, near_value = (torch.empty(B, Hkv, pairs, D, dtype=key.dtype, device=key.device) for _ in range(2))
    rows = min(64, _COLLECTED // padded(D))
    if pairs:
        with on_device_of(key):
            _collect[(B * Hkv * triton.cdiv(pairs, rows),)](
                key, value, rank, order, tokens, *_pages(past),
                near_key if copied else None, near_value if copied else None, far_key, far_value,
                *key.stride()[:3], *value.stride()[:3], *_page_strides(past),
                B * Hkv, T, L, window, offset,
                Hkv=Hkv, D=D, WIDTH=padded(D), P=1 if past is None else past.page_size, ROWS=rows,
                CODEC=codec, num_warps=4,
            )  # fmt: skip
    return Recent(near_key, near_value, far_key, far_value, rank, offset, order, tokens)


def attend(
    query: Tensor,
    recent: Recent,
    tile: Tile,
    *,
    window: int,
    scale: float,
    past: PackedLayer | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The attention of a chunk whose recent pairs have been brought together."""
    B, H, T, D = query.shape
    Hkv = recent.key.shape[1]
    group = H // Hkv
    if scale <= 0:  # the kernel takes the largest product for the largest score
        query, scale = (-query, -scale) if scale else (torch.zeros_like(query), 1.0)
    query = _rows_together(query)
    # Padding has no program that writes it.
    out = torch.empty_like(query) if recent.order is None else torch.zeros_like(query)
    heads = max(n for n in range(1, min(_MOST_HEADS, tile.M) + 1) if group % n == 0)
    lanes = B * H // heads
    with on_device_of(query):
        _attend[(lanes * triton.cdiv(T, tile.M // heads),)](
            query, out, recent.key, recent.value, recent.far_key, recent.far_value, recent.rank,
            recent.order, recent.tokens, *_pages(past), None if past is None else past.kept,
            None if sinks is None else sinks.contiguous(),
            *query.stride()[:3], *out.stride()[:3], *recent.key.stride()[:3], *recent.value.stride()[:3],
            *_page_strides(past), 0 if past is None else past.ring_pages,
            lanes, T, recent.rank.shape[1], min(window, recent.offset + T), recent.offset,
            float(scale), float(softcap or 1.0), *coded.operands(past), CODEC=coded.name(past),
            Hkv=Hkv, GROUP=group, HEADS=heads, D=D, WIDTH=padded(D), P=1 if past is None else past.page_size,
            M=tile.M, N=tile.N, STAGES=tile.stages, SOFTCAP=softcap is not None,
            # tf32 would cost float32 three digits; half precision does not look at this.
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            UPCAST=query.dtype == torch.bfloat16 and INTERPRETED,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


# Neither lengths nor the alignment of one layer's rows of a table may ask for a compilation of their own.
_VARYING = ("chains", "lanes", "T", "L", "window", "offset", "ring_pages", "table_c")
_ANY_ALIGNMENT = ("rank", "order", "count", "table", "seen", "kept", "sinks")


@triton.jit(
    do_not_specialize=[name for name in _VARYING if name not in ("lanes", "ring_pages")],
    do_not_specialize_on_alignment=[name for name in _ANY_ALIGNMENT if name not in ("kept", "sinks")],
)
def _collect(
    key, value, rank, order, count, pool, table, seen, near_key, near_value, far_key, far_value,
    key_b, key_h, key_t, value_b, value_h, value_t, pool_page, pool_half, pool_slot, table_c,
    chains, T, L, window, offset,
    Hkv: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    CODEC: tl.constexpr,
):  # fmt: skip
    """A block of one chain's recent pairs: each to its place for the near walk, kept ones to that for the far walk."""
    chain = (tl.program_id(0) % chains).to(tl.int64)
    b, h = chain // Hkv, chain % Hkv
    index = tl.program_id(0) // chains * ROWS + tl.arange(0, ROWS)
    leaves = index < L
    kept_to = tl.load(rank + chain * L + index, mask=leaves, other=0)
    kept_before = tl.load(rank + chain * L + index - 1, mask=leaves & (index > 0), other=0)
    kept = kept_to > kept_before

    token = index - offset
    tokens = T
    if count is not None:
        tokens = tl.load(count + b)
    in_chunk = (token >= 0) & (token < tokens)
    if near_key is None:
        in_chunk = in_chunk & kept
    column = token
    if order is not None:
        column = tl.load(order + b * T + token, mask=in_chunk, other=0)
    d = tl.arange(0, WIDTH)
    from_chunk = in_chunk[:, None] & (d < D)[None, :]
    k = tl.load(key + b * key_b + h * key_h + (column.to(tl.int64) * key_t)[:, None] + d[None, :], mask=from_chunk)
    v = tl.load(
        value + b * value_b + h * value_h + (column.to(tl.int64) * value_t)[:, None] + d[None, :], mask=from_chunk
    )
    held = in_chunk
    if seen is not None:
        position = tl.load(seen + b) - window + index
        in_ring = (position >= 0) & (token < 0)
        slot = position % window
        page = tl.load(table + chain * table_c + slot // P, mask=in_ring, other=0).to(tl.int64)
        pair = pool + (page * pool_page + (slot % P) * pool_slot)[:, None] + d[None, :]
        from_ring = in_ring[:, None] & (d < D)[None, :]
        k = tl.where(from_ring, tl.load(pair, mask=from_ring), k)
        v = tl.where(from_ring, tl.load(pair + pool_half, mask=from_ring), v)
        held = in_chunk | in_ring
    if near_key is not None:
        near = (chain * (offset + T) + index)[:, None] * D + d[None, :]
        here = held[:, None] & (d < D)[None, :]
        tl.store(near_key + near, k, mask=here)
        tl.store(near_value + near, v, mask=here)
    far = (chain * L + kept_to - 1)[:, None] * D + d[None, :]
    moves = kept[:, None] & (d < D)[None, :]
    if CODEC != "":  # queries past the window meet what the codes say
        k = rounded(tl.where(moves, k, 0.0), ROWS, WIDTH, CODEC)
        v = rounded(tl.where(moves, v, 0.0), ROWS, WIDTH, CODEC)
    tl.store(far_key + far, k, mask=moves)
    tl.store(far_value + far, v, mask=moves)


@triton.jit
def _load_rows(rows, D: tl.constexpr, WIDTH: tl.constexpr):
    """What [rows] pointers lead to, as a [rows, WIDTH] tile."""
    d = tl.arange(0, WIDTH)
    if WIDTH == D:
        return tl.load(rows[:, None] + d[None, :])
    else:
        return tl.load(rows[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)


@triton.jit
def _softmax_update(scores, factor, top, total):
    """Take scores [rows, keys], still to be multiplied by `factor` > 0, into a running softmax in base 2.

    As in `online_softmax_update`, but one multiplication and addition for each score instead of two steps.
    """
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    # A row that has seen nothing yet has no maximum, and -inf - -inf would be NaN.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * factor - shift[:, None])
    rescale = tl.exp2(top - shift)
    return weights, rescale, new_top, total * rescale + tl.sum(weights, 1)


@triton.jit(
    do_not_specialize=[name for name in _VARYING if name != "chains"], do_not_specialize_on_alignment=_ANY_ALIGNMENT
)
def _attend(
    query, out, near_key, near_value, far_key, far_value, rank, order, count, pool, table, seen, kept, sinks,
    query_b, query_h, query_t, out_b, out_h, out_t, key_b, key_h, key_t, value_b, value_h, value_t,
    pool_page, pool_half, pool_slot, table_c, ring_pages,
    lanes, T, L, window, offset, scale, softcap,
    codes, numbers, page_bytes, CODEC: tl.constexpr,
    Hkv: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = M // HEADS
    check_int4_tile(query.dtype.element_ty, N, CODEC)
    # Programs that share their keys run side by side; the longest rows start first.
    lane = tl.program_id(0) % lanes
    chain = (lane // (GROUP // HEADS)).to(tl.int64)
    b, kv_head = chain // Hkv, chain % Hkv
    first = (tl.num_programs(0) // lanes - 1 - tl.program_id(0) // lanes) * TOKENS
    tokens = T
    if count is not None:
        tokens = tl.load(count + b)
        if first >= tokens:
            return
    last = tl.minimum(first + TOKENS, tokens) - 1

    # A row is one head of one token, heads side by side.
    row, d = tl.arange(0, M), tl.arange(0, WIDTH)
    token = first + row // HEADS
    head = kv_head * GROUP + lane % (GROUP // HEADS) * HEADS + row % HEADS
    live = (row < TOKENS * HEADS) & (token < tokens)
    column = token
    if order is not None:
        column = tl.load(order + b * T + token, mask=live, other=0)
    entries = live[:, None] & (d < D)[None, :]
    query_row = query + b * query_b + (head * query_h + column.to(tl.int64) * query_t)
    q = tl.load(query_row[:, None] + d[None, :], mask=entries, other=0.0)

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    if sinks is not None:  # a key with a score and no value
        top = tl.load(sinks + head).to(tl.float32) * LOG2_E
        total += 1.0
    acc = tl.zeros([M, WIDTH], tl.float32)
    factor = (softcap if SOFTCAP else scale) * LOG2_E

    # `left` is the recent pair that has just left a query's window.
    rank += chain * L
    left = token + offset - window
    far_by_row = tl.load(rank + left, mask=live & (left >= 0), other=0)
    far_of_all = tl.load(rank + first + offset - window, mask=first + offset >= window, other=0)
    far = tl.load(rank + last + offset - window, mask=last + offset >= window, other=0)
    far_key += chain * L * D
    far_value += chain * L * D

    near_start = tl.maximum(first + offset - window + 1, 0)
    near_end = offset + last + 1
    near_key += b * key_b + kv_head * key_h
    near_value += b * value_b + kv_head * value_h
    old = 0
    if seen is not None:
        near_start = tl.maximum(near_start, offset - tl.load(seen + b))
        old = tl.load(kept + chain)
        table += chain * table_c + ring_pages
    near_begin = left + 1 - near_start  # of each row, among the near pairs

    # Each loop begins with an empty pipeline, so far tiles that only some rows see and near ones share the last:
    # old, full; old, the last; far, full; the rest of far, then near.
    full, rest = far_of_all // N, tl.cdiv(far, N) - far_of_all // N
    for part in tl.static_range(2 if seen is None else 0, 4):
        low = 0
        high = old // N
        if part == 1:
            low = old // N
            high = tl.cdiv(old, N)
        if part == 2:
            high = full
        if part == 3:
            high = rest + tl.cdiv(near_end - near_start, N)
        # The pages' numbers are read a step ahead of the pages.
        for n in tl.range(low, high, num_stages=STAGES + 1 if part < 2 else STAGES):
            # Past the end, masked tiles repeat the last pair: memory that holds nothing is never read.
            if part < 2:
                n_th = n * N + tl.arange(0, N)
                slot = n_th if part == 0 else tl.minimum(n_th, old - 1)
                page = tl.load(table + slot // P).to(tl.int64)
                k_row = pool + (page * pool_page + (slot % P) * pool_slot)
                v_row = k_row + pool_half
            elif part == 2:
                start = tl.cast(n, tl.int64) * (N * D)
                k_row = far_key + start + tl.arange(0, N) * D
                v_row = far_value + start + tl.arange(0, N) * D
            else:
                near = n >= rest
                n_th = tl.where(near, n - rest, full + n) * N + tl.arange(0, N)
                index = tl.minimum(n_th + tl.where(near, near_start, 0), tl.where(near, near_end, far) - 1)
                k_row = tl.where(near, near_key, far_key) + index.to(tl.int64) * tl.where(near, key_t, D)
                v_row = tl.where(near, near_value, far_value) + index.to(tl.int64) * tl.where(near, value_t, D)
            if CODEC != "" and part < 2:
                kept_row, every = slot % P, n_th >= 0
                k = load_coded(codes, numbers, page, kept_row, every, page_bytes, N, D, WIDTH, P, CODEC).to(q.dtype)
            else:
                k = _load_rows(k_row, D, WIDTH)
            scores = dot(q, k.T, PRECISION, UPCAST)
            if SOFTCAP:
                scores = tanh(scores * (scale / softcap))
            if part == 1:
                scores = tl.where((n_th < old)[None, :], scores, float("-inf"))
            if part == 3:
                begin = tl.where(near, near_begin, 0)
                size = tl.where(near, window, far_by_row)
                # Unsigned, so that one comparison finds what lies before `begin`, too.
                visible = (n_th[None, :] - begin[:, None]).to(tl.uint32) < size[:, None].to(tl.uint32)
                scores = tl.where(visible, scores, float("-inf"))
            weights, rescale, top, total = _softmax_update(scores, factor, top, total)
            if CODEC != "" and part < 2:
                v = load_coded(codes, numbers, page, P + kept_row, every, page_bytes, N, D, WIDTH, P, CODEC).to(q.dtype)
            else:
                v = _load_rows(v_row, D, WIDTH)
            acc = acc * rescale[:, None] + dot(weights.to(v.dtype), v, PRECISION, UPCAST)

    # A query sees itself, so the sum is positive in every row that is stored.
    out_row = out + b * out_b + (head * out_h + column.to(tl.int64) * out_t)
    tl.store(out_row[:, None] + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=entries)


def _range(size: int, like: Tensor) -> Tensor:
    return torch.arange(size, dtype=torch.int32, device=like.device)


def _rows_together(tensor: Tensor) -> Tensor:
    """The kernels take any strides but the last, which must be 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _pages(past: PackedLayer | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if past is None else (past.pool, past.table, past.seen)


def _page_strides(past: PackedLayer | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if past is None else (*past.pool.stride()[:3], past.table.stride(0))
