"""The last step of a run with a target density: one shift of all predictors' biases that meets it.

The controller of the regulariser steers density while gates are soft, and it moves on as they become hard. What is
left is a small miss, by which this moves the cut through the utilities: a threshold other than the configured one,
folded into the biases so that the threshold stays. A large miss is a run that did not work, and is left to be seen.
So is a loss far above that with all gates open: what a model read through half-open gates, hard ones may drop.

Legend: z = logit of a utility.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
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
_CLOSE = 1.01  # times the target, or that much below it
_SMALL_MISS = 1.25
_SMALL_COST = 1.05  # times the loss with all gates open


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did.

    Attributes:
        shift: added to the predictors' biases, in logits.
        density_before: on the rows it was done on.
        density: after it.
        loss: on the same rows, after it, nats.
        open_loss: the same with all gates open.
    """

    shift: float
    density_before: float
    density: float
    loss: float
    open_loss: float


@torch.no_grad()
def calibrate(model: nn.Module, rows: Dataset[dict[str, Tensor]], accelerator: Any, target: float) -> Calibration:
    """Shift the biases of all predictors, in place, so that hard gates keep the share `target` of `rows`.

    A density further than a factor of 1.25 from the target is left as it is, with a warning, and so is one that sinks
    alone exceed the target by. A warning tells, too, of a loss more than 5 % above that with all gates open.

    Args:
        model: an attached model, on the accelerator's device; not sharded.
        rows: of the training data, as `PackedRows` gives them; they should hold 10 k tokens at least.
        accelerator: accelerate's; every process does the same.
        target: density, in (0, 1).
    """
    found = attachment(model)
    threshold = found.config.threshold
    cut = math.log(threshold / (1.0 - threshold))
    densities: dict[float, float] = {}  # by shift, as are losses
    losses: dict[float, float] = {}
    shift = 0.0

    def move(to: float) -> None:
        for predictor in found.predictors.values():
            predictor.down.bias.add_(to - shift)

    def miss(shift: float) -> float:
        return abs(math.log(max(densities[shift], 1e-9) / target))

    for last in (False,) * (_PASSES - 1) + (True,):
        histogram = torch.zeros(int(2 * _LARGEST * _BINS_OF_ONE), dtype=torch.float64, device=accelerator.device)
        result = evaluate_rows(model, rows, accelerator, observe=functools.partial(_count, histogram))
        densities[shift], losses[shift] = result.density, result.loss
        if len(densities) == 1 and miss(0.0) > math.log(_SMALL_MISS):
            logger.warning(
                "the density is %.3f and %g was asked for, which is too far off to be mended in the end: train on "
                "more tokens, or choose a target nearer to it",
                densities[0.0],
                target,
            )
            break
        kept = accelerator.reduce(histogram, "sum").flip(0).cumsum(0)  # pairs from each edge up, from the top
        if last or miss(shift) <= math.log(_CLOSE):
            break
        if kept[0] > target * kept[-1]:
            logger.warning(
                "%.3f of the pairs that leave the window are kept whatever the predictors say (the sinks, %d in every "
                "document), and a density of %g was asked for: choose a higher target, longer documents or fewer sinks",
                float(kept[0] / kept[-1]),
                found.config.sinks,
                target,
            )
            break
        edge = _LARGEST - int((kept <= target * kept[-1]).sum()) / _BINS_OF_ONE
        move(shift + cut - edge)
        shift += cut - edge
    # Where many utilities are equal, a shift may miss by more than none.
    best = min(densities, key=miss)
    move(best)
    open_loss = evaluate_rows(model, rows, accelerator, open_gates=True).loss
    if losses[best] > _SMALL_COST * open_loss:
        logger.warning(
            "at threshold %g the loss on training rows is %.4f, with all gates open %.4f: the model misses what is "
            "dropped; a lower threshold may keep it, as may more training or a target nearer to 1",
            threshold,
            losses[best],
            open_loss,
        )
    return Calibration(best, densities[0.0], densities[best], losses[best], open_loss)


def _count(histogram: Tensor, utility: Tensor) -> None:
    z = utility.double().logit().clamp(-_LARGEST, _LARGEST)
    histogram += z.float().histc(len(histogram), -_LARGEST, _LARGEST)
