"""Learning which heads need the far past: L0 gates on KV heads, under a target for how many stay global.

Every head has a hard-concrete gate (arXiv 1712.01312) on what it sees past its window and sinks; the model is frozen.
The loss is the divergence from the model with all gates open, and an augmented Lagrangian holds the expected share of
open gates at its target, which falls from 1 in the first part of the steps.

Legend: L global layers, Hkv KV heads, B sequences of a step, T tokens of a sequence, w window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from spkv.gates import SINKS, HeadGate, OpenGate
from spkv.hf.attach import attachment

# Of the hard-concrete distribution: temperature, and how far it is stretched beyond [0, 1]. Published values.
_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1
# Slow, or the multiplier would wind up while the gates are still on their way.
_MULTIPLIER_RATE = 0.02
# The gate of a head that starts open with probability 0.96.
_START = 2.0


@dataclass(frozen=True)
class LearningOptions:
    """How heads are learned.

    Attributes:
        steps: optimiser steps.
        learning_rate: of Adam, on the gates' logits.
        sequence_length: T; must exceed the window.
        batch_size: B.
        penalty: weight of the squared constraint; the multiplier of the plain one grows in proportion.
        warmup: part of the steps in which the target falls from 1 to its value.
        sinks: first positions that every head sees, as in the layout to be made.
        seed: of the gates' noise and the order of the sequences.
    """

    steps: int = 200
    learning_rate: float = 0.1
    sequence_length: int = 1024
    batch_size: int = 1
    penalty: float = 5.0
    warmup: float = 0.3
    sinks: int = SINKS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


def learn_heads(
    model: PreTrainedModel,
    input_ids: list[Tensor],
    global_heads: int,
    options: LearningOptions | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Learn how much the model needs each head to see past its window.

    Args:
        model: an attached model in evaluation mode, with a predictor in every global layer; its weights do not change.
        input_ids: of the documents, [1, tokens] each; cut into sequences, what is left over is dropped.
        global_heads: how many are to stay global; the target of the constraint.
        options: None takes the defaults.
        progress: called with the number of steps done.

    Returns:
        [L, Hkv] float32 on the CPU: the gates' logits; the largest `global_heads` are those to keep.

    Raises:
        ValueError: if no document has a sequence's length, that does not exceed the window, or layers lack predictors.
    """
    options = options or LearningOptions()
    found = attachment(model)
    if found.layers != found.decoder.global_layers:
        raise ValueError("heads can be learned where every global layer has a predictor; some have none")
    T = options.sequence_length
    if found.config.window >= T:
        raise ValueError(f"sequence_length must exceed the window of {found.config.window} tokens, not be {T}")
    sequences = [piece for ids in input_ids for piece in ids[0].split(T) if len(piece) == T]
    if not sequences:
        longest = max((ids.shape[1] for ids in input_ids), default=0)
        raise ValueError(f"no document has {T:,} tokens (sequence_length); the longest has {longest:,}")
    generator = torch.Generator().manual_seed(options.seed)
    logits = torch.full((len(found.layers), found.decoder.kv_heads), _START, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=options.learning_rate)
    target, multiplier = global_heads / logits.numel(), 0.0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        for step in range(options.steps):
            chosen = torch.randint(len(sequences), (options.batch_size,), generator=generator)
            batch = torch.stack([sequences[index] for index in chosen]).to(model.device)
            goal = 1 - (1 - target) * min(1.0, (step + 1) / max(1.0, options.warmup * options.steps))
            excess = _open_probability(logits).mean() - goal
            gates = _sample(logits, generator).to(model.device)
            loss = _divergence(model, batch, HeadGate(dict(zip(found.layers, gates, strict=True)), options.sinks))
            optimiser.zero_grad()
            (loss.cpu() + multiplier * excess + options.penalty / 2 * excess**2).backward()
            optimiser.step()
            multiplier += _MULTIPLIER_RATE * options.penalty * excess.item()
            if progress is not None:
                progress(step + 1)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return logits.detach()


def _divergence(model: PreTrainedModel, batch: Tensor, gate: HeadGate) -> Tensor:
    """Mean KL divergence, past the window, of the gated model's predictions from those with all gates open."""
    found = attachment(model)
    with torch.no_grad(), found.using(OpenGate()):
        expected = model(batch, use_cache=False).logits
    with found.using(gate):
        actual = model(batch, use_cache=False).logits
    w = found.config.window
    expected, actual = (logits[:, w:].flatten(0, 1).float().log_softmax(-1) for logits in (expected, actual))
    return F.kl_div(actual, expected, log_target=True, reduction="batchmean")


def _open_probability(logits: Tensor) -> Tensor:
    """The probability that a gate is not 0."""
    return (logits - _BETA * math.log(-_GAMMA / _ZETA)).sigmoid()


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Gates in [0, 1], exactly 0 or 1 with some probability."""
    noise = torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    concrete = ((noise.logit() + logits) / _BETA).sigmoid()
    return (concrete * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
