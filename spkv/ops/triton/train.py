"""gated_attention in Triton, forward and backward. Deterministic: every output tile has one program that owns it.

Legend: B sequences, H query heads, Hkv KV heads, T tokens, D head size (WIDTH: the power of two that holds it),
w window, M rows (queries) and N columns (keys) of a tile of scores. q, k, v, do, dq, dk, dv are tiles [rows, WIDTH].

A tile is *full* if all its pairs are past the window, causal and of one segment: it needs no mask, only the key's bias.
With w = 128 nearly all tiles of a long text are full, and the edges (the window and the diagonal, at most
(M + w) / N + 2 tiles for a row of tiles) are masked. Without a gate nothing depends on the window, and w is 0.

    forward, dq   a program per query tile walks the keys:    [masked: other segments] [full] [masked: window, diagonal]
    dk, dv, dbias a program per key tile walks the queries: [masked: diagonal, window] [full] [masked: other segments]

With a sliding window nothing past it is walked: of each walk there is the part with window and diagonal. All its tiles
are masked, those inside of the window for nothing.

The second walks them for every query head of its group, which is what keeps dk, dv and the gradient of the bias in
registers: no atomics, no partial sums in memory. As usual, with P the normalised weights and delta = sum(do * o):
dS = P * (do v' - delta); the bias is added to S, so its gradient is dS summed over the queries past the window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary
from triton.tools.tensor_descriptor import TensorDescriptor

from spkv.ops.triton.launch import INTERPRETED, on_device_of, padded
from spkv.ops.triton.limits import MAX_HEAD_SIZE, is_tuned_for
from spkv.ops.triton.primitives import (
    LOG2_E,
    dot,
    load_rows,
    load_tile,
    mask_scores,
    online_softmax_update,
    scale_scores,
    store_rows,
)


class Tile(NamedTuple):
    M: int  # queries
    N: int  # keys
    warps: int
    stages: int
    described: bool = False  # read through tensor descriptors (Hopper's copy engine) or through pointers


class Tiles(NamedTuple):
    forward: Tile
    dq: Tile
    dkdv: Tile


# Measured on an H100 (227 KiB of shared memory and 64 Ki registers a multiprocessor), by the head size rounded up to a
# power of two; in brackets TFLOP/s of matrix work (not of useful work: the backward pass computes scores twice), at
# 32/8 heads × 128 and 16/8 × 256 at 8,192 tokens, and 9/3 × 64 at 4,096. Two programs of 4 warps on a multiprocessor
# beat one of 8: the softmax of one runs beside the products of the other. At 128, addresses in registers would spill,
# and descriptors double the speed of dk, dv; at 64 there is room, and plain pointers are faster but for dq. Reading the
# gate's bias costs the forward pass a fifth at 128.
_TILES_HALF = {
    64: Tiles(Tile(64, 128, 4, 2), Tile(128, 64, 8, 2, True), Tile(64, 128, 8, 3)),  # 258, 317, 261
    128: Tiles(Tile(128, 64, 4, 2, True), Tile(64, 64, 4, 2, True), Tile(64, 64, 4, 2, True)),  # 390, 446, 494
    256: Tiles(Tile(128, 64, 8, 2, True), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2, True)),  # 405, 371, 250
}
# float32 runs without tensor cores ("ieee" products): small tiles, so that operands fit in registers.
_TILES_FLOAT = {
    64: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2)),
    128: Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    256: Tiles(Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1)),
}
# For other GPUs: within 99 KiB of shared memory and, compiled for them, almost without spills. Not measured on any.
_TILES_PORTABLE = {
    64: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(64, 32, 8, 2), Tile(64, 16, 4, 2), Tile(32, 32, 8, 2)),
}
_DELTA_ROWS = 64


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, bias_ptr, sinks_ptr, segments_ptr, ranges_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    H, T, window, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    GATED: tl.constexpr, SLIDING: tl.constexpr, SEGMENTED: tl.constexpr, SINKS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    # Heads of a group run side by side and share their keys in L2; the longest rows start first.
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    first_row = block * M
    kv_head = h // GROUP
    Hkv = H // GROUP
    bias_ptr += (b * Hkv + kv_head) * T
    segments_ptr += b * T
    rows = first_row + tl.arange(0, M)

    start = 0
    full_start = 0
    full_end = tl.maximum(first_row + 1 - window, 0) // N
    end = tl.cdiv(tl.minimum(first_row + M, T), N)
    if SEGMENTED:
        ranges_ptr += (b * tl.num_programs(1) + block) * 2
        start = tl.load(ranges_ptr)
        full_start = tl.load(ranges_ptr + 1)
        row_segment = tl.load(segments_ptr + rows, mask=rows < T, other=0)

    q = load_tile(q_ptr, b, h, first_row, q_b, q_h, q_t, T, M, D, WIDTH, True, DESCRIBED)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    if SINKS:  # a key with a score and no value
        top = tl.zeros([M], tl.float32) + tl.load(sinks_ptr + h) * LOG2_E
        total += 1.0
    out = tl.zeros([M, WIDTH], tl.float32)

    for part in tl.static_range(2 if SLIDING else (0 if SEGMENTED else 1), 3):
        low = start
        high = full_start
        if part == 1:
            low = full_start
            high = full_end
        if part == 2:
            low = tl.maximum(start, full_end)
            high = end
        for n in range(low, high):
            columns = n * N + tl.arange(0, N)
            k = load_tile(k_ptr, b, kv_head, n * N, k_b, k_h, k_t, T, N, D, WIDTH, part != 1, DESCRIBED)
            scores, _ = scale_scores(dot(q, k.T, PRECISION, UPCAST), scale, softcap, SOFTCAP)
            bias = 0.0
            if GATED:
                bias = (tl.load(bias_ptr + columns, mask=columns < T, other=0.0) * LOG2_E)[None, :]
            if part == 1:
                scores += bias
            else:
                same_segment = True
                if SEGMENTED:
                    column_segment = tl.load(segments_ptr + columns, mask=columns < T, other=0)
                    same_segment = row_segment[:, None] == column_segment[None, :]
                distance = rows[:, None] - columns[None, :]
                scores = mask_scores(scores, distance, bias, window, same_segment, GATED, SLIDING, SEGMENTED)
            weights, rescale, top, total = online_softmax_update(scores, top, total)
            v = load_tile(v_ptr, b, kv_head, n * N, v_b, v_h, v_t, T, N, D, WIDTH, part != 1, DESCRIBED)
            out = out * rescale[:, None] + dot(weights.to(v.dtype), v, PRECISION, UPCAST)

    # A query sees itself, so the sum is positive in every row that is stored.
    store_rows(o_ptr + b * o_b + h * o_h, out / total[:, None], first_row, o_t, T, M, D, WIDTH)
    tl.store(lse_ptr + (b * H + h) * T + rows, top + tl.log2(total), mask=rows < T)


@triton.jit
def _delta(
    o_ptr, do_ptr, delta_ptr, o_b, o_h, o_t, do_b, do_h, do_t, H, T,
    D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """delta = sum(do * o) over the head size: what the softmax's normalisation takes from every dP of a row."""
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    first_row = tl.program_id(1) * M
    rows = first_row + tl.arange(0, M)
    o = load_rows(o_ptr + b * o_b + h * o_h, first_row, o_t, T, M, D, WIDTH, True).to(tl.float32)
    do = load_rows(do_ptr + b * do_b + h * do_h, first_row, do_t, T, M, D, WIDTH, True).to(tl.float32)
    tl.store(delta_ptr + (b * H + h) * T + rows, tl.sum(o * do, 1), mask=rows < T)


