"""Hybrid layouts: from measured utilities to heads that keep everything and heads that keep their window.

The heads that SP-KV keeps densest become global, all others local (SP-KV, arXiv 2605.14037, as an architecture
probe); local ones keep a few first positions, too. Such a layout needs no predictors, and runs in the same cache and
kernels.

Legend: L global layers, Hkv KV heads, N heads that stay global, w window.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spkv.checkpoint import save
from spkv.config import SPKVConfig
from spkv.gates import SINKS
from spkv.hf.attach import attach, attachment, detach
from spkv.inspect.inspection import Inspection
from spkv.inspect.memory import kv_bytes
from spkv.outputs import check_holds_no_model

REPORT = "hybrid.json"


@dataclass(frozen=True)
class HybridLayout:
    """Which heads stay global, and what of the measured utilities they cover.

    Attributes:
        strategy: how they were chosen, one of `STRATEGIES`.
        layers: the model's index of each global layer.
        heads: [L, Hkv] bool, True where a head stays global.
        utility_covered: sum of the utilities of their pairs / sum of all, of pairs that have left the window.
        kept_covered: the same of pairs that the gates kept; None if they kept none.
        window: w.
        sinks: first positions of a sequence that local heads keep, too.
    """

    strategy: str
    layers: tuple[int, ...]
    heads: Tensor
    utility_covered: float
    kept_covered: float | None
    window: int
    sinks: int

    @property
    def global_heads(self) -> int:
        """N."""
        return int(self.heads.sum())

    def kept_fraction(self, length: int) -> float:
        """Pairs held at `length` tokens / pairs that a dense cache would hold."""
        share = self.global_heads / self.heads.numel()
        return share + (1 - share) * min(length, self.window + self.sinks) / length

    def for_model(self, model_layers: int) -> tuple[tuple[int, ...], ...]:
        """The layout as `SPKVConfig` takes it, for a model with so many layers."""
        rows = dict(zip(self.layers, self.heads, strict=True))
        return tuple(
            tuple(rows[layer].nonzero()[:, 0].tolist()) if layer in rows else () for layer in range(model_layers)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "strategy": self.strategy,
            "global_heads": self.global_heads,
            "heads": self.heads.numel(),
            "sinks": self.sinks,
            "utility_covered": self.utility_covered,
            "kept_covered": self.kept_covered,
            "layout": {
                str(layer): row.nonzero()[:, 0].tolist() for layer, row in zip(self.layers, self.heads, strict=True)
            },
        }


def hybrid_layout(
    inspection: Inspection,
    global_heads: int,
    strategy: str,
    *,
    sinks: int = SINKS,
    seed: int = 0,
    scores: Tensor | None = None,
) -> HybridLayout:
    """Choose the heads that stay global.

    Args:
        inspection: the utilities are those of its documents.
        global_heads: N, 0 to L * Hkv; the strategies that take whole layers need a multiple of Hkv.
        strategy: one of `STRATEGIES`.
        sinks: first positions of a sequence that local heads keep, too.
        seed: of `random`.
        scores: [L, Hkv] for `learned`, from `spkv.inspect.learned.learn_heads`.

    Raises:
        ValueError: for an unknown strategy, an impossible number, or documents that do not leave the window.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; known are {', '.join(STRATEGIES)}")
    if not inspection.left:
        raise ValueError(f"no token has left the window of {inspection.window}: give longer texts")
    utility = inspection.utilities().double().sum(-1)
    kept = inspection.keep().double().sum(-1)
    if not 0 <= global_heads <= utility.numel():
        raise ValueError(f"global_heads must be 0 to {utility.numel()}, not {global_heads}")
    if strategy in LAYER_STRATEGIES and global_heads % utility.shape[1]:
        raise ValueError(
            f"{strategy} takes whole layers: global_heads must be a multiple of {utility.shape[1]}, not {global_heads}"
        )
    if (strategy == "learned") != (scores is not None):
        raise ValueError("strategy learned, and no other, takes scores")
    heads = torch.zeros(utility.shape, dtype=torch.bool)
    heads.view(-1)[STRATEGIES[strategy](utility if scores is None else scores, global_heads, seed)] = True
    return HybridLayout(
        strategy=strategy,
        layers=inspection.layers,
        heads=heads,
        utility_covered=(utility[heads].sum() / utility.sum()).item(),
        kept_covered=(kept[heads].sum() / kept.sum()).item() if kept.any() else None,
        window=inspection.window,
        sinks=sinks,
    )


