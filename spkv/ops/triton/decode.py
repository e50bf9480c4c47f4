"""Decoding in Triton: one token a sequence against all that its chains hold, at the speed of reading them once.

Legend: B sequences, H query heads, Hkv KV heads, G = H / Hkv queries of a chain, C = B * Hkv chains, P pairs in a
page, D head size, N slots in a tile, n programs; m, l, acc: maximum of the scores (base 2), sum of the weights and
weighted sum of the values, the state of an online softmax.

A chain's pairs are one list: entry i is slot i of the ring for i < min(seen, w), and the next slot of the kept pages
after that. (Coded pairs make a list of their own, so that a tile is coded or not.) All chains' lists, cut into tiles of
N entries, are one line of work; each of n programs takes an equal
piece of that line, wherever chains begin and end, so a dense chain is spread over many programs and a sparse one
fills the gap beside its neighbour. A program finds its piece from the lengths on the device: the grid follows from
shapes alone, nothing is planned on the host, and a captured CUDA graph stays right as lengths change.

Program p leaves its state for chain c at row p + c of the workspace. Along the line of work, p or c grows at each
step, so no two states share a row, and n + C - 1 rows suffice. A second kernel merges the rows of each chain in the
order of the programs: results do not change from run to run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spkv.ops.packed import PackedLayer
from spkv.ops.triton import coded
from spkv.ops.triton.coded import check_int4_tile, load_coded, load_codes
from spkv.ops.triton.launch import INTERPRETED, on_device_of, padded
from spkv.ops.triton.primitives import LOG2_E, dot, tanh


@dataclass(frozen=True)
class Tile:
    """How much one program reads at a time.

    Attributes:
        slots: N, a power of two of at least 16; of at least 32 for pages in int4.
        warps: warps of a program.
        stages: Triton's num_stages. Pairs are found through the page table, and Triton splits the stages over the
            two reads: 3 keep one tile in shared memory while the next is on its way, 5 two.
        programs_per_sm: programs that live on a multiprocessor side by side.
    """

    slots: int
    warps: int = 4
    stages: int = 3
    programs_per_sm: int = 2


# The kernel is bound by memory. To run at 3.35 TB/s an H100 needs about 2.5 MB on the way at any time (a read under
# load takes some 700 ns), 19 KB a multiprocessor. A tile of 128 slots is 64 KiB of keys and values at head size 128; of
# two programs on a multiprocessor one computes, merges or changes chains while the reads of the other are on the way.
# Measured at 128 with 32 to 128 slots, 4 and 8 warps, 3 to 7 stages and 1 to 4
# programs: all of the better ones lie within 3 % of each other (92 % of a copy's rate), and this is the best for few
# short chains, where launches cost the most.
_TILES = {  # by head size rounded up to a power of two, for 2-byte elements; 4-byte elements take half the slots
    16: Tile(128),  # only in tests
    32: Tile(128),
    64: Tile(128),
    128: Tile(128),
    256: Tile(64),
}
_MERGED = 32  # states that the merge reads at a time; a chain has about n / C
_SCANNED = 1024  # chains whose lengths a program reads at a time


def packed_decode(
    query: Tensor,
    packed: PackedLayer,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `spkv.ops.attention.packed_decode`."""
    tile = choose_tile(query, coded.name(packed))
    if query.is_cuda:
        programs = torch.cuda.get_device_properties(query.device).multi_processor_count * tile.programs_per_sm
    else:
        programs = 4
    return decode_with(query, packed, tile, programs, scale=scale, softcap=softcap, sinks=sinks)


def choose_tile(query: Tensor, page_codec: str = "") -> Tile:
    """The row of the table for a query's head size and dtype, and for the codec of pages, "" if they have none."""
    tile = _TILES[padded(query.shape[3])]
    # fp8 takes the most registers to decode. In a trial on an H200 (48 sequences of 32k, density 0.25, head size 128)
    # a tile of half the size made fp8 7 % faster, and int8 24 % and int4 28 % slower.
    smaller = (query.element_size() == 4) + (page_codec == "fp8" and query.shape[3] > 64)
    return dataclasses.replace(tile, slots=tile.slots >> smaller)