@triton.jit
def _backward_dq(
    q_ptr, do_ptr, k_ptr, v_ptr, dq_ptr, lse_ptr, delta_ptr, bias_ptr, segments_ptr, ranges_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dq_b, dq_h, dq_t,
    H, T, window, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    GATED: tl.constexpr, SLIDING: tl.constexpr, SEGMENTED: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Walks the keys as `_forward` does."""
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0).to(tl.int64) % H
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    first_row = block * M
    kv_head = h // GROUP
    Hkv = H // GROUP
    bias_ptr += (b * Hkv + kv_head) * T
    segments_ptr += b * T
    rows = first_row + tl.arange(0, M)

    start = 0
    full_start = 0
    full_end = tl.maximum(first_row + 1 - window, 0) // N
    end = tl.cdiv(tl.minimum(first_row + M, T), N)
    if SEGMENTED:
        ranges_ptr += (b * tl.num_programs(1) + block) * 2
        start = tl.load(ranges_ptr)
        full_start = tl.load(ranges_ptr + 1)
        row_segment = tl.load(segments_ptr + rows, mask=rows < T, other=0)

    q = load_tile(q_ptr, b, h, first_row, q_b, q_h, q_t, T, M, D, WIDTH, True, DESCRIBED)
    do = load_tile(do_ptr, b, h, first_row, do_b, do_h, do_t, T, M, D, WIDTH, True, DESCRIBED)
    # Rows past T get weights of exp2(-inf) = 0.
    lse = tl.load(lse_ptr + (b * H + h) * T + rows, mask=rows < T, other=float("inf"))[:, None]
    delta = tl.load(delta_ptr + (b * H + h) * T + rows, mask=rows < T, other=0.0)[:, None]
    dq = tl.zeros([M, WIDTH], tl.float32)

    for part in tl.static_range(2 if SLIDING else (0 if SEGMENTED else 1), 3):
        low = start
        high = full_start
        if part == 1:
            low = full_start
            high = full_end
        if part == 2:
            low = tl.maximum(start, full_end)
            high = end
        for n in range(low, high):
            columns = n * N + tl.arange(0, N)
            k = load_tile(k_ptr, b, kv_head, n * N, k_b, k_h, k_t, T, N, D, WIDTH, part != 1, DESCRIBED)
            v = load_tile(v_ptr, b, kv_head, n * N, v_b, v_h, v_t, T, N, D, WIDTH, part != 1, DESCRIBED)
            scores, slope = scale_scores(dot(q, k.T, PRECISION, UPCAST), scale, softcap, SOFTCAP)
            bias = 0.0
            if GATED:
                bias = (tl.load(bias_ptr + columns, mask=columns < T, other=0.0) * LOG2_E)[None, :]
            if part == 1:
                scores += bias
            else:
                same_segment = True
                if SEGMENTED:
                    column_segment = tl.load(segments_ptr + columns, mask=columns < T, other=0)
                    same_segment = row_segment[:, None] == column_segment[None, :]
                distance = rows[:, None] - columns[None, :]
                scores = mask_scores(scores, distance, bias, window, same_segment, GATED, SLIDING, SEGMENTED)
            ds = tl.exp2(scores - lse) * (dot(do, v.T, PRECISION, UPCAST) - delta)
            if SOFTCAP:
                ds *= slope
            dq += dot(ds.to(k.dtype), k, PRECISION, UPCAST)

    store_rows(dq_ptr + b * dq_b + h * dq_h, dq * scale, first_row, dq_t, T, M, D, WIDTH)


@triton.jit
def _backward_dkdv(
    q_ptr, do_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, bias_ptr, dbias_ptr, segments_ptr, ranges_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    Hkv, T, window, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    GATED: tl.constexpr, SLIDING: tl.constexpr, SEGMENTED: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Tiles of scores lie transposed here, [N, M], so that no product needs a transposed accumulator."""
    b, kv_head = tl.program_id(0).to(tl.int64) // Hkv, tl.program_id(0).to(tl.int64) % Hkv
    block = tl.program_id(1)  # the first keys have the longest walks, and start first
    first_column = block * N
    H = Hkv * GROUP
    bias_ptr += (b * Hkv + kv_head) * T
    dbias_ptr += (b * Hkv + kv_head) * T
    segments_ptr += b * T
    columns = first_column + tl.arange(0, N)

    # Rows past T load as zeros with a log-sum of infinity: weights of 0, in full tiles too.
    start = first_column // M
    full_start = tl.cdiv(first_column + N - 1 + window, M)
    full_end = tl.cdiv(T, M)
    end = tl.cdiv(T, M)
    if SEGMENTED:
        ranges_ptr += (b * tl.num_programs(1) + block) * 2
        full_end = tl.load(ranges_ptr)
        end = tl.load(ranges_ptr + 1)
        column_segment = tl.load(segments_ptr + columns, mask=columns < T, other=0)

    k = load_tile(k_ptr, b, kv_head, first_column, k_b, k_h, k_t, T, N, D, WIDTH, True, DESCRIBED)
    v = load_tile(v_ptr, b, kv_head, first_column, v_b, v_h, v_t, T, N, D, WIDTH, True, DESCRIBED)
    bias = 0.0
    if GATED:
        bias = (tl.load(bias_ptr + columns, mask=columns < T, other=0.0) * LOG2_E)[:, None]
    dk = tl.zeros([N, WIDTH], tl.float32)
    dv = tl.zeros([N, WIDTH], tl.float32)
    dbias = tl.zeros([N], tl.float32)

    for g in range(GROUP):
        h = kv_head * GROUP + g
        lse_base = lse_ptr + (b * H + h) * T
        delta_base = delta_ptr + (b * H + h) * T
        for part in tl.static_range(0, 1 if SLIDING else (3 if SEGMENTED else 2)):
            low = start
            high = tl.minimum(full_start, end)
            if part == 1:
                low = full_start
                high = full_end
            if part == 2:
                low = tl.maximum(full_start, full_end)
                high = end
            for m in range(low, high):
                rows = m * M + tl.arange(0, M)
                q = load_tile(q_ptr, b, h, m * M, q_b, q_h, q_t, T, M, D, WIDTH, True, DESCRIBED)
                do = load_tile(do_ptr, b, h, m * M, do_b, do_h, do_t, T, M, D, WIDTH, True, DESCRIBED)
                lse = tl.load(lse_base + rows, mask=rows < T, other=float("inf"))[None, :]
                delta = tl.load(delta_base + rows, mask=rows < T, other=0.0)[None, :]
                scores, slope = scale_scores(dot(k, q.T, PRECISION, UPCAST), scale, softcap, SOFTCAP)
                distance = rows[None, :] - columns[:, None]
                if part == 1:
                    scores += bias
                else:
                    same_segment = True
                    if SEGMENTED:
                        row_segment = tl.load(segments_ptr + rows, mask=rows < T, other=0)
                        same_segment = row_segment[None, :] == column_segment[:, None]
                    scores = mask_scores(scores, distance, bias, window, same_segment, GATED, SLIDING, SEGMENTED)
                weights = tl.exp2(scores - lse)
                dv += dot(weights.to(do.dtype), do, PRECISION, UPCAST)
                ds = weights * (dot(v, do.T, PRECISION, UPCAST) - delta)
                if GATED:
                    if part == 1:
                        dbias += tl.sum(ds, 1)
                    else:
                        dbias += tl.sum(tl.where(distance >= window, ds, 0.0), 1)
                if SOFTCAP:
                    ds *= slope
                dk += dot(ds.to(q.dtype), q, PRECISION, UPCAST)

    store_rows(dk_ptr + b * dk_b + kv_head * dk_h, dk * scale, first_column, dk_t, T, N, D, WIDTH)
    store_rows(dv_ptr + b * dv_b + kv_head * dv_h, dv, first_column, dv_t, T, N, D, WIDTH)
    if GATED:
        tl.store(dbias_ptr + columns, dbias, mask=columns < T)


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor | None,
    *,
    window: int,
    scale: float,
    segment_ids: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    sliding: bool = False,
    tiles: Tiles | None = None,
) -> Tensor:
    """See `spkv.ops.attention.gated_attention`. `tiles` is for tests and tuning; None takes the table's."""
    if segment_ids is not None:
        segment_ids = segment_ids.to(torch.int8) if segment_ids.dtype == torch.bool else segment_ids.contiguous()
    return _GatedAttention.apply(  # type: ignore[no-any-return]
        _readable(query),
        _readable(key),
        _readable(value),
        None if log_gate is None else log_gate.float().contiguous(),
        None if sinks is None else sinks.float().contiguous(),
        segment_ids,
        # No distance reaches T.
        min(window, query.shape[2]),
        scale,
        softcap,
        sliding,
        tiles or _choose_tiles(query),
    )