def heads_in_budget(inspection: Inspection, budget: float, length: int, strategy: str, sinks: int = SINKS) -> int:
    """The most heads that can stay global if a sequence of `length` tokens may hold `budget` of its dense pairs.

    Raises:
        ValueError: if windows and sinks alone exceed the budget, the budget is not in (0, 1], or length is below 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, not {length}")
    if not 0 < budget <= 1:
        raise ValueError(f"kv_budget must be above 0 and at most 1, not {budget:g}")
    layers, heads = inspection.density_by_head().shape
    local = min(length, inspection.window + sinks) / length
    if budget < local:
        alone = "windows and sinks" if sinks else "windows"
        raise ValueError(f"the {alone} alone hold {local:.3g} of {length:,} tokens; kv_budget {budget:g} is below that")
    share = (budget - local) / (1 - local) if local < 1 else 1.0
    step = heads if strategy in LAYER_STRATEGIES else 1
    # The smallest float above an exact number of heads must not cost one.
    return math.floor(share * layers * heads / step + 1e-9) * step


def make_hybrid(model: PreTrainedModel, layout: HybridLayout) -> PreTrainedModel:
    """Give an attached model a static layout in place of its predictors, in place; `spkv.save` stores it.

    Raises:
        ValueError: if the layout names other layers or heads than the model has.
    """
    found = attachment(model)
    if found.config.layout is not None:
        raise ValueError("the model has a static layout already, and no utilities to make another from")
    config = SPKVConfig(
        window=found.config.window,
        page_size=found.config.page_size,
        page_dtype=found.page_dtype,
        layout=layout.for_model(len(found.decoder.attentions)),
        sinks=layout.sinks,
    )
    detach(model)
    return attach(model, config)


def write_hybrid(
    model: PreTrainedModel,
    layout: HybridLayout,
    inspection: Inspection,
    directory: str | os.PathLike[str],
    *,
    length: int,
) -> dict[str, Any]:
    """Save a model that `make_hybrid` made, with a report in `hybrid.json`.

    Args:
        model: the hybrid.
        layout: its layout.
        inspection: what the layout was chosen from.
        directory: made if needed.
        length: tokens at which to state memory.

    Returns:
        The report: model, tokens (measured), what `HybridLayout.to_dict` has, length, kept_fraction, and dense_bytes
        and kv_bytes at that length.
    """
    found = attachment(model)
    memory = kv_bytes(found, layout.heads.double(), model.dtype, [length])[0]
    report = {
        "model": inspection.model,
        "tokens": sum(document.densities.tokens for document in inspection.documents),
        **layout.to_dict(),
        "length": length,
        "kept_fraction": layout.kept_fraction(length),
        "dense_kv_bytes": memory["dense_bytes"],
        "kv_bytes": memory["pruned_bytes"],
    }
    check_holds_no_model(directory)
    save(model, directory, training={"hybrid": report})
    (Path(directory) / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _densest_heads(utility: Tensor, count: int, seed: int) -> Tensor:
    return utility.flatten().sort(descending=True, stable=True).indices[:count]


def _densest_layers(utility: Tensor, count: int, seed: int) -> Tensor:
    layers = utility.sum(1).sort(descending=True, stable=True).indices[: count // utility.shape[1]]
    return _all_heads(layers, utility.shape[1])


def _interleave(utility: Tensor, count: int, seed: int) -> Tensor:
    """Whole layers at even distances, each the last of its stretch, as in models that mix local and global layers."""
    layers = count // utility.shape[1]
    ends = [math.ceil((index + 1) * utility.shape[0] / layers) - 1 for index in range(layers)]
    return _all_heads(torch.tensor(ends, dtype=torch.long), utility.shape[1])


def _random(utility: Tensor, count: int, seed: int) -> Tensor:
    return torch.randperm(utility.numel(), generator=torch.Generator().manual_seed(seed))[:count]


def _all_heads(layers: Tensor, heads: int) -> Tensor:
    return (layers[:, None] * heads + torch.arange(heads)).flatten()


LAYER_STRATEGIES = ("densest-layers", "interleave")
STRATEGIES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "densest-heads": _densest_heads,
    "densest-layers": _densest_layers,
    "interleave": _interleave,
    "random": _random,
    "learned": _densest_heads,  # by the scores it is given
}
