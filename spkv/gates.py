"""Gates: what a utility becomes. The one place that knows; caches and kernels see keep bits and biases only.

Shapes: utility [batch, kv_heads, tokens] float32 in (0, 1); position [batch or 1, tokens], a token's index in its
own sequence. `layer` is the layer's index in the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spkv.config import check_threshold

SINKS = 4
"""First positions that attention leans on (arXiv 2309.17453), where a gate keeps them whatever else it does."""

_TINY = 1e-30
# Probability of the most extreme noise, and largest amplitude: the one's odds to the power of the other stay within
# float32.
_RAREST, _LOUDEST = 1e-6, 6.0


def sink_mask(position: Tensor, sinks: int) -> Tensor | None:
    """Return [batch or 1, 1, tokens] bool, True at the first `sinks` positions of each sequence, or None for no sinks.

    Attention leans on these positions (arXiv 2309.17453), and half-open gates need not show it to a predictor.
    """
    return (position < sinks).unsqueeze(-2) if sinks else None


def open_sinks(utility: Tensor, sink: Tensor | None) -> Tensor:
    """Give pairs at `sink` (of `sink_mask`) the utility 1, which every gate that asks for utilities keeps open."""
    return utility if sink is None else utility.masked_fill(sink, 1.0)


class Gate(ABC):
    """Maps utilities to the additive attention bias of keys that have left the window."""

    hard: ClassVar[bool]
    """True where every pair is either kept or dropped, which caches need."""

    @abstractmethod
    def log_gate(self, utility: Tensor, *, layer: int, position: Tensor) -> Tensor:
        """Return the bias [batch, kv_heads, tokens], float32, at most 0; minus infinity drops the pair."""


class HardGate(Gate):
    """A gate that keeps or drops: subclasses say which."""

    hard = True

    @abstractmethod
    def keep(self, utility: Tensor, *, layer: int, position: Tensor) -> Tensor:
        """Return bool [batch, kv_heads, tokens]: True where the pair is kept."""

    def log_gate(self, utility: Tensor, *, layer: int, position: Tensor) -> Tensor:
        keep = self.keep(utility, layer=layer, position=position)
        return torch.zeros_like(utility).masked_fill_(~keep, float("-inf"))


@dataclass(frozen=True)
class SoftGate(Gate):
    """Training, first phase: the bias is log u (SP-KV, arXiv 2605.14037)."""

    hard: ClassVar[bool] = False

    def log_gate(self, utility: Tensor, *, layer: int, position: Tensor) -> Tensor:
        return utility.clamp_min(_TINY).log()


@dataclass(frozen=True)
class NoisyGate(Gate):
    """Training, first phase, with noise: the bias is log of sigmoid(logit u + amplitude * L), L drawn anew for every
    pair from the logistic distribution (at amplitude 1: a relaxed coin that shows heads with probability u; Maddison
    et al., arXiv 1611.00712).

    Without noise a model learns to read pairs through half-open gates, by raising their scores, and misses them once
    gates are hard. Here it cannot rely on them, and utilities move away from the middle.
    """

    amplitude: float
    hard: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.amplitude <= _LOUDEST:
            raise ValueError(f"the amplitude of noise must lie in [0, {_LOUDEST:g}], not {self.amplitude!r}")

    def log_gate(self, utility: Tensor, *, layer: int, position: Tensor) -> Tensor:
        # By the odds u : 1 - u, since logits of utilities that round to 0 or 1 are infinite.
        coin = torch.rand_like(utility).clamp_(_RAREST, 1.0 - _RAREST)
        against = (1.0 - utility) * ((1.0 - coin) / coin).pow(self.amplitude)
        return utility.clamp_min(_TINY).log() - (utility + against).clamp_min(_TINY).log()


ANNEALING = ("linear", "power")


@dataclass(frozen=True)
class AnnealedGate(Gate):
    """Training, between soft and hard, as alpha goes from 0 to 1. With k = [u >= threshold]:

    "linear"  log((1 - alpha) u + alpha k) (SP-KV, arXiv 2605.14037)
    "power"   log u * (1 - alpha) where k, log u / (1 - alpha) elsewhere

    A pair that will be dropped stays visible through the linear form nearly to its end: log(1 - alpha) reaches -3 at
    alpha 0.95. The power form closes it as evenly as it opens the kept ones.

    The predictor is frozen in this phase: no gradient reaches the utility.
    """

    threshold: float
    alpha: float
    form: str = "linear"
    hard: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], not {self.alpha!r}")
        if self.form not in ANNEALING:
            raise ValueError(f"form must be one of {', '.join(ANNEALING)}, not {self.form!r}")

    def log_gate(self, utility: Tensor, *, layer: int, position: Tensor) -> Tensor:
        utility = utility.detach()
        kept = utility >= self.threshold
        if self.form == "linear":
            return torch.lerp(utility, kept.to(utility.dtype), self.alpha).log()
        log_utility, left = utility.clamp_min(_TINY).log(), 1.0 - self.alpha
        return torch.where(kept, log_utility * left, log_utility / left if left else float("-inf"))


@dataclass(frozen=True)
class HeadGate(Gate):
    """Learning a layout: the bias is log z of a head, whatever the utility.

    Attributes:
        factors: layer -> z [kv_heads], in [0, 1].
        sinks: positions at the start that all heads keep.
    """

    factors: Mapping[int, Tensor]
    sinks: int = 0
    hard: ClassVar[bool] = False

    def log_gate(self, utility: Tensor, *, layer: int, position: Tensor) -> Tensor:
        bias = self.factors[layer].float().clamp_min(_TINY).log()[:, None].expand_as(utility)
        return bias.masked_fill((position < self.sinks).unsqueeze(1), 0.0)


@dataclass(frozen=True)
class ThresholdGate(HardGate):
    """Inference: keep where u >= threshold."""

    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    def keep(self, utility: Tensor, *, layer: int, position: Tensor) -> Tensor:
        return utility >= self.threshold


@dataclass(frozen=True)
class OpenGate(HardGate):
    """Keep every pair: the dense model, through the same code."""

    def keep(self, utility: Tensor, *, layer: int, position: Tensor) -> Tensor:
        return torch.ones_like(utility, dtype=torch.bool)


@dataclass(frozen=True)
class LayoutGate(HardGate):
    """A static layout: some heads keep every pair, the others none but a sequence's first, whatever the utilities.

    Attributes:
        layout: for each layer of the model, the KV heads that keep.
        sinks: positions at the start that all heads keep.
    """

    layout: tuple[tuple[int, ...], ...]
    sinks: int = 0

    def keep(self, utility: Tensor, *, layer: int, position: Tensor) -> Tensor:
        # Filled head by head on the device: a CUDA graph could not copy a list from the host.
        heads = torch.zeros(utility.shape[1], 1, dtype=torch.bool, device=utility.device)
        for head in self.layout[layer]:
            heads[head].fill_(True)
        return (heads | (position < self.sinks).unsqueeze(1)).expand_as(utility)


@dataclass(frozen=True)
class SinkGate(HardGate):
    """Keep the first `sinks` positions and the window: StreamingLLM (arXiv 2309.17453) at original positions."""

    sinks: int = SINKS

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, not {self.sinks}")

    def keep(self, utility: Tensor, *, layer: int, position: Tensor) -> Tensor:
        return (position < self.sinks).unsqueeze(1).expand_as(utility)


@dataclass(frozen=True)
class RandomGate(HardGate):
    """Keep a pair with probability `density`, decided by a hash of (seed, layer, head, position).

    Being a function of the position it gives the same choice in prefill and decode.
    """

    density: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.density <= 1.0:
            raise ValueError(f"density must lie in [0, 1], not {self.density!r}")

    def keep(self, utility: Tensor, *, layer: int, position: Tensor) -> Tensor:
        head = torch.arange(utility.shape[1], device=utility.device).view(1, -1, 1)
        x = position.long().unsqueeze(1) + 0x9E3779B9 * (head + 1) + 0x85EBCA6B * (layer + 1) + 0xC2B2AE35 * self.seed
        for shift in (16, 15, 16):  # integer mixing; int64 products wrap, which is what a hash wants
            x = ((x ^ (x >> shift)) * 0x2C1B3C6D) & 0xFFFFFFFF
        return ((x >> 8) < self.density * 2**24).expand_as(utility)
