"""Loss, accuracy and density of held-out rows under any hard gate, applied as a mask in one forward pass a batch.

This gives the losses that the cache gives (the invariant that the tests check) and is much faster; `spkv eval`
measures the same through the cache.

Legend: N sequences or rows, T tokens of each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

import spkv
from spkv.gates import HardGate
from spkv.training.data import IGNORED, PackedRows, collate, leaves_window
from spkv.training.tokens import Tokens


def whole_sequences(sequences: Tensor) -> PackedRows:
    """Rows of one document each, from `cut_sequences`' [N, T]."""
    N, T = sequences.shape
    return PackedRows(Tokens(sequences.flatten().numpy(), np.arange(N) * T), T)


@torch.no_grad()
def measure(
    model: PreTrainedModel, rows: Dataset[dict[str, Tensor]], gate: HardGate | None, batch_size: int
) -> dict[str, float]:
    """Return loss, accuracy, density and kept_fraction under a gate; None runs a plain model, on whole sequences.

    Loss and accuracy (of the likeliest token) are means over the tokens with a label.
    """
    device = next(model.parameters()).device
    found = None if gate is None else spkv.attachment(model)
    count: int = len(rows)  # type: ignore[arg-type]
    loss = torch.zeros((), dtype=torch.float64, device=device)
    kept = torch.zeros((), dtype=torch.float64, device=device)
    right = torch.zeros((), dtype=torch.long, device=device)
    predicted = left = tokens = 0
    for first in range(0, count, batch_size):
        batch = collate([rows[index] for index in range(first, min(first + batch_size, count))])
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            if found is None or gate is None:
                logits = model(batch["input_ids"], use_cache=False).logits
            else:
                inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
                with found.using(gate), found.record() as record:
                    logits = model(**inputs, use_cache=False).logits
        # One row at a time: float32 logits of a batch would not fit.
        for row, target in zip(logits, batch["labels"], strict=True):
            row_loss = torch.nn.functional.cross_entropy(
                row[:-1].float(), target[1:], ignore_index=IGNORED, reduction="sum"
            )
            loss += row_loss.double()
            right += (row[:-1].argmax(-1) == target[1:]).sum()
        predicted += int((batch["labels"][:, 1:] != IGNORED).sum())
        if found is not None and gate is not None:
            leaves = leaves_window(batch["segment_ids"], found.config.window)[:, None]
            # A layer without a predictor counts, too: it keeps everything.
            full = logits.new_ones(len(logits), found.decoder.kv_heads, logits.shape[1])
            for layer in found.decoder.global_layers:
                keep = found.keep(layer, record.utilities.get(layer, full), batch["position_ids"], gate)
                kept += (keep & leaves).sum()
                left += int(leaves.sum()) * keep.shape[1]
                tokens += keep.numel()
    density = kept.item() / left if left else 1.0
    return {
        "loss": loss.item() / predicted,
        "accuracy": right.item() / predicted,
        "density": density,
        # The pairs held are those kept, and those that are still in the window as their document ends.
        "kept_fraction": 1.0 if not left else (kept.item() + tokens - left) / tokens,
    }
