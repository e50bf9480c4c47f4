"""Recipes: how to adapt a model. Each is a function that varies another; `RECIPES` names them.

"Published" below means SP-KV, arXiv 2605.14037, trained at 8.1B parameters. "Trials" are our own, on SmolLM2-135M
with one H100 and single seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spkv.config import SPKVConfig
from spkv.gates import ANNEALING, SINKS, NoisyGate
from spkv.training.regularisers import FORMS
from spkv.training.schedule import Schedule

START_OF_CONTROL = 0.015
"""Lambda that a controlled density starts from by default: with the linear form it gave density 0.28 in our trials."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, apart from model, data and seed.

    Exactly one of `steps`, `tokens` and `tokens_per_parameter` sets the length of the run.

    Attributes:
        name: the recipe's name in `RECIPES`, kept when fields are changed.
        window, threshold, initial_bias, predictor_width, predictor_depth: see `SPKVConfig`.
        gates: False trains with all gates open and no predictor: the control.
        steps: optimiser steps.
        tokens: training tokens.
        tokens_per_parameter: training tokens as a multiple of the model's parameters.
        sequence_length: tokens in a row.
        tokens_per_step: tokens in an optimiser step, over all processes.
        learning_rate: peak, of the model (of the LoRA matrices where there are any).
        predictor_lr_multiplier: the predictor's learning rate as a multiple of the model's.
        standardised_inputs: give predictors inputs of mean 0 and variance 1 in each channel; see `training.inputs`.
        floor: where the cosine ends, as a fraction of the peak.
        warmup_fraction: part of the steps in which the learning rate rises.
        weight_decay: on the model's matrices; norms, biases and embeddings have none.
        predictor_weight_decay: on all of the predictor.
        betas: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        soft_fraction: part of the steps with soft gates; after it the predictor is frozen.
        anneal_steps: steps from soft to hard gates, half of the remaining ones at most.
        anneal_form: how they get there, one of `spkv.gates.ANNEALING`.
        gate_noise: amplitude that the noise on soft gates rises to; see `spkv.gates.NoisyGate`.
        regulariser: lambda of the added loss `lambda * mean(u)` over the pairs that leave the window.
        regulariser_form: what takes the place of u in it, a name in `regularisers.FORMS`.
        target_density: where the density should end; lambda is then controlled, starting from `regulariser`, or
            from `START_OF_CONTROL` where that is 0.
        lora_rank: rank of LoRA on the linear layers of the decoder; None trains the whole model.
        lora_alpha: LoRA's scale is lora_alpha / lora_rank.
        freeze_model: train the predictor alone. Published: it then keeps 82 % of the pairs, where nothing asks for
            less; asked for 0.2, SmolLM2-135M's kept 0.197.
        layout: a static layout, as in `SPKVConfig`, that the model is trained with; then there are no gates to learn.
        sinks: as in `SPKVConfig`; predictors then learn nothing about these positions.
    """

    name: str
    window: int = 128
    threshold: float = 0.5
    initial_bias: float = 5.0
    predictor_width: int | None = None
    predictor_depth: int = 2
    gates: bool = True
    steps: int | None = None
    tokens: int | None = None
    tokens_per_parameter: float | None = None
    sequence_length: int = 4096
    tokens_per_step: int = 32_768
    learning_rate: float = 3e-4
    predictor_lr_multiplier: float = 5.0
    standardised_inputs: bool = False
    floor: float = 0.05
    warmup_fraction: float = 0.05
    weight_decay: float = 0.1
    predictor_weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    soft_fraction: float = 0.75
    anneal_steps: int = 500
    anneal_form: str = "linear"
    gate_noise: float = 0.0
    regulariser: float = 0.0
    regulariser_form: str = "linear"
    target_density: float | None = None
    lora_rank: int | None = None
    lora_alpha: int | None = None
    freeze_model: bool = False
    layout: tuple[tuple[int, ...], ...] | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        # Checks its own fields, and gives the layout the form that equal ones share.
        object.__setattr__(self, "layout", self.config().layout)
        lengths = {name: getattr(self, name) for name in ("steps", "tokens", "tokens_per_parameter")}
        given = {name: value for name, value in lengths.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"a recipe needs exactly one of {', '.join(lengths)}, not {given or 'none'}")
        for name in (
            "steps",
            "tokens",
            "sequence_length",
            "tokens_per_step",
            "anneal_steps",
            "lora_rank",
            "lora_alpha",
        ):
            if not isinstance(getattr(self, name), (int, type(None))):
                raise TypeError(f"{name} must be a whole number, not {getattr(self, name)!r}")
        for name in (*given, "sequence_length", "tokens_per_step", "learning_rate", "max_grad_norm"):
            _check(name, getattr(self, name), "above 0", lambda value: value > 0)
        for name in ("soft_fraction", "floor", "warmup_fraction"):
            _check(name, getattr(self, name), "in [0, 1]", lambda value: 0 <= value <= 1)
        for name in (
            "predictor_lr_multiplier",
            "weight_decay",
            "predictor_weight_decay",
            "anneal_steps",
            "regulariser",
        ):
            _check(name, getattr(self, name), "at least 0", lambda value: value >= 0)
        if self.target_density is not None:
            _check("target_density", self.target_density, "strictly in (0, 1)", lambda value: 0 < value < 1)
            if not self.gates:
                raise ValueError(f"target_density needs gates, which the recipe {self.name} has none of: leave it out")
        if self.layout is not None and self.gates:
            raise ValueError("a static layout has no gates to train: use `with_layout`")
        if self.lora_rank is not None:
            _check("lora_rank", self.lora_rank, "at least 1", lambda value: value >= 1)
        elif self.lora_alpha is not None:
            raise ValueError("lora_alpha needs lora_rank")
        if self.anneal_form not in ANNEALING:
            raise ValueError(f"anneal_form must be one of {', '.join(ANNEALING)}, not {self.anneal_form!r}")
        NoisyGate(self.gate_noise)  # checks it
        if self.regulariser_form not in FORMS:
            raise ValueError(f"regulariser_form must be one of {', '.join(FORMS)}, not {self.regulariser_form!r}")
        if self.freeze_model and (not self.gates or self.lora_rank is not None):
            raise ValueError("freeze_model leaves the predictor alone to train: it needs gates, and no lora_rank")
        object.__setattr__(self, "betas", tuple(self.betas))

    def config(self) -> SPKVConfig:
        """Return the configuration of the attachment."""
        return SPKVConfig(
            window=self.window,
            threshold=self.threshold,
            predictor_width=self.predictor_width,
            predictor_depth=self.predictor_depth,
            initial_bias=self.initial_bias,
            layout=self.layout,
            sinks=self.sinks,
        )

    @property
    def makes_adapter(self) -> bool:
        """Whether the model's own weights stay as they are, and the result is an adapter."""
        return self.lora_rank is not None or self.freeze_model

    @property
    def is_control(self) -> bool:
        """Whether every pair is kept in training, and the result is an ordinary model."""
        return not self.gates and self.layout is None

    def total_steps(self, parameters: int) -> int:
        """Return the optimiser steps of a run on a model with so many parameters."""
        if self.steps is not None:
            return self.steps
        tokens = self.tokens if self.tokens is not None else (self.tokens_per_parameter or 0) * parameters
        return math.ceil(tokens / self.tokens_per_step)

    def schedule(self, steps: int) -> Schedule:
        """Return the schedule of a run of `steps`."""
        return Schedule.from_fractions(
            steps,
            soft=self.soft_fraction,
            anneal_steps=self.anneal_steps,
            warmup=self.warmup_fraction,
            floor=self.floor,
            threshold=self.threshold,
            anneal_form=self.anneal_form,
            gate_noise=self.gate_noise,
        )

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with some fields changed, checked again. Setting one length unsets the others.

        Raises:
            ValueError: for a field that does not exist, naming those that do, or a value that is not allowed.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(changes) - set(known)):
            raise ValueError(f"a recipe has no fields {unknown}; it has {known}")
        lengths = ("steps", "tokens", "tokens_per_parameter")
        if any(changes.get(name) is not None for name in lengths):
            changes = {**dict.fromkeys(lengths), **changes}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        layout = None if self.layout is None else [list(heads) for heads in self.layout]
        return {**dataclasses.asdict(self), "betas": list(self.betas), "layout": layout}