class _GatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_gate: Tensor | None,
        sinks: Tensor | None,
        segment_ids: Tensor | None,
        window: int,
        scale: float,
        softcap: float | None,
        sliding: bool,
        tiles: Tiles,
    ) -> Tensor:
        B, H, T, _ = query.shape
        # A gate that no query meets is none: then all tiles before the diagonal are full.
        gated, sliding = log_gate is not None and window < T, sliding and window < T
        window = window if gated or sliding else 0
        tile = tiles.forward
        out = torch.empty_like(query)
        log_sum = torch.empty(B, H, T, dtype=torch.float32, device=query.device)
        ranges = None if segment_ids is None else _ranges(_key_ranges, segment_ids, tile, window)
        with on_device_of(query):
            _forward[(B * H, triton.cdiv(T, tile.M))](
                *_operands(tile, rows=(query,), columns=(key, value)), out, log_sum,
                # Triton wants a pointer for what a constexpr switches off, too.
                log_gate if gated else query, query if sinks is None else sinks,
                query if segment_ids is None else segment_ids, query if ranges is None else ranges,
                *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
                H, T, window, scale, softcap or 1.0,
                SINKS=sinks is not None,
                **_constants(query, key, gated, sliding, segment_ids, softcap, tile),
            )  # fmt: skip
        ctx.save_for_backward(query, key, value, log_gate, sinks, out, log_sum)
        ctx.segment_ids = segment_ids  # the very tensor, which `_ranges` knows
        ctx.segments_version = None if segment_ids is None else _version(segment_ids)
        ctx.gated, ctx.sliding, ctx.window = gated, sliding, window
        ctx.scale, ctx.softcap, ctx.tiles = scale, softcap, tiles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_gate, sinks, out, log_sum = ctx.saved_tensors
        segment_ids = ctx.segment_ids
        if segment_ids is not None and _version(segment_ids) != ctx.segments_version:
            raise RuntimeError("segment_ids were changed in place between the forward and the backward pass")
        gated, window, scale, softcap, tiles = ctx.gated, ctx.window, ctx.scale, ctx.softcap, ctx.tiles
        B, H, T, D = query.shape
        Hkv = key.shape[1]
        grad_out = _readable(grad_out)
        delta = torch.empty_like(log_sum)
        bias = log_gate if gated else query
        segments = query if segment_ids is None else segment_ids
        options = (window, scale, softcap or 1.0)
        strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_out.stride()[:3])
        grad_query = grad_key = grad_value = grad_gate = grad_sinks = None
        with on_device_of(query):
            _delta[(B * H, triton.cdiv(T, _DELTA_ROWS))](
                out, grad_out, delta, *out.stride()[:3], *grad_out.stride()[:3], H, T,
                D=D, WIDTH=padded(D), M=_DELTA_ROWS,
            )  # fmt: skip
            if ctx.needs_input_grad[0]:
                tile = tiles.dq
                grad_query = torch.empty_like(query)
                ranges = None if segment_ids is None else _ranges(_key_ranges, segment_ids, tile, window)
                _backward_dq[(B * H, triton.cdiv(T, tile.M))](
                    *_operands(tile, rows=(query, grad_out), columns=(key, value)),
                    grad_query, log_sum, delta, bias, segments, query if ranges is None else ranges,
                    *strides, *grad_query.stride()[:3], H, T, *options,
                    **_constants(query, key, gated, ctx.sliding, segment_ids, softcap, tile),
                )  # fmt: skip
            if any(ctx.needs_input_grad[1:4]):
                tile = tiles.dkdv
                grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
                if log_gate is not None:
                    grad_gate = torch.empty_like(log_gate) if gated else torch.zeros_like(log_gate)
                ranges = None if segment_ids is None else _ranges(_query_ranges, segment_ids, tile, window)
                _backward_dkdv[(B * Hkv, triton.cdiv(T, tile.N))](
                    *_operands(tile, rows=(query, grad_out), columns=(key, value)),
                    grad_key, grad_value, log_sum, delta, bias, grad_gate if gated else query,
                    segments, query if ranges is None else ranges,
                    *strides, *grad_key.stride()[:3], *grad_value.stride()[:3], Hkv, T, *options,
                    **_constants(query, key, gated, ctx.sliding, segment_ids, softcap, tile),
                )  # fmt: skip
        if sinks is not None and ctx.needs_input_grad[4]:
            # A sink's value is 0, so its dP is 0 and its dS is -P * delta.
            grad_sinks = -(torch.exp2(sinks[:, None] * LOG2_E.value - log_sum) * delta).sum((0, 2))
        return grad_query, grad_key, grad_value, grad_gate, grad_sinks, *(None,) * 6


