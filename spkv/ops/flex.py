"""FlexAttention implementations (CUDA).

Block masks are built from block summaries, not by evaluating the mask at every pair of positions: the cost is that
of a few small tensors. Legend as in `reference.py`; a block is 128 queries or keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from spkv.ops import reference
from spkv.ops.packed import PackedLayer

_BLOCK = 128
# Positions of far keys that every query sees, and of padding that none does.
_ALWAYS, _NEVER = -(2**30), 2**30


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
    sliding: bool = False,  # refused by the dispatcher
) -> Tensor:
    """See `spkv.ops.attention.gated_attention`."""
    # Dense in memory: the gate's gradient is summed by atomic additions, and those of neighbouring heads should not
    # meet in one cache line, where the predictor's own layout puts them.
    log_gate = None if log_gate is None else log_gate.contiguous()
    group = query.shape[1] // key.shape[1]

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if log_gate is not None:
            score = torch.where(q - k < window, score, score + log_gate[b, h // group, k])
        return score

    block_mask = _causal_block_mask(query.shape[2], segment_ids, query.device)
    out, log_sum = _flex(query, key, value, score_mod, block_mask, scale)
    return _with_sinks(out, log_sum, sinks)


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

    Keys are [far | near]: `far` the kept pairs of each head, compacted and in order, that queries see once they are
    past the window; `near` the recent pairs, that queries see within it.
    """
    options: dict[str, Any] = dict(window=window, scale=scale, softcap=softcap, sinks=sinks)
    ring_lengths = [] if past is None else past.seen.clamp_max(window).tolist()
    if valid is None and len(set(ring_lengths)) <= 1:
        return _prefill(query, key, value, keep, past, range(query.shape[0]), **options)
    out = torch.zeros_like(query)
    for b in range(query.shape[0]):
        columns = reference.valid_columns(valid, b, query.shape[2], query.device)
        if isinstance(columns, slice) or columns.numel():
            q, k, v, bits = (tensor[b, :, columns].unsqueeze(0) for tensor in (query, key, value, keep))
            out[b, :, columns] = _prefill(q, k, v, bits, past, range(b, b + 1), **options)[0]
    return out


def _prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    past: PackedLayer | None,
    sequences: range,
    *,
    window: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Prefill of sequences without padding and with rings of one length."""
    B, H, T, _ = query.shape
    Hkv, group = key.shape[1], H // key.shape[1]
    recent = [reference.recent_pairs(past, b, key[i], value[i], keep[i]) for i, b in enumerate(sequences)]
    ring_length = recent[0][3]
    near_key, near_value, near_keep = (
        torch.stack(part) for part in ([r[0] for r in recent], [r[1] for r in recent], [r[2] for r in recent])
    )

    far_key, far_value, far_position = [], [], []
    for i, b in enumerate(sequences):
        for h in range(Hkv):
            old_key, old_value = reference.kept_pairs(past, b, h, key, value)
            index = near_keep[i, h].nonzero()[:, 0]
            far_key.append(torch.cat([old_key, near_key[i, h, index]]))
            far_value.append(torch.cat([old_value, near_value[i, h, index]]))
            far_position.append(torch.cat([index.new_full((old_key.shape[0],), _ALWAYS), index]))
    # Whole blocks of far keys, so that near keys start on a block.
    far = -(-max(p.numel() for p in far_position) // _BLOCK) * _BLOCK
    position = torch.stack([F.pad(p, (0, far - p.numel()), value=_NEVER) for p in far_position])
    position = position.view(B, Hkv, far).repeat_interleave(group, dim=1).to(torch.int32)
    keys = torch.cat([_pad_stack(far_key, far).view(B, Hkv, far, -1), near_key], dim=2)
    values = torch.cat([_pad_stack(far_value, far).view(B, Hkv, far, -1), near_value], dim=2)

    # Tensors, not ints: a compiled mask would be recompiled for every new number.
    far_end = torch.tensor(far, device=query.device)
    offset = torch.tensor(ring_length, device=query.device)
    padded_position = F.pad(position, (0, near_key.shape[2]), value=_NEVER)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = q + offset - (k - far_end)
        near = (k >= far_end) & (distance >= 0) & (distance < window)
        return near | (padded_position[b, h, k] <= q + offset - window)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    first = torch.arange(0, T, _BLOCK, device=query.device) + ring_length  # recent index of each query block's first
    last = (first + _BLOCK - 1).clamp_max(ring_length + T - 1)
    far_blocks = position.view(B, H, far // _BLOCK, _BLOCK)
    far_some = far_blocks[:, :, None, :, 0] <= (last - window)[:, None]
    far_full = far_blocks[:, :, None, :, -1] <= (first - window)[:, None]
    near_first = torch.arange(0, near_key.shape[2], _BLOCK, device=query.device)
    near_some = (near_first <= last[:, None]) & (near_first + _BLOCK - 1 > (first - window)[:, None])
    near_some = near_some.expand(B, H, -1, -1)
    block_mask = _block_mask(
        partial=torch.cat([far_some & ~far_full, near_some], dim=-1),
        full=torch.cat([far_full, torch.zeros_like(near_some)], dim=-1),
        mask_mod=mask_mod,
        lengths=(T, keys.shape[2]),
    )
    out, log_sum = _flex(query, keys, values, score_mod if softcap is not None else None, block_mask, scale)
    return _with_sinks(out, log_sum, sinks)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None,
    block_mask: BlockMask,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run FlexAttention; returns the output [B, H, T, D] and the log-sums [B, H, T] of its softmax, float32."""
    return _compiled_flex_attention()(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_lse=True,
    )


