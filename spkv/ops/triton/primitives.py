"""Pieces that the kernels share: tiles in and out, one product, the scores and the online softmax.

Scores are in the log2 domain throughout, since exp2 is what the hardware has: a factor log2(e) goes into the scale
and into the bias, and a log-sum is the base-2 logarithm of the sum of the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(base, first, stride, T, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr):
    """Rows first .. first + ROWS of a [T, D] matrix as a [ROWS, WIDTH] tile, zeros beyond both edges.

    CHECK says whether rows at or past T can be met: tiles that cannot skip that mask.
    """
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    # 64-bit up to the tile, 32-bit inside it: a whole tensor may pass 2^31 elements, a tile does not.
    pointers = base + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
    if CHECK:
        if WIDTH == D:
            return tl.load(pointers, mask=(first + row < T)[:, None], other=0.0)
        return tl.load(pointers, mask=(first + row < T)[:, None] & (column < D)[None, :], other=0.0)
    if WIDTH == D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(column < D)[None, :], other=0.0)


@triton.jit
def load_tile(
    matrices, b, h, first, stride_b, stride_h, stride_t, T,
    ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + ROWS of matrix [b, h] of a [B, heads, T, D] tensor as a [ROWS, WIDTH] tile.

    DESCRIBED: `matrices` is a tensor descriptor with blocks [1, 1, ROWS, WIDTH]. The copy engine then computes the
    addresses and fills in the zeros, which costs no registers; strides and CHECK are not looked at.
    """
    if DESCRIBED:
        return matrices.load([b.to(tl.int32), h.to(tl.int32), first, 0]).reshape(ROWS, WIDTH)
    else:
        return load_rows(matrices + b * stride_b + h * stride_h, first, stride_t, T, ROWS, D, WIDTH, CHECK)


@triton.jit
def store_rows(base, tile, first, stride, T, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `load_rows`; rounds to the matrix's dtype."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    pointers = base + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
    mask = (first + row < T)[:, None] & (column < D)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b, accumulated in float32. UPCAST: Triton's interpreter multiplies bfloat16 wrongly, but float32 rightly."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """From exp2, which every target has. Near zero 1 - exp(-2x) cancels, and the series is exact to float32 instead."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - decay) / (1.0 + decay)
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.15, near, tl.where(x < 0, -far, far))


@triton.jit
def scale_scores(products, scale, softcap, SOFTCAP: tl.constexpr):
    """log2-domain scores of q·k, and their slope: d score / d (scale · q·k), in natural units."""
    if SOFTCAP:
        bent = tanh(products * (scale / softcap))
        return bent * (softcap * LOG2_E), 1.0 - bent * bent
    else:  # not a bare return: the compiler wants one type from all returns that it sees
        return products * (scale * LOG2_E), 1.0


@triton.jit
def mask_scores(
    scores, distance, bias, window, same_segment,
    GATED: tl.constexpr, SLIDING: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Scores of a tile that crosses an edge: the bias past the window only, minus infinity where a key is not seen.

    `distance` is the query's index less the key's; every tile argument broadcasts to the scores' shape, so that the
    tile may lie either way round.
    """
    if GATED:
        scores += tl.where(distance >= window, bias, 0.0)
    visible = distance >= 0
    if SLIDING:
        visible = visible & (distance < window)
    if SEGMENTED:
        visible = visible & same_segment
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def online_softmax_update(scores, top, total):
    """Take a tile of scores [rows, keys] into a running softmax.

    Returns the tile's weights, the factor for what was accumulated before it, and the new maximum and sum by row.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has met dropped pairs only has no maximum yet, and -inf - -inf would be NaN.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(top - shift)
    return weights, rescale, new_top, total * rescale + tl.sum(weights, 1)
