"""Eager twins in plain torch: the definition of every operator, written to be read.

Legend: B sequences, H query heads, Hkv KV heads, G = H / Hkv queries in a group, T tokens of the chunk, L keys,
D head size, w window, P pairs in a page, C = B * Hkv chains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spkv.ops.packed import PackedLayer


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention with an additive bias, minus infinity where a key is not seen.

    Shapes: query [B, H, T, D], key and value [B, Hkv, L, D], bias broadcastable to [B, Hkv, G, T, L], sinks [H]
    (a logit per head that takes probability and gives no value, as in GPT-OSS). A query that sees nothing gets 0.
    """
    B, H, T, D = query.shape
    Hkv = key.shape[1]
    grouped = query.reshape(B, Hkv, H // Hkv, T, D)
    # Half precision keeps its scores and its softmax in float32, as fused kernels do.
    accumulate = torch.promote_types(query.dtype, torch.float32)
    scores = (grouped.to(accumulate) @ key.to(accumulate).unsqueeze(2).transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores + bias.to(accumulate)
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.to(accumulate).view(1, Hkv, H // Hkv, 1, 1)
        top = torch.maximum(top, sinks)
    top = top.masked_fill(top == float("-inf"), 0.0).detach()
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - top).exp()
    weights = weights / total.clamp_min(torch.finfo(accumulate).tiny)
    return (weights.to(value.dtype) @ value.unsqueeze(2)).reshape(B, H, T, D)


def window_bias(
    query_index: Tensor,
    key_index: Tensor,
    log_gate: Tensor | None,
    window: int,
    same_segment: Tensor | None = None,
    sliding: bool = False,
) -> Tensor:
    """The bias of the method: 0 inside the window, the key's log-gate before it, minus infinity ahead of the query.

    With `sliding` it is minus infinity before the window, too.

    Shapes: query_index [T], key_index [L], log_gate [B, Hkv, L] or None (open), same_segment [B, T, L] or None;
    returns a tensor broadcastable to [B, Hkv, 1, T, L].
    """
    distance = query_index[:, None] - key_index[None, :]
    hidden = (distance < 0) | (distance >= window) if sliding else distance < 0
    if same_segment is not None:
        hidden = hidden | ~same_segment[:, None, None]
    if log_gate is None:
        bias = torch.zeros((), device=distance.device)
    else:
        # where() over a broadcast log-gate: its gradient is the sum over the queries past the window.
        bias = torch.where(distance < window, log_gate.new_zeros(()), log_gate[:, :, None, None, :])
    return torch.where(hidden, torch.full_like(bias, float("-inf")), bias)


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
) -> Tensor:
    """See `spkv.ops.attention.gated_attention`."""
    index = torch.arange(query.shape[2], device=query.device)
    same_segment = None if segment_ids is None else segment_ids[:, :, None] == segment_ids[:, None, :]
    bias = window_bias(index, index, log_gate, window, same_segment, sliding)
    return attend(query, key, value, bias, scale=scale, softcap=softcap, sinks=sinks)


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
) -> Tensor:
    """See `spkv.ops.attention.pruned_prefill`."""
    out = torch.zeros_like(query)
    for b in range(query.shape[0]):
        columns = valid_columns(valid, b, query.shape[2], query.device)
        if isinstance(columns, Tensor) and not columns.numel():
            continue
        recent_key, recent_value, recent_keep, ring_length = recent_pairs(
            past, b, key[b, :, columns], value[b, :, columns], keep[b, :, columns]
        )
        index = torch.arange(recent_key.shape[1], device=query.device)
        distance = index[ring_length:, None] - index
        near = (distance >= 0) & (distance < window)
        far_key, far_value = coded_rows(past, recent_key), coded_rows(past, recent_value)
        for h in range(key.shape[1]):
            group = slice(h * (query.shape[1] // key.shape[1]), (h + 1) * (query.shape[1] // key.shape[1]))
            old_key, old_value = kept_pairs(past, b, h, key, value)
            # Old pairs, which all queries see; recent ones past the window, if kept; recent ones inside it.
            visible = torch.cat(
                [near.new_ones(near.shape[0], old_key.shape[0]), (distance >= window) & recent_keep[h], near], 1
            )
            bias = torch.zeros(visible.shape, device=query.device).masked_fill_(~visible, float("-inf"))
            out[b, group][:, columns] = attend(
                query[b, group][:, columns].unsqueeze(0),
                torch.cat([old_key, far_key[h], recent_key[h]])[None, None],
                torch.cat([old_value, far_value[h], recent_value[h]])[None, None],
                bias,
                scale=scale,
                softcap=softcap,
                sinks=None if sinks is None else sinks[group],
            )[0]
    return out


def packed_decode(
    query: Tensor,
    packed: PackedLayer,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `spkv.ops.attention.packed_decode`. Pads every chain to the longest."""
    packed = packed.in_order()
    B, D = query.shape[0], query.shape[3]
    P, w = packed.page_size, packed.window
    kept_pages = -(-int(packed.kept.max()) // P)
    ring = packed.pool[packed.table[:, : packed.ring_pages].long()]  # [C, ring pages, 2, P, D]
    kept_key, kept_value = read_kept(packed, packed.table[:, packed.ring_pages : packed.ring_pages + kept_pages])
    slot = torch.arange(packed.ring_pages * P, device=query.device)
    in_ring = slot < packed.seen.clamp_max(w).repeat_interleave(packed.kv_heads)[:, None]
    in_kept = torch.arange(kept_pages * P, device=query.device) < packed.kept[:, None]
    held = torch.cat([in_ring, in_kept], dim=1)  # [C, slots]
    # Slots that hold nothing may hold anything, NaN included; 0 * NaN would reach the output.
    key, value = (
        torch.cat([ring[:, :, half].flatten(1, 2), kept.flatten(1, 2).to(query.dtype)], dim=1)
        .masked_fill(~held[..., None], 0.0)
        .view(B, packed.kv_heads, -1, D)
        for half, kept in enumerate((kept_key, kept_value))
    )
    bias = torch.zeros(held.shape, device=query.device).masked_fill_(~held, float("-inf"))
    return attend(
        query,
        key,
        value,
        bias.view(B, packed.kv_heads, 1, 1, -1),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
    )


def pages_held_and_new(
    packed: PackedLayer, keep: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What writing `keep`'s tokens [B, Hkv, T] takes: pages that each ring [B] holds and newly needs, and pages that
    each chain's kept pairs [C] hold and newly need."""
    arriving = torch.full_like(packed.seen, keep.shape[2]) if valid is None else valid.sum(1).to(packed.seen)
    ring_held, ring_then = (
        -(-n.clamp_max(packed.window) // packed.page_size) for n in (packed.seen, packed.seen + arriving)
    )
    leaving = _count_leaving(packed, keep, valid, arriving)
    kept_held, kept_then = (-(-n // packed.page_size) for n in (packed.kept, packed.kept + leaving))
    return ring_held, ring_then - ring_held, kept_held, kept_then - kept_held


def count_pages(packed: PackedLayer, keep: Tensor, valid: Tensor | None = None) -> Tensor:
    """See `spkv.ops.attention.count_pages`."""
    _, ring_new, kept_held, kept_new = pages_held_and_new(packed, keep, valid)
    return torch.stack([ring_new.sum() * packed.kv_heads, kept_new.sum(), (kept_held + kept_new).max()]).int()


def _count_leaving(packed: PackedLayer, keep: Tensor, valid: Tensor | None, arriving: Tensor) -> Tensor:
    """[C] int64: kept pairs that leave the window of each chain when `arriving` [B] tokens arrive."""
    B, Hkv, T = keep.shape
    w, seen = packed.window, packed.seen
    # The j-th token to arrive claims the slot of position seen + j - w, if there ever was one.
    j = torch.arange(min(w, T), device=keep.device)
    claimed = (seen[:, None] + j) % w
    leaves = (j < arriving[:, None]) & (seen[:, None] + j >= w)
    ring_keep = packed.ring_keep.reshape(B, Hkv, w).gather(2, claimed.long()[:, None].expand(-1, Hkv, -1))
    count = (ring_keep & leaves[:, None]).sum(2)
    if w < T:
        nth = torch.arange(T, device=keep.device) if valid is None else valid.cumsum(1) - 1
        passes = (nth < arriving[:, None] - w) if valid is None else valid & (nth < arriving[:, None] - w)
        count += (keep & passes[:, None]).sum(2)
    return count.flatten()


def write(packed: PackedLayer, key: Tensor, value: Tensor, keep: Tensor, valid: Tensor | None = None) -> None:
    """See `spkv.ops.attention.write`."""
    packed, room = packed.in_order(), None
    if packed.free is not None:
        enters, room = _hand_out(packed, keep, valid)
        if not enters.all():
            valid = enters[:, None].expand(-1, key.shape[2]) if valid is None else valid & enters[:, None]
    if key.shape[2] == 1 and valid is None:
        _write_token(packed, key.flatten(0, 1)[:, 0], value.flatten(0, 1)[:, 0], keep.flatten(), room)
        return
    for b in range(key.shape[0]):
        columns = valid_columns(valid, b, key.shape[2], key.device)
        _write_chunk(packed, b, key[b, :, columns], value[b, :, columns], keep[b, :, columns], room)


def _hand_out(packed: PackedLayer, keep: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Put the pages into the table that writing these tokens needs, first those of all rings, then the kept ones.

    Returns [B] bool, the sequences whose rings have all their pages, and [C] int64, the kept pairs that each chain has
    pages for.
    """
    Hkv = packed.kv_heads
    ring_held, ring_new, kept_held, kept_new = pages_held_and_new(packed, keep, valid)
    ring_count = ring_new.repeat_interleave(Hkv)
    columns = ring_held.repeat_interleave(Hkv), packed.ring_pages + kept_held
    ring_granted = _grant(packed.table, columns[0], ring_count, packed.free, packed.taken)
    kept_stack = (packed.free, packed.taken) if packed.coded is None else (packed.coded.free, packed.coded.taken)
    kept_granted = _grant(packed.table, columns[1], kept_new, *kept_stack)
    enters = (ring_granted == ring_count).view(-1, Hkv).all(1)
    return enters, (kept_held + kept_granted) * packed.page_size


def _grant(table: Tensor, column: Tensor, count: Tensor, free: Tensor | None, taken: Tensor | None) -> Tensor:
    """Enter `count` [C] pages of a stack into each chain's row from `column` [C] on; returns how many there were."""
    assert free is not None
    assert taken is not None
    count = count.long()
    first = taken.long() + count.cumsum(0) - count
    granted = (free.numel() - first).clamp_min(0).minimum(count)
    taken.add_(count.sum())
    row = torch.arange(count.numel(), device=count.device).repeat_interleave(granted)
    nth = torch.arange(row.shape[0], device=count.device) - (granted.cumsum(0) - granted)[row]
    table[row, column.long()[row] + nth] = free[first[row] + nth]
    return granted


def _write_token(packed: PackedLayer, key: Tensor, value: Tensor, keep: Tensor, room: Tensor | None) -> None:
    """One token a sequence: key and value [C, D], keep [C]."""
    P, Hkv = packed.page_size, packed.kv_heads
    chain = torch.arange(packed.kept.shape[0], device=key.device)
    slot = (packed.seen % packed.window).repeat_interleave(Hkv).long()
    page, offset = packed.table[chain, slot // P].long(), slot % P
    leaves = packed.ring_keep[chain, slot] & (packed.seen >= packed.window).repeat_interleave(Hkv)
    if room is not None:
        leaves = leaves & (packed.kept < room)
    append = leaves.nonzero()[:, 0]
    if append.numel():
        target = packed.kept[append].long()
        target_page = packed.table[append, packed.ring_pages + target // P].long()
        write_kept(packed, target_page, target % P, packed.pool[page[append], :, offset[append]])
        packed.kept[append] += 1
    packed.pool[page, 0, offset] = key
    packed.pool[page, 1, offset] = value
    packed.ring_keep[chain, slot] = keep
    packed.seen.add_(1)


def _write_chunk(
    packed: PackedLayer, b: int, key: Tensor, value: Tensor, keep: Tensor, room: Tensor | None = None
) -> None:
    """Any number of tokens of sequence b: key and value [Hkv, n, D], keep [Hkv, n]."""
    n, P, w, Hkv = key.shape[1], packed.page_size, packed.window, packed.kv_heads
    if n == 0:
        return
    seen = int(packed.seen[b])
    chains = slice(b * Hkv, (b + 1) * Hkv)
    table, kept = packed.table[chains].long(), packed.kept[chains]
    recent_key, recent_value, recent_keep, ring_length = recent_pairs(packed, b, key, value, keep)
    leaving = max(0, ring_length + n - w)

    # Append what leaves the window and is kept, before its ring slot is reused.
    leaves = recent_keep[:, :leaving]
    if room is not None:
        leaves = leaves & (kept[:, None] + leaves.cumsum(1) <= room[chains, None])
    head, position = leaves.nonzero(as_tuple=True)
    rank = leaves.cumsum(1)[head, position] - 1
    target = kept[head].long() + rank
    target_page = table[head, packed.ring_pages + target // P]
    pairs = torch.stack([recent_key[head, position], recent_value[head, position]], dim=1)
    write_kept(packed, target_page, target % P, pairs)
    kept += leaves.sum(1).to(kept.dtype)

    # The ring takes the tokens of this chunk that are still in the window.
    first = max(0, n - w)
    slot = torch.arange(seen + first, seen + n, device=key.device) % w
    page = table[:, slot // P]
    packed.pool[page, 0, slot % P] = key[:, first:]
    packed.pool[page, 1, slot % P] = value[:, first:]
    packed.ring_keep[chains, slot] = keep[:, first:]
    packed.seen[b] = seen + n


def valid_columns(valid: Tensor | None, b: int, tokens: int, device: torch.device) -> slice | Tensor:
    """Columns of a chunk that hold tokens of sequence b: all, or the indices where `valid` [B, T] is set."""
    return slice(0, tokens) if valid is None else valid[b].nonzero()[:, 0].to(device)


def ring_pairs(packed: PackedLayer, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [Hkv, r, D] and keep bits [Hkv, r] of sequence b's window, oldest first; r = min(seen, w)."""
    P, w, Hkv = packed.page_size, packed.window, packed.kv_heads
    seen = int(packed.seen[b])
    slot = torch.arange(max(0, seen - w), seen, device=packed.pool.device) % w
    chains = slice(b * Hkv, (b + 1) * Hkv)
    pairs = packed.pool[packed.table[chains].long()[:, slot // P], :, slot % P]  # [Hkv, r, 2, D]
    return pairs[:, :, 0], pairs[:, :, 1], packed.ring_keep[chains][:, slot]


def recent_pairs(
    past: PackedLayer | None, b: int, key: Tensor, value: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Put sequence b's window before its new tokens; returns keys, values, keep bits and the window's length."""
    if past is None:
        return key, value, keep, 0
    ring_key, ring_value, ring_keep = ring_pairs(past, b)
    return (
        torch.cat([ring_key, key], dim=1),
        torch.cat([ring_value, value], dim=1),
        torch.cat([ring_keep, keep], dim=1),
        ring_key.shape[1],
    )


def kept_pairs(past: PackedLayer | None, b: int, h: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [kept, D] in the kept pages of one chain; `key` and `value` give dtype and head size."""
    if past is None:
        return key.new_empty(0, key.shape[-1]), value.new_empty(0, value.shape[-1])
    chain, P = b * past.kv_heads + h, past.page_size
    kept = int(past.kept[chain])
    pages = past.table[chain, past.ring_pages : past.ring_pages + -(-kept // P)].long()
    old_key, old_value = read_kept(past, pages)
    return old_key.flatten(0, 1)[:kept].to(key.dtype), old_value.flatten(0, 1)[:kept].to(value.dtype)


def read_kept(packed: PackedLayer, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [..., P, D] of kept pages [...]; in float32 where they are coded."""
    pages = pages.long()
    if packed.coded is None:
        # Indexing each half apart gives contiguous copies, and reads each byte once.
        return packed.pool[:, 0][pages], packed.pool[:, 1][pages]
    codes, scales = packed.coded.rows(packed.page_size, packed.pool.shape[-1])
    key, value = (packed.coded.codec.decode(codes[:, half][pages], scales[:, half][pages]) for half in range(2))
    return key, value


def write_kept(packed: PackedLayer, page: Tensor, offset: Tensor, pairs: Tensor) -> None:
    """Put pairs [n, 2, D] into kept pages [n] at offsets [n]."""
    if packed.coded is None:
        packed.pool[page, :, offset] = pairs
        return
    codes, scales = packed.coded.rows(packed.page_size, packed.pool.shape[-1])
    codes[page, :, offset], scales[page, :, offset] = packed.coded.codec.encode(pairs)


def coded_rows(past: PackedLayer | None, rows: Tensor) -> Tensor:
    """What queries past the window see of rows [..., D]: themselves, or what their codes say."""
    return rows if past is None or past.coded is None else past.coded.codec.round(rows)