def paper() -> Recipe:
    """The published schedule: long, no regulariser.

    Published: bias +5, predictor learning rate 5 times the model's, predictor weight decay 0.1, soft gates for 75 %
    of the steps, 500 steps of annealing, window 128, threshold 0.5, cosine decay, about 20 tokens per parameter.
    Ours, for want of better knowledge: the learning rate, its floor and warm-up, AdamW's betas, the batch.
    """
    return Recipe(
        "paper",
        tokens_per_parameter=20.0,
        window=128,
        threshold=0.5,
        initial_bias=5.0,
        predictor_lr_multiplier=5.0,
        predictor_weight_decay=0.1,
        soft_fraction=0.75,
        anneal_steps=500,
    )


def fast() -> Recipe:
    """Minutes instead of days: what worked in our trials, where the published schedule does not move yet.

    Gates start lower (bias 2), the predictor learns 25 times as fast as the model, and a controlled regulariser leads
    to a density of 0.2; hard gates for 35 % of the steps. Half-open gates pay nearly the full price, since a model
    that reads through them misses what it read once gates are hard. SmolLM2-135M keeps 0.198 at +0.16 % loss after 10M
    tokens, and with a target of 0.1 it keeps 0.098 at +0.31 % after 50M.
    """
    return dataclasses.replace(
        paper(),
        name="fast",
        tokens_per_parameter=None,
        tokens=20_000_000,
        initial_bias=2.0,
        predictor_lr_multiplier=25.0,
        regulariser=0.015,
        regulariser_form="concave",
        target_density=0.2,
        soft_fraction=0.65,
        anneal_steps=60,
    )


