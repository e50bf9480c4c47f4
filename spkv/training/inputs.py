"""Predictors' inputs brought to one scale, so that a learning rate means the same to all models.

What enters attention differs in scale between models (Gemma-3-270M's is several times SmolLM2-135M's) and layers, and a
few channels hold most of it. Adam moves every weight as far in a step, whatever its input, so that what a step does to
a utility grows with that scale. Standardised, each channel has mean 0 and variance 1; when training ends, that goes
into the weights (`UtilityPredictor.fold_inputs`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from spkv.hf.attach import attachment
from spkv.training.evaluation import evaluate_rows

# Added to variances, as a share of their mean over channels: one that hardly varies is not blown up.
_SMALL_VARIANCE = 1e-3


@torch.no_grad()
def measure_inputs(model: nn.Module, rows: Dataset[dict[str, Tensor]], accelerator: Any) -> None:
    """Set the `input_mean` and `input_scale` of an attached model's predictors by what they read in `rows`.

    Args:
        model: on the accelerator's device.
        rows: as `PackedRows` gives them, spread over the processes.
        accelerator: accelerate's.
    """
    found = attachment(model)
    predictors = list(found.predictors.values())
    # Of x, of its square, and of ones.
    shape = len(predictors), 3, found.decoder.config.hidden_size
    sums = torch.zeros(shape, dtype=torch.float64, device=accelerator.device)

    def add(index: int, x: Tensor) -> None:
        x = x.flatten(0, -2).double()
        sums[index] += torch.stack([x.sum(0), x.square().sum(0), torch.full_like(x[0], len(x))])

    handles = [
        predictor.register_forward_pre_hook(lambda _, args, index=index: add(index, args[0]))
        for index, predictor in enumerate(predictors)
    ]
    try:
        evaluate_rows(model, rows, accelerator, open_gates=True)
    finally:
        for handle in handles:
            handle.remove()
    totals = accelerator.reduce(sums, "sum")
    mean, square = (totals[:, :2] / totals[:, 2:]).unbind(1)
    variance = (square - mean.square()).clamp_min(0)
    scale = (variance + _SMALL_VARIANCE * variance.mean(-1, keepdim=True)).rsqrt()
    for index, predictor in enumerate(predictors):
        predictor.standardise_inputs(mean[index], scale[index])


def fold_inputs(model: nn.Module) -> None:
    """Make the predictors of an attached model plain again: they compute the same."""
    for predictor in attachment(model).predictors.values():
        predictor.fold_inputs()


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """What the predictors of an attached model standardise by: `layers.3.input_mean` and so on; empty if nothing."""
    return {
        f"layers.{layer}.{name}": value
        for layer, predictor in attachment(model).predictors.items()
        for name, value in predictor.named_buffers()
    }


def set_inputs(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Let the predictors of an attached model standardise by what `inputs_of` gave."""
    for layer, predictor in attachment(model).predictors.items():
        if (mean := inputs.get(f"layers.{layer}.input_mean")) is not None:
            device = predictor.down.bias.device
            predictor.standardise_inputs(mean.to(device), inputs[f"layers.{layer}.input_scale"].to(device))
