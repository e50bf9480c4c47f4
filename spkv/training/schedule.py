"""What changes with the step: the gate, the learning rates, and the weight of the density regulariser.

Everything here is a pure function of the step, or has a state that can be saved, so that a resumed run is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from spkv.config import check_threshold
from spkv.gates import ANNEALING, AnnealedGate, Gate, NoisyGate, SoftGate, ThresholdGate

Phase = Literal["soft", "anneal", "hard"]


@dataclass(frozen=True)
class Schedule:
    """Gates and learning rates of a run (SP-KV, arXiv 2605.14037: soft, annealed, hard).

    Soft gates for `soft_steps`. Then the predictor is frozen and the gates are annealed for `anneal_steps`, alpha
    rising from 0; from there on they are hard. Steps count from 0.

    Attributes:
        steps: optimiser steps of the run.
        soft_steps: those with soft gates; the only ones in which the predictor learns.
        anneal_steps: those in which alpha rises.
        warmup_steps: those in which the learning rate rises linearly.
        floor: the learning rate that the cosine ends at, as a fraction of its peak.
        threshold: where gates are cut once they are hard.
        anneal_form: how they get there, one of `spkv.gates.ANNEALING`.
        gate_noise: amplitude of the noise on soft gates (see `NoisyGate`) at their end; it rises from 0 evenly.
    """

    steps: int
    soft_steps: int
    anneal_steps: int
    warmup_steps: int
    floor: float
    threshold: float
    anneal_form: str = "linear"
    gate_noise: float = 0.0

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if self.anneal_form not in ANNEALING:
            raise ValueError(f"anneal_form must be one of {', '.join(ANNEALING)}, not {self.anneal_form!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if not 0 <= self.soft_steps <= self.steps or not 0 <= self.anneal_steps <= self.steps - self.soft_steps:
            raise ValueError(
                f"soft_steps {self.soft_steps} and anneal_steps {self.anneal_steps} must fit into {self.steps} steps"
            )
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps must lie in [0, {self.steps}], not {self.warmup_steps}")
        NoisyGate(self.gate_noise)  # checks it
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"the learning rate's floor must lie in [0, 1], not {self.floor}")

    @classmethod
    def from_fractions(
        cls,
        steps: int,
        *,
        soft: float,
        anneal_steps: int,
        warmup: float,
        floor: float,
        threshold: float,
        anneal_form: str = "linear",
        gate_noise: float = 0.0,
    ) -> Schedule:
        """Make a schedule from fractions of `steps`.

        Annealing takes at most half of what the soft phase leaves: the model needs time with the gates that it will
        be used with. The published 500 steps are far from that bound in a run of the published length.
        """
        soft_steps = round(soft * steps)
        return cls(
            steps,
            soft_steps,
            min(anneal_steps, (steps - soft_steps) // 2),
            round(warmup * steps),
            floor,
            threshold,
            anneal_form,
            gate_noise,
        )

    def phase(self, step: int) -> Phase:
        """Return the phase that `step` is in."""
        if step < self.soft_steps:
            return "soft"
        return "anneal" if step < self.soft_steps + self.anneal_steps else "hard"

    def alpha(self, step: int) -> float:
        """Return how far the gates are annealed: 0 while soft, 1 once hard."""
        if self.phase(step) == "hard":
            return 1.0
        return max(0, step - self.soft_steps) / self.anneal_steps if self.anneal_steps else 0.0

    def gate(self, step: int) -> Gate:
        """Return the gate in force at `step`."""
        phase = self.phase(step)
        if phase == "soft":
            return NoisyGate(self.gate_noise * step / self.soft_steps) if self.gate_noise else SoftGate()
        if phase == "anneal":
            return AnnealedGate(self.threshold, self.alpha(step), self.anneal_form)
        return ThresholdGate(self.threshold)

    def learning_rate(self, step: int) -> float:
        """Return the factor on the peak learning rate: linear warm-up, then cosine to the floor."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def predictor_learning_rate(self, step: int) -> float:
        """Return the factor for the predictor: exactly 0 once it is frozen.

        A learning rate of 0 leaves AdamW's weights as they are, bit for bit, its decoupled weight decay included;
        the predictor stays in the graph, which DistributedDataParallel wants.
        """
        return self.learning_rate(step) if self.phase(step) == "soft" else 0.0