def with_learning_rate(recipe: Recipe, learning_rate: float) -> Recipe:
    """Vary the learning rate of the model alone: the predictor keeps the one it has in `recipe`."""
    changed = recipe.replace(learning_rate=learning_rate)
    multiplier = recipe.predictor_lr_multiplier * recipe.learning_rate / learning_rate
    return changed.replace(predictor_lr_multiplier=multiplier)


def with_lora(recipe: Recipe, rank: int) -> Recipe:
    """Vary a recipe to train LoRA of this rank in place of the whole model: an adapter of a few MB.

    LoRA wants a higher learning rate, 1e-3 in our trials. The scale is 2 at every rank.
    """
    return dataclasses.replace(with_learning_rate(recipe, 1e-3), lora_rank=rank, lora_alpha=2 * rank)


def with_layout(recipe: Recipe, config: SPKVConfig) -> Recipe:
    """Vary a recipe to train a model with the static layout of `config`: its gates are constant, and so its density."""
    return dataclasses.replace(_without_gates(recipe), window=config.window, layout=config.layout, sinks=config.sinks)


def fast_lora() -> Recipe:
    """`fast` with LoRA of rank 32."""
    return dataclasses.replace(with_lora(fast(), 32), name="fast-lora")


def fast_frozen() -> Recipe:
    """`fast` for the predictors alone: an adapter, and with all gates open the model is what it was.

    Gates are soft to the end: hard ones teach the predictor nothing, and there is nothing else that could get used to
    them. Noise makes them decide all the same. First positions are kept: a model that cannot change misses them most,
    and with soft gates it shows late.
    """
    return dataclasses.replace(
        fast(), name="fast-frozen", freeze_model=True, soft_fraction=1.0, anneal_steps=0, gate_noise=1.0, sinks=SINKS
    )


def dense_control() -> Recipe:
    """The control run of `fast`: the same model, tokens and learning rates, all gates open, no predictor.

    Adaptation data alone changes a model's loss; what pruning costs is the difference to this run.
    """
    return dataclasses.replace(_without_gates(fast()), name="dense-control")


def _without_gates(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, gates=False, regulariser=0.0, regulariser_form="linear", target_density=None)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "paper": paper,
    "fast": fast,
    "fast-lora": fast_lora,
    "fast-frozen": fast_frozen,
    "dense-control": dense_control,
}


def get_recipe(name: str, **changes: Any) -> Recipe:
    """Return the recipe called `name`, with some fields changed.

    `lora_rank` makes it `with_lora`, and `learning_rate`, without `predictor_lr_multiplier`, `with_learning_rate`. (But
    of `paper` the multiplier stays: it is what is published; and where the model is frozen.)

    Raises:
        ValueError: for an unknown name or field, naming the known ones.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known are {', '.join(RECIPES)}")
    recipe = RECIPES[name]()
    if changes.get("lora_rank"):
        recipe = with_lora(recipe, changes["lora_rank"])
    frozen = recipe.freeze_model or changes.get("freeze_model")  # the predictor's rate is all there is
    if name != "paper" and not frozen and "learning_rate" in changes and "predictor_lr_multiplier" not in changes:
        recipe = with_learning_rate(recipe, changes.pop("learning_rate"))
    return recipe.replace(**changes)


def _check(name: str, value: Any, allowed: str, test: Callable[[Any], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not test(value):
        raise ValueError(f"{name} must be {allowed}, not {value!r}")
