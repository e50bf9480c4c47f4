"""Requests of a step that read several tokens each, side by side: padded, so that operators run once for all of them.

Legend: N requests, n tokens of all together, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Requests stand side by side while padding does not double their tokens, or while there are few all the same.
_MOST_PADDED, _FEW = 2.0, 256
_MOST_REQUESTS = 32  # operators copy what each has in its window, and its table


@dataclass
class Group:
    """Adjacent requests of a step.

    Attributes:
        requests: which of the step's.
        tokens: which of the step's.
        lengths: [N] int32, tokens of each. None, as all that follows, for a single request, which needs no padding.
        valid: [N, T] bool, False at padding, which follows the tokens.
        sources: [N, T], which of the tokens stands at each place; at padding, any.
        places: [n], where each token stands in the flattened [N, T].
    """

    requests: slice
    tokens: slice
    lengths: Tensor | None = None
    valid: Tensor | None = None
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


def groups(starts: Sequence[int], first: int, device: torch.device) -> Iterator[Group]:
    """Yield a step's requests from `first` on, in groups.

    Args:
        starts: where the tokens of each request begin, and where the last ends. Requests without tokens, at the end,
            are nobody's.
        first: request.
        device: for tensors.
    """
    end = len(starts) - 1
    while end > first and starts[end] == starts[end - 1]:
        end -= 1
    while first < end:
        last, longest = first + 1, starts[first + 1] - starts[first]
        while last < end and last - first < _MOST_REQUESTS:
            longest = max(longest, starts[last + 1] - starts[last])
            padded, real = (last + 1 - first) * longest, starts[last + 1] - starts[first]
            if padded > max(_FEW, _MOST_PADDED * real):
                break
            last += 1
        yield _group(starts, first, last, device)
        first = last


def _group(starts: Sequence[int], first: int, last: int, device: torch.device) -> Group:
    requests, tokens = slice(first, last), slice(starts[first], starts[last])
    if last == first + 1:
        return Group(requests, tokens)
    begins = torch.tensor(starts[first : last + 1], device="cpu") - starts[first]
    lengths = begins.diff()
    place = torch.arange(int(lengths.max()), device="cpu")
    sources = begins[:-1, None] + place.minimum(lengths[:, None] - 1)
    rows = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), lengths)
    places = rows * len(place) + torch.arange(int(begins[-1]), device="cpu") - begins[rows]
    valid = place < lengths[:, None]
    return Group(requests, tokens, *(_send(tensor, device) for tensor in (lengths.int(), valid, sources, places)))


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    # Pinned, so that the host waits for no copy.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
