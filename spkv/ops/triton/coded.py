"""Coded rows in Triton, to the bit as `spkv.ops.codec` codes them.

Legend: N rows of D elements (D_PAD: the power of two that holds them), P pairs in a page. A page is `page_bytes` long:
the codes of P keys and of P values, then their float16 numbers. `codes` and `numbers` point at the same pool, as the
codec's type and as float16. CODEC is a codec's name, or "" where pairs are kept as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from spkv.ops.packed import CodedPages, PackedLayer

_TINY = tl.constexpr(2.0**-24)
_FP8_MAX = tl.constexpr(448.0)
_FLOAT16_MAX = tl.constexpr(65504.0)
_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}


def operands(packed: PackedLayer | None) -> tuple[Any, ...]:
    """codes, numbers and page_bytes, as kernels take them."""
    coded: CodedPages | None = None if packed is None else packed.coded
    if coded is None:
        return None, None, 0
    return coded.pool.view(_TYPES[coded.codec.name]), coded.pool.view(torch.float16), coded.pool.shape[1]


def name(packed: PackedLayer | None) -> str:
    """CODEC."""
    return "" if packed is None or packed.coded is None else packed.coded.codec.name


@triton.jit
def check_int4_tile(dtype: tl.constexpr, N: tl.constexpr, CODEC: tl.constexpr):
    """Refuse N rows of int4 that are too few for a product in this dtype.

    Of what was 4 bits wide Triton 3.6 gives each of 4 threads runs of 8 along the inner size of a product of half
    precision (mma; not wgmma), and where that is less than 32 it drops half of each run.
    """
    tl.static_assert(CODEC != "int4" or N >= 32 or dtype == tl.float32, "tiles of int4 take at least 32 rows")


@triton.jit
def load_coded(
    codes, numbers, page, row, mask, page_bytes,
    N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr, CODEC: tl.constexpr,
):  # fmt: skip
    """Rows [N] of pages [N] (int64), decoded: [N, D_PAD] float32. Row r < P is a key, P + r a value."""
    if CODEC == "int4":
        byte, group = tl.arange(0, D_PAD // 2), tl.arange(0, D_PAD // 32)
        start = page * page_bytes + row * (D // 2)
        pairs = tl.load(codes + start[:, None] + byte[None, :], mask=mask[:, None], other=0)
        # Element d lies beside element d + D / 2.
        both = tl.permute(tl.join(pairs & 15, pairs >> 4), (0, 2, 1))
        wide = tl.reshape(both, (N, D_PAD // 32, 32)).to(tl.float32)
        at = page * (page_bytes // 2) + P * (D // 2) + row * (D // 16)
        step = tl.load(numbers + at[:, None] + 2 * group[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
        least = tl.load(numbers + at[:, None] + 2 * group[None, :] + 1, mask=mask[:, None], other=0.0).to(tl.float32)
        return tl.reshape(wide * step[:, :, None] + least[:, :, None], (N, D_PAD))
    else:
        d = tl.arange(0, D_PAD)
        inside = mask[:, None] & (d[None, :] < D)
        start = page * page_bytes + row * D
        if CODEC == "fp8":
            wide = tl.load(codes + start[:, None] + d[None, :], mask=inside).to(tl.float32)
        else:
            wide = tl.load(codes + start[:, None] + d[None, :], mask=inside, other=0).to(tl.float32)
        scale = tl.load(numbers + page * (page_bytes // 2) + P * D + row, mask=mask, other=0.0).to(tl.float32)
        return tl.where(inside, wide * scale[:, None], 0.0)


@triton.jit
def load_codes(
    codes, numbers, page, row, mask, page_bytes, dtype: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Codes of int8 or fp8 as they are, [N, D_PAD] of `dtype`, which holds them exactly, and their scales [N] float32.

    A product with codes can be scaled afterwards, which takes a fraction of the arithmetic of scaling every element.
    """
    d = tl.arange(0, D_PAD)
    # As bytes, since what is masked has no value in fp8.
    at = (codes + (page * page_bytes + row * D)[:, None] + d[None, :]).to(tl.pointer_type(tl.uint8), bitcast=True)
    wide = tl.load(at, mask=mask[:, None] & (d[None, :] < D), other=0).to(codes.dtype.element_ty, bitcast=True)
    scale = tl.load(numbers + page * (page_bytes // 2) + P * D + row, mask=mask, other=0.0).to(tl.float32)
    return wide.to(dtype), scale


@triton.jit
def store_coded(
    codes, numbers, page, row, mask, rows, page_bytes,
    N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, P: tl.constexpr, CODEC: tl.constexpr,
):  # fmt: skip
    """Code `rows` [N, D_PAD], zero beyond D, and put them into rows [N] of pages [N]; the inverse of `load_coded`."""
    if CODEC == "int4":
        byte, group = tl.arange(0, D_PAD // 2), tl.arange(0, D_PAD // 32)
        wide, step, least = _int4(rows, N, D_PAD)
        both = tl.permute(tl.reshape(wide.to(tl.uint8), (N, 2, D_PAD // 2)), (0, 2, 1))
        low, high = tl.split(both)
        start = page * page_bytes + row * (D // 2)
        tl.store(codes + start[:, None] + byte[None, :], low | (high << 4), mask=mask[:, None])
        at = page * (page_bytes // 2) + P * (D // 2) + row * (D // 16)
        tl.store(numbers + at[:, None] + 2 * group[None, :], step, mask=mask[:, None])
        tl.store(numbers + at[:, None] + 2 * group[None, :] + 1, least, mask=mask[:, None])
    else:
        d = tl.arange(0, D_PAD)
        wide, scale = _scaled(rows, CODEC)
        start = page * page_bytes + row * D
        inside = mask[:, None] & (d[None, :] < D)
        tl.store(codes + start[:, None] + d[None, :], wide.to(codes.dtype.element_ty), mask=inside)
        tl.store(numbers + page * (page_bytes // 2) + P * D + row, scale, mask=mask)


@triton.jit
def rounded(rows, N: tl.constexpr, D_PAD: tl.constexpr, CODEC: tl.constexpr):
    """What is left of rows [N, D_PAD] once they are coded, in their own type."""
    if CODEC == "":
        return rows
    else:
        if CODEC == "int4":
            wide, step, least = _int4(rows, N, D_PAD)
            left = wide * step.to(tl.float32)[:, :, None] + least.to(tl.float32)[:, :, None]
            return tl.reshape(left, (N, D_PAD)).to(rows.dtype)
        else:
            wide, scale = _scaled(rows, CODEC)
            if CODEC == "fp8":
                wide = wide.to(tl.float8e4nv).to(tl.float32)
            return (wide * scale.to(tl.float32)[:, None]).to(rows.dtype)


@triton.jit
def _scaled(rows, CODEC: tl.constexpr):
    """int8's codes as float32, or what fp8 rounds; and scales [N] float16."""
    rows = rows.to(tl.float32)
    most = tl.max(tl.abs(rows), 1)
    if CODEC == "fp8":
        scale = tl.maximum(tl.div_rn(most, most * 0 + _FP8_MAX), _TINY).to(tl.float16)
        wide = tl.div_rn(rows, rows * 0 + scale.to(tl.float32)[:, None])
        return tl.clamp(wide, -_FP8_MAX, _FP8_MAX), scale
    else:
        scale = tl.maximum(tl.div_rn(most, most * 0 + 127.0), _TINY).to(tl.float16)
        wide = tl.div_rn(rows, rows * 0 + scale.to(tl.float32)[:, None])
        return tl.clamp(tl.floor(wide + 0.5), -127.0, 127.0), scale


@triton.jit
def _int4(rows, N: tl.constexpr, D_PAD: tl.constexpr):
    """Codes [N, D_PAD / 32, 32] as float32, and the steps and least values [N, D_PAD / 32] float16."""
    groups = tl.reshape(tl.clamp(rows.to(tl.float32), -_FLOAT16_MAX, _FLOAT16_MAX), (N, D_PAD // 32, 32))
    least = tl.min(groups, 2).to(tl.float16)
    above = tl.max(groups, 2) - least.to(tl.float32)
    step = tl.maximum(tl.div_rn(above, above * 0 + 15.0), _TINY).to(tl.float16)
    distance = groups - least.to(tl.float32)[:, :, None]
    wide = tl.div_rn(distance, distance * 0 + step.to(tl.float32)[:, :, None])
    return tl.clamp(tl.floor(wide + 0.5), 0.0, 15.0), step, least