def decode_with(
    query: Tensor,
    packed: PackedLayer,
    tile: Tile,
    programs: int,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`packed_decode` with a given tile and number of programs, for tests and tuning."""
    B, H, _, D = query.shape
    C, Hkv, pool, table = packed.kept.shape[0], packed.kv_heads, packed.pool, packed.table
    G = H // Hkv
    if query.stride(3) != 1:
        query = query.contiguous()
    if sinks is not None:
        sinks = sinks.contiguous()
    out = torch.empty(B, H, 1, D, dtype=query.dtype, device=query.device)
    rows = programs + C - 1
    acc = torch.empty(rows, G, D, dtype=torch.float32, device=query.device)
    m, l = torch.empty(2, rows, G, dtype=torch.float32, device=query.device)  # noqa: E741
    span = torch.empty(C, 2, dtype=torch.int32, device=query.device)
    with on_device_of(query):
        _attend[(programs,)](
            query, pool, table, packed.rows, packed.seen, packed.kept, acc, m, l, span,
            C, packed.window, packed.ring_pages * packed.page_size, float(scale), float(softcap or 1.0),
            query.stride(0), query.stride(1), pool.stride(0), pool.stride(1), pool.stride(2), table.stride(0),
            *coded.operands(packed), CODEC=coded.name(packed),
            Hkv=Hkv, G=G, D=D, P=packed.page_size, N=tile.slots, M=max(16, triton.next_power_of_2(G)),
            D_PAD=padded(D), SCANNED=min(_SCANNED, triton.next_power_of_2(C)), SOFTCAP=softcap is not None,
            UPCAST=INTERPRETED, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        _merge[(C, G)](
            acc, m, l, span, packed.seen, packed.kept, sinks, out, C, packed.window,
            Hkv=Hkv, G=G, D=D, D_PAD=padded(D), MERGED=_MERGED, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _lengths(seen, kept, chain, C, window, Hkv: tl.constexpr):
    """Pairs in the ring of each chain, and pairs that it holds in all; 0 for chains from C on."""
    exists = chain < C
    ring = tl.minimum(tl.load(seen + chain // Hkv, mask=exists, other=0), window)
    return ring, ring + tl.load(kept + chain, mask=exists, other=0)


@triton.jit
def _tiles(ring, held, N: tl.constexpr, CODEC: tl.constexpr):
    """Tiles of chains that hold `ring` and in all `held` pairs."""
    if CODEC == "":
        return tl.cdiv(held, N)
    else:
        return tl.cdiv(ring, N) + tl.cdiv(held - ring, N)


@triton.jit
def _locate(
    tile, seen, kept, C, window, Hkv: tl.constexpr, N: tl.constexpr, SCANNED: tl.constexpr, CODEC: tl.constexpr
):
    """The chain that tile number `tile` of the line of work belongs to, and the number of that chain's first tile."""
    chain, first, before = 0, 0, 0
    for start in range(0, C, SCANNED):
        ring, held = _lengths(seen, kept, start + tl.arange(0, SCANNED), C, window, Hkv)
        tiles = _tiles(ring, held, N, CODEC)
        ends = before + tl.cumsum(tiles, 0)
        passed = ends <= tile  # never a chain from C on: its end is the line's
        chain += tl.sum(passed.to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(passed, ends, 0), 0))
        before += tl.sum(tiles, 0)
    return chain, first


