"""What densities mean in memory: bytes of the KV cache at lengths beyond the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spkv.hf.attach import Attachment
from spkv.ops.codec import codec

LENGTHS = (8_192, 32_768, 131_072, 262_144, 524_288, 1_048_576)


def kv_bytes(
    found: Attachment, density_beyond_sinks: Tensor, dtype: torch.dtype, lengths: Sequence[int] = LENGTHS
) -> list[dict[str, Any]]:
    """Count the bytes of keys and values of one sequence, dense and pruned, if each head keeps its measured density.

    The pruned cache is counted in whole pages, rings included, as the pool hands them out; tables and free pages are
    not counted, and layers that are local by design hold their window on both sides.

    Args:
        found: of the model; its sizes, window, sinks and page_dtype count.
        density_beyond_sinks: [global layers, Hkv], of the pairs that are no sinks, which every head keeps; nan, where
            none has left the window, counts as 1. Of a static layout the layout itself counts.
        dtype: of keys and values.
        lengths: tokens of a sequence.

    Returns:
        For each length: tokens, dense_bytes, pruned_bytes and kept_fraction (of the pairs in global layers).
    """
    config, decoder = found.config, found.decoder
    pair = 2 * decoder.head_size * dtype.itemsize
    page = config.page_size * pair
    kept_page = torch.tensor([_kept_page_bytes(found, layer, page) for layer in decoder.global_layers])[:, None]
    # A layout is known better than measured.
    density = density_beyond_sinks.double().nan_to_num(1.0) if config.layout is None else _is_global(found).double()
    local = len(decoder.attentions) - len(decoder.global_layers)
    rows = []
    for length in lengths:
        left = max(0, length - config.window)
        sinks = min(config.sinks, left)
        kept = sinks + density * (left - sinks)
        ring = -(-min(length, config.window) // config.page_size) * page
        sliding = min(length, getattr(decoder.config, "sliding_window", None) or 0)
        beside = local * decoder.kv_heads * sliding * pair
        pruned = ((kept / config.page_size).ceil() * kept_page + ring).sum().item()
        held = (kept + min(length, config.window)).mean().item()
        rows.append(
            {
                "tokens": length,
                "dense_bytes": density.numel() * length * pair + beside,
                "pruned_bytes": int(pruned) + beside,
                "kept_fraction": held / length,
            }
        )
    return rows


def _is_global(found: Attachment) -> Tensor:
    """[global layers, Hkv] bool: the heads that a static layout keeps."""
    assert found.config.layout is not None
    heads = range(found.decoder.kv_heads)
    return torch.tensor([[h in found.config.layout[layer] for h in heads] for layer in found.decoder.global_layers])


def _kept_page_bytes(found: Attachment, layer: int, uncoded: int) -> int:
    own = found.page_dtype
    name = own[layer] if isinstance(own, (tuple, list)) else own
    return uncoded if name is None else codec(str(name)).page_bytes(found.config.page_size, found.decoder.head_size)
