"""Loss and density of packed rows, with hard gates.

Legend: L layers with a predictor, Hkv KV heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from spkv.gates import OpenGate
from spkv.hf.attach import attachment
from spkv.training.data import IGNORED, collate, leaves_window


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_rows` found.

    Attributes:
        loss: mean next-token cross-entropy, nats.
        tokens: tokens predicted.
        densities: layer index -> density of each KV head.
    """

    loss: float
    tokens: int
    densities: dict[int, list[float]]

    @property
    def density(self) -> float:
        """Density over all layers and heads; every one sees the same pairs, so it is their mean."""
        values = [value for heads in self.densities.values() for value in heads]
        return sum(values) / len(values) if values else 1.0


@torch.no_grad()
def evaluate_rows(
    model: nn.Module,
    rows: Dataset[dict[str, Tensor]],
    accelerator: Any,
    open_gates: bool = False,
    observe: Callable[[Tensor], None] | None = None,
) -> Evaluation:
    """Evaluate rows one at a time, spread over the processes; every process gets the result.

    Args:
        model: an attached model, on the accelerator's device.
        rows: as `PackedRows` gives them.
        accelerator: accelerate's, for autocast and reduction.
        open_gates: evaluate the dense model instead.
        observe: called for every layer and row of this process, with the utilities [n] of the pairs that leave the
            window.
    """
    found = attachment(model)
    device, window, threshold = accelerator.device, found.config.window, found.config.threshold
    loss = torch.zeros(2, dtype=torch.float64, device=device)
    kept = torch.zeros(len(found.layers), found.decoder.kv_heads, dtype=torch.float64, device=device)
    left = torch.zeros((), dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    total: int = len(rows)  # type: ignore[arg-type]
    with found.using(OpenGate() if open_gates else found.default_gate):
        # All processes do as many passes, since sharded models must run in step; the surplus counts nothing.
        for first in range(0, total, accelerator.num_processes):
            index = first + accelerator.process_index
            counts = index < total
            inputs = {k: v.to(device) for k, v in collate([rows[index if counts else first]]).items()}
            items = (inputs["labels"][:, 1:] != IGNORED).sum()
            with found.record() as record, accelerator.autocast():
                output = model(**inputs, use_cache=False)
            if not counts:
                continue
            # A row without any prediction has the mean loss NaN.
            loss += torch.stack([(output.loss * items).nan_to_num(), items]).double()
            leaves = leaves_window(inputs["segment_ids"], window)[:, None]
            for row, layer in enumerate(found.layers):
                utility = record.utilities[layer]
                kept[row] += ((utility >= threshold) & leaves).sum((0, 2))
                if observe is not None:
                    observe(utility[leaves.expand_as(utility)])
            left += leaves.sum()
    model.train(training)
    loss, kept, left = (accelerator.reduce(value, "sum") for value in (loss, kept, left))
    densities = (kept / left.clamp_min(1.0)).tolist()
    return Evaluation(
        loss=(loss[0] / loss[1]).item(),
        tokens=int(loss[1]),
        densities={} if open_gates else dict(zip(found.layers, densities, strict=True)),
    )