@triton.jit
def _take(
    q, k, v, k_scale, v_scale, holds, m, total, acc, scale, softcap,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Take a tile of pairs [N, D_PAD] into the state of an online softmax. It holds one at least.

    SCALED: keys and values are to be multiplied by k_scale and v_scale [N]; else they are what they are.
    """
    s = dot(q, tl.trans(k), "ieee", UPCAST) * scale  # [M, N]
    if SCALED:
        s *= k_scale[None, :]
    if SOFTCAP:
        s = softcap * tanh(s / softcap)
    s = tl.where(holds[None, :], s * LOG2_E, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    fade = tl.exp2(m - m_new)
    total = total * fade + tl.sum(p, 1)
    if SCALED:
        # By each query's largest afterwards: the products of small weights and scales would underflow in float16.
        scaled = p * v_scale[None, :]
        largest = tl.max(scaled, 1)
        largest = tl.where(largest > 0, largest, 1.0)
        weighted = dot((scaled / largest[:, None]).to(v.dtype), v, "ieee", UPCAST) * largest[:, None]
    else:
        weighted = dot(p.to(v.dtype), v, "ieee", UPCAST)
    return m_new, total, acc * fade[:, None] + weighted


# Neither lengths nor the alignment of one layer's rows of a table may ask for a compilation of their own.
_VARYING = ("C", "window", "ring_slots", "query_stride_b", "table_stride")


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=("table", "rows", "seen", "kept"))
def _attend(
    query, pool, table, rows, seen, kept, acc_out, m_out, l_out, span,
    C, window, ring_slots, scale, softcap,
    query_stride_b, query_stride_h, pool_stride_page, pool_stride_half, pool_stride_slot, table_stride,
    codes, numbers, page_bytes, CODEC: tl.constexpr,
    Hkv: tl.constexpr, G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    D_PAD: tl.constexpr, SCANNED: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Each program: the online softmax of its piece of the line of work, one state for every chain it meets."""
    check_int4_tile(query.dtype.element_ty, N, CODEC)
    program, programs = tl.program_id(0), tl.num_programs(0)
    total = 0
    for start in range(0, C, SCANNED):
        ring, held = _lengths(seen, kept, start + tl.arange(0, SCANNED), C, window, Hkv)
        total += tl.sum(_tiles(ring, held, N, CODEC), 0)
    share = tl.cdiv(total, programs)
    begin = program * share
    left = tl.minimum(share, total - begin)  # tiles still to do; none, or fewer than none, past the end of the line
    chain, first = _locate(begin, seen, kept, C, window, Hkv, N, SCANNED, CODEC)
    tile = begin - first

    g, d, n = tl.arange(0, M), tl.arange(0, D_PAD), tl.arange(0, N)
    while left > 0:
        ring, held = _lengths(seen, kept, chain, C, window, Hkv)
        tiles = _tiles(ring, held, N, CODEC)
        stop = tl.minimum(tiles, tile + left)
        b, h = (chain // Hkv).to(tl.int64), chain % Hkv
        q = tl.load(
            query + b * query_stride_b + (h * G + g[:, None]) * query_stride_h + d[None, :],
            mask=(g[:, None] < G) & (d[None, :] < D),
            other=0.0,
        )  # [M, D_PAD]
        row = chain.to(tl.int64)
        if rows is not None:
            row = tl.load(rows + b).to(tl.int64) * Hkv + h
        chain_table = table + row * table_stride
        m = tl.full([M], float("-inf"), tl.float32)
        l = tl.zeros([M], tl.float32)  # noqa: E741
        acc = tl.zeros([M, D_PAD], tl.float32)
        first_coded = stop  # of the chain's tiles
        if CODEC != "":
            first_coded = tl.minimum(stop, tl.maximum(tile, tl.cdiv(ring, N)))
        for t in range(tile, first_coded):
            entry = t * N + n
            holds = entry < (held if CODEC == "" else ring)
            slot = tl.where(entry < ring, entry, entry - ring + ring_slots)
            page = tl.load(chain_table + slot // P, mask=holds, other=0).to(tl.int64)
            pair = pool + (page * pool_stride_page + (slot % P) * pool_stride_slot)[:, None] + d[None, :]
            # Slots that hold nothing may hold NaN: they are never read.
            mask = holds[:, None] & (d[None, :] < D)
            k = tl.load(pair, mask=mask, other=0.0)  # [N, D_PAD]
            v = tl.load(pair + pool_stride_half, mask=mask, other=0.0)
            m, l, acc = _take(q, k, v, None, None, holds, m, l, acc, scale, softcap, False, SOFTCAP, UPCAST)  # noqa: E741
        if CODEC != "":
            for t in range(first_coded, stop):
                entry = (t - tl.cdiv(ring, N)) * N + n
                holds = entry < held - ring
                page = tl.load(chain_table + (ring_slots + entry) // P, mask=holds, other=0).to(tl.int64)
                at = entry % P
                if CODEC == "int4":
                    k = load_coded(codes, numbers, page, at, holds, page_bytes, N, D, D_PAD, P, CODEC).to(q.dtype)
                    v = load_coded(codes, numbers, page, P + at, holds, page_bytes, N, D, D_PAD, P, CODEC).to(q.dtype)
                    k_scale, v_scale = None, None
                else:
                    k, k_scale = load_codes(codes, numbers, page, at, holds, page_bytes, q.dtype, D, D_PAD, P)
                    v, v_scale = load_codes(codes, numbers, page, P + at, holds, page_bytes, q.dtype, D, D_PAD, P)
                m, l, acc = _take(  # noqa: E741
                    q, k, v, k_scale, v_scale, holds, m, l, acc, scale, softcap, CODEC != "int4", SOFTCAP, UPCAST
                )
        row = (program + chain).to(tl.int64) * G + g
        tl.store(m_out + row, m, mask=g < G)
        tl.store(l_out + row, l, mask=g < G)
        tl.store(acc_out + row[:, None] * D + d[None, :], acc, mask=(g[:, None] < G) & (d[None, :] < D))
        # The merge wants to know the first and the last program of a chain.
        tl.store(span + chain * 2, program, mask=tile == 0)
        tl.store(span + chain * 2 + 1, program, mask=stop == tiles)
        left -= stop - tile
        chain += 1
        tile = 0


@triton.jit(do_not_specialize=("C", "window"), do_not_specialize_on_alignment=("seen", "kept"))
def _merge(
    acc_in, m_in, l_in, span, seen, kept, sinks, out, C, window,
    Hkv: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """One query of one chain: the states of its programs, merged by log-sum-exp, and the sink."""
    chain, g = tl.program_id(0), tl.program_id(1)
    _, held = _lengths(seen, kept, chain, C, window, Hkv)
    # An empty chain has no state and its span was never written.
    begin = tl.load(span + chain * 2, mask=held > 0, other=0)
    end = tl.load(span + chain * 2 + 1, mask=held > 0, other=-1) + 1
    d = tl.arange(0, D_PAD)
    m = tl.full([], float("-inf"), tl.float32)
    l = tl.zeros([], tl.float32)  # noqa: E741
    acc = tl.zeros([D_PAD], tl.float32)
    for start in range(begin, end, MERGED):
        program = start + tl.arange(0, MERGED)
        row = (program + chain).to(tl.int64) * G + g
        m_part = tl.load(m_in + row, mask=program < end, other=float("-inf"))
        l_part = tl.load(l_in + row, mask=program < end, other=0.0)
        inside = (program[:, None] < end) & (d[None, :] < D)
        acc_part = tl.load(acc_in + row[:, None] * D + d[None, :], mask=inside, other=0.0)
        m_new = tl.maximum(m, tl.max(m_part, 0))
        weight, fade = tl.exp2(m_part - m_new), tl.exp2(m - m_new)
        l = l * fade + tl.sum(weight * l_part, 0)  # noqa: E741
        acc = acc * fade + tl.sum(weight[:, None] * acc_part, 0)
        m = m_new
    h = (chain % Hkv) * G + g
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2_E
        # A sink far above every score would overflow as exp2(sink - m): scale to the larger of the two.
        top = tl.maximum(m, sink)
        top = tl.where(top == float("-inf"), 0.0, top)
        fade = tl.exp2(m - top)
        l = l * fade + tl.exp2(sink - top)  # noqa: E741
        acc = acc * fade
    value = acc / tl.where(l > 0, l, 1.0)
    query_row = (chain // Hkv).to(tl.int64) * (Hkv * G) + h
    tl.store(out + query_row * D + d, value.to(out.dtype.element_ty), mask=d < D)
