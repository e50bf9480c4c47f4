"""The oracle: a cache that keeps every pair and masks. Same interface as the packed cache, none of its savings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spkv.ops.reference import attend, window_bias


class DenseCache:
    """Holds all keys, values and keep bits of every layer; attention applies the definition as a mask.

    Takes no padding: one call per sequence, or batches of equal lengths.
    """

    def __init__(self, layers: int, window: int):
        self.window = window
        self._pairs: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * layers

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, keep: Tensor, *, scale: float, **options: Any
    ) -> Tensor:
        """As `PackedCache.attend`: append, then attend to `{s <= t : t - s < w or kept}`."""
        old = self._pairs[layer]
        if old is not None:
            old_key, old_value, old_keep = old
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
            keep = torch.cat([old_keep, keep], dim=2)
        self._pairs[layer] = key, value, keep
        index = torch.arange(key.shape[2], device=key.device)
        log_gate = torch.zeros(keep.shape, device=key.device).masked_fill_(~keep, float("-inf"))
        bias = window_bias(index[index.numel() - query.shape[2] :], index, log_gate, self.window)
        return attend(query, key, value, bias, scale=scale, **options)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(t.numel() * t.element_size() for pairs in self._pairs if pairs is not None for t in pairs)
