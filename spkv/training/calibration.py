"""The last step of a run with a target density: one shift of all predictors' biases that meets it.

The controller of the regulariser steers density while gates are soft, and it moves on as they become hard. What is
left is a small miss, by which this moves the cut through the utilities: a threshold other than 0.5, folded into the
biases so that it stays 0.5.

Legend: z = logit of a utility.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from spkv.hf.attach import attachment
from spkv.training.evaluation import evaluate_rows

logger = logging.getLogger(__name__)

# A histogram of z. float32 utilities end at z = 16.6 above; below -20 no pair is kept by any threshold in use.
_LARGEST, _BINS_OF_ONE = 20.0, 200
_PASSES = 4  # each shift changes what the layers above see
_CLOSE = 0.01  # of the target


@torch.no_grad()
def calibrate(model: nn.Module, rows: Dataset[dict[str, Tensor]], accelerator: Any, target: float) -> float:
    """Shift the biases of all predictors, in place, so that hard gates keep the share `target` of `rows`.

    Args:
        model: an attached model, on the accelerator's device; not sharded.
        rows: of the training data, as `PackedRows` gives them; they should hold 10 k tokens at least.
        accelerator: accelerate's; every process gets the same shift.
        target: density, in (0, 1).

    Returns:
        The shift, in logits.
    """
    found = attachment(model)
    threshold = found.config.threshold
    cut = math.log(threshold / (1.0 - threshold))
    shift, misses = 0.0, dict[float, float]()

    def move(to: float) -> None:
        nonlocal shift
        for predictor in found.predictors.values():
            predictor.down.bias.add_(to - shift)
        shift = to

    for _ in range(_PASSES):
        histogram = torch.zeros(int(2 * _LARGEST * _BINS_OF_ONE), dtype=torch.float64, device=accelerator.device)
        density = evaluate_rows(model, rows, accelerator, observe=functools.partial(_count, histogram)).density
        misses[shift] = abs(density / target - 1.0)
        kept = accelerator.reduce(histogram, "sum").flip(0).cumsum(0)  # pairs from each edge up, from the top
        if misses[shift] <= _CLOSE or kept[-1] == 0:
            break
        edge = _LARGEST - int((kept <= target * kept[-1]).sum()) / _BINS_OF_ONE
        move(shift + cut - edge)
    # The last shift was not looked at; and where many utilities are equal, a shift may miss by more than none.
    move(min(misses, key=misses.__getitem__))
    logger.info("calibrated: %.1f %% off the target density, biases shifted by %.3f", 100 * misses[shift], shift)
    return shift


def _count(histogram: Tensor, utility: Tensor) -> None:
    z = utility.double().logit().clamp(-_LARGEST, _LARGEST)
    histogram += z.float().histc(len(histogram), -_LARGEST, _LARGEST)
