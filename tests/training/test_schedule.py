from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spkv.gates import AnnealedGate, NoisyGate, SoftGate, ThresholdGate
from spkv.training.schedule import DensityController, Schedule


def published(steps: int) -> Schedule:
    return Schedule.from_fractions(steps, soft=0.75, anneal_steps=500, warmup=0.05, floor=0.1, threshold=0.6)


def test_gates_go_from_soft_over_annealed_to_hard() -> None:
    schedule = published(8000)
    assert (schedule.soft_steps, schedule.anneal_steps, schedule.warmup_steps) == (6000, 500, 400)
    assert schedule.gate(0) == schedule.gate(5999) == SoftGate()
    assert schedule.gate(6000) == AnnealedGate(0.6, 0.0)
    assert schedule.gate(6250) == AnnealedGate(0.6, 0.5)
    assert schedule.gate(6499) == AnnealedGate(0.6, 499 / 500)
    assert schedule.gate(6500) == schedule.gate(7999) == ThresholdGate(0.6)
    assert [schedule.phase(s) for s in (5999, 6000, 6499, 6500)] == ["soft", "anneal", "anneal", "hard"]


def test_noise_rises_while_gates_are_soft() -> None:
    schedule = Schedule(100, 60, 10, 0, 0.1, 0.5, gate_noise=1.5)
    assert [schedule.gate(s) for s in (0, 30, 59)] == [NoisyGate(0.0), NoisyGate(0.75), NoisyGate(1.5 * 59 / 60)]
    assert [type(schedule.gate(s)) for s in (60, 70)] == [AnnealedGate, ThresholdGate]


def test_short_runs_still_train_with_hard_gates() -> None:
    schedule = published(40)
    assert (schedule.soft_steps, schedule.anneal_steps) == (30, 5)


@given(st.integers(1, 400), st.floats(0, 1), st.integers(0, 600), st.floats(0, 1), st.floats(0, 1), st.integers(0, 400))
def test_schedules_stay_in_bounds(steps, soft, anneal, warmup, floor, step) -> None:
    schedule = Schedule.from_fractions(steps, soft=soft, anneal_steps=anneal, warmup=warmup, floor=floor, threshold=0.5)
    step = min(step, steps - 1)
    assert 0 <= schedule.alpha(step) <= 1
    assert schedule.alpha(step) <= schedule.alpha(step + 1)
    assert 0 < schedule.learning_rate(step) <= 1 or (floor == 0 and schedule.learning_rate(step) >= 0)
    if step >= schedule.warmup_steps:
        assert schedule.learning_rate(step) >= floor - 1e-12
        assert schedule.learning_rate(step + 1) <= schedule.learning_rate(step)
    frozen = schedule.phase(step) != "soft"
    assert schedule.predictor_learning_rate(step) == (0.0 if frozen else schedule.learning_rate(step))
    assert isinstance(schedule.gate(step), SoftGate) != frozen


def test_learning_rate_warms_up_and_ends_at_the_floor() -> None:
    schedule = Schedule(steps=110, soft_steps=60, anneal_steps=0, warmup_steps=10, floor=0.2, threshold=0.5)
    assert [schedule.learning_rate(s) for s in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert schedule.learning_rate(60) == pytest.approx(0.6)
    assert schedule.learning_rate(110) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"soft_steps": 101},
        {"soft_steps": -1},
        {"anneal_steps": 60},
        {"warmup_steps": 101},
        {"floor": 1.5},
        {"threshold": 1.0},
    ],
)
def test_schedules_that_do_not_fit(change) -> None:
    fields = dict(steps=100, soft_steps=50, anneal_steps=10, warmup_steps=5, floor=0.1, threshold=0.5)
    with pytest.raises(ValueError, match="must"):
        Schedule(**{**fields, **change})


