"""Blockwise implementations on `scaled_dot_product_attention`: what CPUs run, with cost that follows density.

Legend as in `reference.py`. Soft-capping and attention sinks, which SDPA lacks, use the eager `attend` per block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spkv.ops import reference
from spkv.ops.packed import PackedLayer

# Queries in a block. Larger blocks waste work on the causal edge of the local part, smaller ones on launches.
_BLOCK = 256


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
    """See `spkv.ops.attention.gated_attention`: blocks of queries against all keys before them, or a window of them."""
    index = torch.arange(query.shape[2], device=query.device)
    blocks = []
    for start in range(0, query.shape[2], _BLOCK):
        stop = min(start + _BLOCK, query.shape[2])
        first = max(0, start + 1 - window) if sliding else 0
        same_segment = None
        if segment_ids is not None:
            same_segment = segment_ids[:, start:stop, None] == segment_ids[:, None, first:stop]
        bias = reference.window_bias(
            index[start:stop],
            index[first:stop],
            None if log_gate is None else log_gate[:, :, first:stop],
            window,
            same_segment,
            sliding,
        )
        blocks.append(
            _attend(
                query[:, :, start:stop],
                key[:, :, first:stop],
                value[:, :, first:stop],
                bias,
                scale=scale,
                softcap=softcap,
                sinks=sinks,
            )
        )
    return torch.cat(blocks, dim=2)


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
    """See `spkv.ops.attention.pruned_prefill`.

    A block of queries sees three runs of keys: the chain, the kept pairs of the chunk that are past the window of
    the whole block (both without a mask), and the pairs near the block (masked). Only the last is of fixed cost.
    """
    out = torch.zeros_like(query)
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        columns = reference.valid_columns(valid, b, query.shape[2], query.device)
        recent_key, recent_value, recent_keep, ring_length = reference.recent_pairs(
            past, b, key[b, :, columns], value[b, :, columns], keep[b, :, columns]
        )
        queries = query[b][:, columns]
        result = torch.empty_like(queries)
        for h in range(key.shape[1]):
            heads = slice(h * group, (h + 1) * group)
            old_key, old_value = reference.kept_pairs(past, b, h, key, value)
            kept_index = recent_keep[h].nonzero()[:, 0]
            kept_key = torch.cat([old_key, reference.coded_rows(past, recent_key[h, kept_index])])
            kept_value = torch.cat([old_value, reference.coded_rows(past, recent_value[h, kept_index])])
            kept_before = torch.cat([recent_keep.new_zeros(1, dtype=torch.long), recent_keep[h].cumsum(0)]).tolist()
            for start in range(0, queries.shape[1], _BLOCK):
                stop = min(start + _BLOCK, queries.shape[1])
                near = max(0, ring_length + start - window + 1)  # oldest pair in the first query's window
                past_last = max(near, ring_length + stop - window)  # oldest pair in the last query's window
                full, far = (old_key.shape[0] + kept_before[n] for n in (near, past_last))
                result[heads, start:stop] = _attend(
                    queries[None, heads, start:stop],
                    torch.cat([kept_key[:far], recent_key[h, near : ring_length + stop]])[None, None],
                    torch.cat([kept_value[:far], recent_value[h, near : ring_length + stop]])[None, None],
                    _block_mask(
                        kept_index[kept_before[near] : kept_before[past_last]],
                        torch.arange(near, ring_length + stop, device=query.device),
                        torch.arange(ring_length + start, ring_length + stop, device=query.device),
                        full,
                        window,
                    ),
                    scale=scale,
                    softcap=softcap,
                    sinks=None if sinks is None else sinks[heads],
                )[0]
        out[b][:, columns] = result
    return out


def packed_decode(
    query: Tensor,
    packed: PackedLayer,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `spkv.ops.attention.packed_decode`: one chain after the other, each at its own length."""
    packed = packed.in_order()
    B, H, _, D = query.shape
    Hkv, P, ring_pages = packed.kv_heads, packed.page_size, packed.ring_pages
    grouped = query.reshape(B * Hkv, H // Hkv, D)
    accumulate = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros_like(grouped)
    seen, kept = packed.seen.tolist(), packed.kept.tolist()
    for c in range(B * Hkv):
        held = min(seen[c // Hkv], packed.window)
        if held == 0:
            continue
        pages = packed.table[c, : ring_pages + -(-kept[c] // P)]
        if packed.coded is None and held == ring_pages * P:  # one list, without holes
            key, value = (
                packed.pool[:, half].index_select(0, pages).flatten(0, 1)[: held + kept[c]] for half in range(2)
            )
        else:
            old_pairs = reference.read_kept(packed, pages[ring_pages:])
            key, value = (
                torch.cat([ring.flatten(0, 1)[:held], old.flatten(0, 1)[: kept[c]].to(query.dtype)])
                for ring, old in zip(packed.pool[pages[:ring_pages].long()].unbind(1), old_pairs, strict=True)
            )
        if softcap is not None or sinks is not None:
            heads = slice(c % Hkv * (H // Hkv), (c % Hkv + 1) * (H // Hkv))
            out[c] = reference.attend(
                grouped[c][None, :, None],
                key[None, None],
                value[None, None],
                key.new_zeros(()),
                scale=scale,
                softcap=softcap,
                sinks=None if sinks is None else sinks[heads],
            )[0, :, 0]
        else:
            # Half precision keeps its scores in float32, as `reference.attend` does.
            weights = (grouped[c].to(accumulate) @ key.to(accumulate).T * scale).softmax(-1)
            out[c] = weights.to(value.dtype) @ value
    return out.view(B, H, 1, D)


def _block_mask(edge: Tensor, near: Tensor, queries: Tensor, full: int, window: int) -> Tensor:
    """Bool [queries, full + edge + near]: what each query of a block sees.

    The first `full` kept pairs lie before all its windows, those at indices `edge` before some of them, and the pairs
    at indices `near` count while they are inside.
    """
    every = torch.ones(queries.numel(), full, dtype=torch.bool, device=queries.device)
    distance = queries[:, None] - near
    return torch.cat([every, queries[:, None] - edge >= window, (distance >= 0) & (distance < window)], dim=1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`reference.attend` through SDPA where SDPA can; `bias` may be boolean (True where seen)."""
    if softcap is not None or sinks is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, device=bias.device).masked_fill_(~bias, float("-inf"))
        return reference.attend(query, key, value, bias, scale=scale, softcap=softcap, sinks=sinks)
    B, H, T, D = query.shape
    Hkv = key.shape[1]
    grouped = query.reshape(B * Hkv, H // Hkv, T, D)
    if bias.dtype != torch.bool:
        bias = bias.to(query.dtype)
        if bias.dim() == 5:
            bias = bias.expand(B, Hkv, -1, -1, -1).flatten(0, 1)
    # Expanding, not repeating: the group's heads read one copy of the keys.
    key = key.flatten(0, 1).unsqueeze(1).expand(-1, H // Hkv, -1, -1)
    value = value.flatten(0, 1).unsqueeze(1).expand(-1, H // Hkv, -1, -1)
    return F.scaled_dot_product_attention(grouped, key, value, attn_mask=bias, scale=scale).view(B, H, T, D)
