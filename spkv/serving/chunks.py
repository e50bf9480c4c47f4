"""Requests of a step that read several tokens each, side by side: padded, so that operators run once for all of them.

Legend: N requests, n tokens of all together, T tokens of the longest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Requests stand side by side while padding does not double their tokens, or while there are few all the same.
_MOST_PADDED, _FEW = 2.0, 256


@dataclass
class Chunks:
    """Adjacent requests of a step.

    Attributes:
        requests: which of the step's.
        tokens: which of the step's.
        lengths: [N] int32, tokens of each. None, as the next two, for a single request, which needs no padding.
        sources: [N, T], which of the tokens stands at each place; at padding, any.
        places: [n], where each token stands in the flattened [N, T].
    """

    requests: slice
    tokens: slice
    lengths: Tensor | None = None
    sources: Tensor | None = None
    places: Tensor | None = None

    def side_by_side(self, tensor: Tensor) -> Tensor:
        """[tokens of the step, heads, ...] -> [N, heads, T, ...]."""
        own = tensor[self.tokens]
        return (own[None] if self.sources is None else own[self.sources]).transpose(1, 2)

    def one_after_another(self, tensor: Tensor) -> Tensor:
        """[N, heads, T, ...] -> [n, heads, ...]."""
        own = tensor.transpose(1, 2)
        return own[0] if self.places is None else own.flatten(0, 1)[self.places]


def group(starts: Sequence[int], first: int, device: torch.device) -> Iterator[Chunks]:
    """Yield a step's requests from `first` on, in groups.

    Args:
        starts: where the tokens of each request begin, and where the last ends.
        first: request.
        device: for tensors.
    """
    while first < len(starts) - 1:
        last = first + 1
        while last < len(starts) - 1 and _fits(starts, first, last + 1):
            last += 1
        yield _make(starts, first, last, device)
        first = last


def _fits(starts: Sequence[int], first: int, last: int) -> bool:
    longest = max(end - start for start, end in itertools.pairwise(starts[first : last + 1]))
    padded, real = (last - first) * longest, starts[last] - starts[first]
    return padded <= max(_FEW, _MOST_PADDED * real)


def _make(starts: Sequence[int], first: int, last: int, device: torch.device) -> Chunks:
    requests, tokens = slice(first, last), slice(starts[first], starts[last])
    if last == first + 1:
        return Chunks(requests, tokens)
    begins = torch.tensor(starts[first : last + 1]) - starts[first]
    lengths = begins.diff()
    T = int(lengths.max())
    sources = begins[:-1, None] + torch.arange(T).minimum(lengths[:, None] - 1)
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    places = rows * T + torch.arange(int(begins[-1])) - begins[rows]
    return Chunks(requests, tokens, *(_send(t, device) for t in (lengths.int(), sources, places)))


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    # Pinned, so that the host waits for no copy.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