class DensityController:
    """Chooses the weight lambda of the regulariser `lambda * mean(penalty(u))` so that density ends at a target.

    A PI controller on log(lambda), whose error is log(measured density / wanted density). The wanted density falls
    from the first measurement to the target, evenly in its logarithm, over the first `RAMP` of the soft phase and
    then stays. In logarithms the response of density to lambda is close to linear (about -0.8 in our trials with the
    linear form), which makes one pair of gains serve targets from 0.05 to 0.5. The controller acts `UPDATES` times in
    the soft phase, whatever its length: a longer run has a slower predictor per unit of the schedule's time, but more
    steps in it.

    Args:
        target: the density to end at, in (0, 1).
        soft_steps: length of the soft phase.
        initial: lambda to start from.
    """

    UPDATES: ClassVar[int] = 100
    RAMP: ClassVar[float] = 0.6
    PROPORTIONAL: ClassVar[float] = 2.0
    INTEGRAL: ClassVar[float] = 0.2
    SMOOTHING: ClassVar[float] = 0.5
    # lambda stays within a factor of 30 of its start, or is 0: until the first gates close, density says nothing.
    SPAN: ClassVar[float] = math.log(30.0)
    # Below it a logarithm would react to single pairs.
    LEAST_DENSITY: ClassVar[float] = 1e-3

    def __init__(self, target: float, soft_steps: int, initial: float):
        if not 0.0 < target < 1.0:
            raise ValueError(f"target_density must lie strictly between 0 and 1, not {target!r}")
        if not initial > 0.0:
            raise ValueError(f"a controlled regulariser must start above 0, not at {initial!r}")
        self.target, self.soft_steps, self.initial = target, soft_steps, initial
        self.every = max(1, soft_steps // self.UPDATES)
        self.weight = initial
        self._first: float | None = None
        self._smoothed = 1.0
        self._integral = 0.0

    def due(self, step: int) -> bool:
        """True if a measurement is wanted after `step`: the density of all steps since the last one."""
        return step < self.soft_steps and (step + 1) % self.every == 0

    def wanted(self, step: int) -> float:
        """Return the density wanted after `step`, once there has been a measurement."""
        first = self.target if self._first is None else self._first
        progress = min(1.0, (step + 1) / (self.RAMP * self.soft_steps))
        return math.exp((1 - progress) * math.log(first) + progress * math.log(self.target))

    def update(self, step: int, density: float) -> float:
        """Take the density measured up to `step` into account; returns the new lambda, also in `weight`."""
        density = max(density, self.LEAST_DENSITY)
        if self._first is None:
            self._first = self._smoothed = density
        self._smoothed += self.SMOOTHING * (density - self._smoothed)
        error = math.log(self._smoothed / self.wanted(step))
        action = self.PROPORTIONAL * error + self._integral
        # No integrating beyond the span: it would have to be undone later.
        if abs(action) < self.SPAN or action * error < 0:
            self._integral += self.INTEGRAL * error * self.every * self.UPDATES / self.soft_steps
            action = self.PROPORTIONAL * error + self._integral
        # Off at the lower end: where the loss has no gradient left to oppose it, AdamW makes steps of full size out
        # of the smallest lambda, and gates would go on closing.
        self.weight = 0.0 if action <= -self.SPAN else self.initial * math.exp(min(self.SPAN, action))
        return self.weight

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON values, which keep floats exactly."""
        return {
            "weight": self.weight,
            "first": self._first,
            "smoothed": self._smoothed,
            "integral": self._integral,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s output."""
        self.weight, self._first = state["weight"], state["first"]
        self._smoothed, self._integral = state["smoothed"], state["integral"]