def _constants(
    query: Tensor,
    key: Tensor,
    gated: bool,
    sliding: bool,
    segment_ids: Tensor | None,
    softcap: float | None,
    tile: Tile,
) -> dict[str, Any]:
    D = query.shape[-1]
    return dict(
        GROUP=query.shape[1] // key.shape[1],
        D=D,
        WIDTH=padded(D),
        M=tile.M,
        N=tile.N,
        GATED=gated,
        SLIDING=sliding,
        SEGMENTED=segment_ids is not None,
        SOFTCAP=softcap is not None,
        # tf32 would cost float32 three digits; half precision does not look at this.
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        UPCAST=query.dtype == torch.bfloat16 and INTERPRETED,
        DESCRIBED=tile.described,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _choose_tiles(query: Tensor) -> Tiles:
    D = query.shape[-1]
    if D > MAX_HEAD_SIZE:
        raise ValueError(f"the Triton kernels take head sizes up to {MAX_HEAD_SIZE}, not {D}")
    half = _TILES_HALF if is_tuned_for(query.device) else _TILES_PORTABLE
    table = _TILES_FLOAT if query.dtype == torch.float32 else half
    tiles = table[max(64, padded(D))]
    if D * query.element_size() % 16:
        return Tiles(*(tile._replace(described=False) for tile in tiles))
    return tiles


def _readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its last stride is not 1 or a row may start off the 16 bytes that descriptors want."""
    size = tensor.element_size()
    rows = all(stride > 0 and stride * size % 16 == 0 for stride in tensor.stride()[:-1])
    if tensor.stride(-1) == 1 and rows and tensor.data_ptr() % 16 == 0:
        return tensor
    # A contiguous view may start anywhere, and stay where it is under contiguous().
    return tensor.clone(memory_format=torch.contiguous_format)


def _operands(tile: Tile, *, rows: tuple[Tensor, ...], columns: tuple[Tensor, ...]) -> list[Any]:
    """What a kernel reads its tiles from, [B, heads, T, D] each: tensors, or descriptors of M or N rows at a time."""
    if not tile.described:
        return [*rows, *columns]
    sized = [(tensor, tile.M) for tensor in rows] + [(tensor, tile.N) for tensor in columns]
    return [
        TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, size, padded(tensor.shape[-1])])
        for tensor, size in sized
    ]


def _segment_overlap(segment_ids: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """Bools [B, query tiles, key tiles]: may two tiles share a segment, and are both of one and the same.

    Ids need not be sorted: tiles are told apart by their range of ids, which may only overestimate the overlap.
    """

    def spans(size: int) -> tuple[Tensor, Tensor]:
        T = segment_ids.shape[1]
        # Repeating the last id fills the last tile and leaves its range as it is.
        padded = torch.cat([segment_ids, segment_ids[:, -1:].expand(-1, -T % size)], dim=1)
        low, high = padded.view(-1, triton.cdiv(T, size), size).aminmax(dim=-1)
        return low, high

    (q_low, q_high), (k_low, k_high) = spans(tile.M), spans(tile.N)
    overlap = (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    same = (q_low[:, :, None] == k_high[:, None]) & (k_low[:, None] == q_high[:, :, None])
    return overlap, same


# Every layer of a model gets the same segments: segment ids -> {(function, tile, window, version): ranges}.
_KNOWN_RANGES: Any = WeakTensorKeyDictionary()


def _version(tensor: Tensor) -> int:
    """Inference tensors count no changes in place, and allow none outside of inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _ranges(function: Callable[..., Tensor], segment_ids: Tensor, tile: Tile, window: int) -> Tensor:
    """What `function` returns, remembered as long as the segment ids live."""
    if segment_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        # A graph must derive them anew at every replay, from what the ids are then.
        return function(segment_ids, tile, window)
    version = _version(segment_ids)
    known = _KNOWN_RANGES.setdefault(segment_ids, {})
    name = (function.__name__, tile.M, tile.N, window, version)
    if name not in known:
        known[name] = function(segment_ids, tile, window)
    return known[name]  # type: ignore[no-any-return]


def _key_ranges(segment_ids: Tensor, tile: Tile, window: int) -> Tensor:
    """int32 [B, query tiles, 2]: the first key tile to visit, and the first from which full ones can be full."""
    overlap, same = _segment_overlap(segment_ids, tile)
    q_tile, k_tile = (torch.arange(n, device=segment_ids.device) for n in overlap.shape[1:])
    full_end = (q_tile * tile.M + 1 - window).clamp_min(0) // tile.N
    other = ~same & (k_tile < full_end[:, None])
    # argmax finds the first; there is one, on the diagonal.
    start = overlap.to(torch.int8).argmax(-1)
    return torch.stack([start, ((k_tile + 1) * other).amax(-1)], dim=-1).to(torch.int32)


def _query_ranges(segment_ids: Tensor, tile: Tile, window: int) -> Tensor:
    """int32 [B, key tiles, 2]: where the full query tiles end, and where the visited ones do."""
    overlap, same = _segment_overlap(segment_ids, tile)
    q_tile, k_tile = (torch.arange(n, device=segment_ids.device)[:, None] for n in overlap.shape[1:])
    full_start = -(-(k_tile.T * tile.N + tile.N - 1 + window) // tile.M)
    other = ~same & (q_tile >= full_start)
    full_end = torch.where(other, q_tile, overlap.shape[1]).amin(1)
    end = ((q_tile + 1) * overlap).amax(1)
    return torch.stack([full_end, end], dim=-1).to(torch.int32)
