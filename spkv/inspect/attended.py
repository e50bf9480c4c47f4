"""Where a token is attended to once it has left the window: the strongest later queries of every head.

Legend: H query heads, Hkv KV heads, G = H / Hkv queries in a group, C tokens of a chunk, S tokens so far, D head
size, w window, K queries remembered for each key, N keys that a block of queries may see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STRONGEST = 3
_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class LaterQueries:
    """For every key, the queries past the window that gave it most weight, strongest first.

    Attributes:
        positions: [layers, Hkv, T, K] int32, the queries' positions; -1 where there are fewer, as for a dropped pair.
        weights: [layers, Hkv, T, K] float32, attention weights, of the strongest query head of the group.
    """

    positions: Tensor
    weights: Tensor


class LaterQueryFinder:
    """An observer (`Attachment.observing`) of one text that is read in chunks.

    Attention is computed a second time, for blocks of queries and the keys that they see, so that memory stays
    bounded: the keys of the text, K entries a key, and one block of scores.

    Args:
        window: w.
        strongest: K.
        block_bytes: of the scores computed at once.
    """

    def __init__(self, window: int, strongest: int = STRONGEST, block_bytes: int = _BLOCK_BYTES):
        self.window, self.strongest, self.block_bytes = window, strongest, block_bytes
        self._layers: dict[int, _Seen] = {}

    @torch.no_grad()
    def __call__(self, layer: int, query: Tensor, key: Tensor, keep: Tensor, **options: Any) -> None:
        if query.shape[0] != 1:
            raise ValueError(f"one text is followed at a time, not {query.shape[0]}")
        seen = self._layers.setdefault(layer, _Seen(key, self.strongest))
        start = seen.key.shape[1]
        seen.extend(key[0], keep[0])
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        sinks = options.get("sinks")
        for head in range(heads):
            mine = slice(head * groups, (head + 1) * groups)
            kept = seen.keep[head].nonzero()[:, 0]
            own = {**options, "sinks": None if sinks is None else sinks[mine]}
            done = 0
            while done < query.shape[2]:
                first = start + done
                # Keys that are past the window of every query in the block matter only if they are kept.
                past = kept[kept <= first - self.window]
                row_bytes = 4 * groups * (past.numel() + self.window + 1)
                size = min(query.shape[2] - done, max(1, self.block_bytes // row_bytes), max(self.window, 64))
                near = torch.arange(max(0, first - self.window + 1), first + size, device=key.device)
                self._block(seen, head, query[0, mine, done : done + size], first, torch.cat([past, near]), own)
                done += size

    def _block(self, seen: _Seen, head: int, query: Tensor, first: int, index: Tensor, options: dict[str, Any]) -> None:
        """Attend from query [G, C, D] at positions from `first` on to the keys at index [N], and note the strongest."""
        position = torch.arange(first, first + query.shape[1], device=index.device)
        distance = position[:, None] - index  # [C, N]
        past = distance >= self.window
        visible = (distance >= 0) & (~past | seen.keep[head, index])
        scores = _log_weights(query, seen.key[head, index], visible, **options).amax(0)
        scores = scores.masked_fill_(~past, float("-inf"))
        # Few keys find a new strongest query in a block; the others need no sorting.
        better = scores.amax(0).exp() > seen.weights[head, index, -1]
        index, scores = index[better], scores[:, better].T.contiguous()
        best, order = scores.topk(min(self.strongest, scores.shape[1]), dim=1)  # [N, K]
        weights = torch.cat([seen.weights[head, index], best.exp()], dim=1)
        positions = torch.cat([seen.positions[head, index], position[order].int()], dim=1)
        seen.weights[head, index], order = weights.topk(self.strongest, dim=1)
        seen.positions[head, index] = positions.gather(1, order)

    def result(self) -> LaterQueries:
        """What was found, layers in the model's order."""
        layers = [self._layers[layer] for layer in sorted(self._layers)]
        weights = torch.stack([layer.weights.cpu() for layer in layers])
        positions = torch.stack([layer.positions.cpu() for layer in layers])
        return LaterQueries(positions.masked_fill(weights == 0, -1), weights)


class _Seen:
    """What is known of a layer so far: key [Hkv, S, D], keep [Hkv, S], weights and positions [Hkv, S, K]."""

    def __init__(self, key: Tensor, strongest: int):
        heads, size = key.shape[1], key.shape[3]
        self.key = key.new_empty(heads, 0, size)
        self.keep = torch.empty(heads, 0, dtype=torch.bool, device=key.device)
        self.weights = torch.empty(heads, 0, strongest, device=key.device)
        self.positions = torch.empty(heads, 0, strongest, dtype=torch.int32, device=key.device)

    def extend(self, key: Tensor, keep: Tensor) -> None:
        self.key = torch.cat([self.key, key], dim=1)
        self.keep = torch.cat([self.keep, keep], dim=1)
        more = (*keep.shape, self.weights.shape[2])
        self.weights = torch.cat([self.weights, self.weights.new_zeros(more)], dim=1)
        self.positions = torch.cat([self.positions, self.positions.new_zeros(more)], dim=1)


def _log_weights(
    query: Tensor,
    key: Tensor,
    visible: Tensor,
    *,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Logarithms [G, C, N] of the attention weights of query [G, C, D] and key [N, D], as the operators define them."""
    assert scale is not None  # transformers' attentions always say
    scores = (query.float() * scale) @ key.float().T
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores.masked_fill_(~visible, float("-inf"))
    total = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.float().view(-1, 1, 1))
    return scores.sub_(total)