def _with_sinks(out: Tensor, log_sum: Tensor, sinks: Tensor | None) -> Tensor:
    """A sink adds exp(sink) to the softmax's denominator and nothing to its numerator."""
    if sinks is None:
        return out
    return out * torch.sigmoid(log_sum - sinks.to(log_sum.dtype)[:, None]).unsqueeze(-1).to(out.dtype)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _causal_block_mask(tokens: int, segment_ids: Tensor | None, device: torch.device) -> BlockMask:
    """Causal, within segments. Segment ids need not be sorted: blocks are told apart by their range of ids."""
    blocks = -(-tokens // _BLOCK)
    index = torch.arange(blocks, device=device)
    some = (index[:, None] >= index)[None, None]
    full = (index[:, None] > index)[None, None]
    if segment_ids is None:
        return _block_mask(some & ~full, full, lambda b, h, q, k: q >= k, (tokens, tokens))

    # Repeating the last id fills the last block and leaves its range as it is.
    padded = torch.cat([segment_ids, segment_ids[:, -1:].expand(-1, blocks * _BLOCK - tokens)], dim=1)
    low, high = padded.view(-1, blocks, _BLOCK).aminmax(dim=-1)
    overlap = (low[:, :, None] <= high[:, None]) & (high[:, :, None] >= low[:, None])
    same = (low[:, :, None] == high[:, None]) & (high[:, :, None] == low[:, None])
    some, full = some & overlap[:, None], full & same[:, None]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (segment_ids[b, q] == segment_ids[b, k])

    return _block_mask(some & ~full, full, mask_mod, (tokens, tokens))


def _block_mask(partial: Tensor, full: Tensor, mask_mod: Callable[..., Tensor], lengths: tuple[int, int]) -> BlockMask:
    """Make a BlockMask from bools [B or 1, H or 1, query blocks, key blocks]: partly and fully visible blocks."""

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        # A stable sort puts the visible blocks first, in order.
        order = blocks.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
        return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)

    return BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=_BLOCK, mask_mod=mask_mod, seq_lengths=lengths
    )


def _pad_stack(tensors: list[Tensor], length: int) -> Tensor:
    """Stack [n, D] tensors to [N, length, D], with zeros behind."""
    return torch.stack([F.pad(t, (0, 0, 0, length - t.shape[0])) for t in tensors])