class Plant:
    """Many pairs whose benefit is log-normal, and Adam on a linear predictor of it: what training does to density.

    `speed` is how far a logit moves in a step; heads differ in how useful their pairs are.
    """

    def __init__(self, steps: int, speed: float, bias: float = 2.0, seed: int = 0):
        self.random = np.random.default_rng(seed)
        heads, pairs, features = 6, 400, 8
        self.x = self.random.standard_normal((heads, pairs, features))
        direction = self.random.standard_normal((heads, features))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        benefit = np.einsum("hnf,hf->hn", self.x, direction) * 1.2 + self.random.normal(0, 0.6, (heads, pairs))
        self.benefit = np.exp(benefit + self.random.normal(0, 1.2, (heads, 1)) + math.log(0.0045))
        self.x = np.concatenate([np.ones((heads, pairs, 1)), self.x], axis=2)
        self.weight = np.zeros((heads, features + 1))
        self.weight[:, 0] = bias
        self.mean, self.square = np.zeros_like(self.weight), np.zeros_like(self.weight)
        self.steps, self.speed, self.step = steps, speed, 0

    def logits(self) -> np.ndarray:
        return np.einsum("hnf,hf->hn", self.x, self.weight)

    def density(self) -> float:
        return float((self.logits() > 0).mean())

    def train(self, weight: float) -> float:
        """One step; returns the density that a batch would show."""
        u = 1 / (1 + np.exp(-self.logits()))
        noise = 1 + 0.5 * self.random.standard_normal(u.shape)
        gradient = np.einsum("hn,hnf->hf", (weight - self.benefit * noise) * u * (1 - u), self.x) / u.shape[1]
        self.step += 1
        self.mean += 0.1 * (gradient - self.mean)
        self.square += 0.05 * (gradient**2 - self.square)
        mean, square = self.mean / (1 - 0.9**self.step), self.square / (1 - 0.95**self.step)
        rate = self.speed * min(1.0, self.step / (0.05 * self.steps))
        self.weight -= rate * mean / (np.sqrt(square) + 1e-12)
        return self.density() * (1 + 0.03 * self.random.standard_normal())


def run(plant: Plant, controller: DensityController, steps: range) -> list[float]:
    """Drive the plant; returns the weights used. Measurements are collected between the controller's looks."""
    weights, measured = [], []
    for step in steps:
        weights.append(controller.weight)
        measured.append(plant.train(controller.weight))
        if controller.due(step):
            controller.update(step, float(np.mean(measured)))
            measured.clear()
    return weights


@pytest.mark.parametrize("target", [0.1, 0.25, 0.5])
@pytest.mark.parametrize(
    ("soft_steps", "speed", "bias"), [(200, 0.15, 2.0), (400, 0.04, 2.0), (400, 0.15, 5.0), (1500, 0.04, 2.0)]
)
def test_controller_reaches_its_target(target, soft_steps, speed, bias) -> None:
    plant, controller = Plant(int(soft_steps / 0.65), speed, bias), DensityController(target, soft_steps, 0.015)
    run(plant, controller, range(soft_steps))
    assert plant.density() == pytest.approx(target, rel=0.12)


def test_controller_goes_on_exactly_from_its_state() -> None:
    through, controller = Plant(300, 0.15), DensityController(0.25, 200, 0.015)
    expected = run(through, controller, range(200))
    plant, first = Plant(300, 0.15), DensityController(0.25, 200, 0.015)
    actual = run(plant, first, range(100))
    second = DensityController(0.25, 200, 0.015)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    actual += run(plant, second, range(100, 200))
    assert actual == expected


def test_controller_looks_a_hundred_times_and_not_after_the_soft_phase() -> None:
    assert sum(DensityController(0.2, 1000, 0.01).due(s) for s in range(2000)) == 100
    assert sum(DensityController(0.2, 30, 0.01).due(s) for s in range(2000)) == 30


def test_controller_stays_within_its_span() -> None:
    controller = DensityController(0.2, 100, 0.01)
    for step in range(100):
        controller.update(step, 1.0)
        assert controller.weight <= 0.01 * 30 * 1.0001
    for step in range(100):
        controller.update(step, 0.0)
        assert controller.weight == 0.0 or controller.weight >= 0.01 / 30 / 1.0001
    assert controller.weight == 0.0


def test_controllers_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="target_density"):
        DensityController(1.0, 10, 0.01)
    with pytest.raises(ValueError, match="start above 0"):
        DensityController(0.5, 10, 0.0)
