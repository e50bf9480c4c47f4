"""The runs of `benchmarks.recipes`: each is a recipe with a name, and suites are lists of them.

A run may have a static layout in place of gates (`spkv hybrid` chooses one). A run's increase of the loss is told from
its control: the same model trained dense on the same tokens, with the same learning rate, sequence length and LoRA.
Runs that agree in these share one control.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spkv.checkpoint import stored_config
from spkv.inspect.hybrid import REPORT
from spkv.training.recipes import RECIPES, Recipe, get_recipe, with_layout

BUDGETS = (10, 20, 50, 100)
"""Millions of training tokens."""

TARGETS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
RANKS = (8, 16, 32, 64)

# What a control has no use for: without gates these fields change nothing.
_UNUSED_BY_CONTROLS = (
    "name",
    "gates",
    "window",
    "threshold",
    "initial_bias",
    "predictor_width",
    "predictor_depth",
    "predictor_lr_multiplier",
    "standardised_inputs",
    "predictor_weight_decay",
    "soft_fraction",
    "anneal_steps",
    "anneal_form",
    "gate_noise",
    "sinks",
    "regulariser",
    "regulariser_form",
    "freeze_model",
    "target_density",
    "layout",
)
_RETRIEVAL = "+retrieval"
_WORDS = {"True": True, "False": False, "None": None}
_LENGTHS = ("steps", "tokens", "tokens_per_parameter")


@dataclass(frozen=True)
class Run:
    """A run of the trainer: what it is called, what it does, and whether retrieval data are mixed in.

    `strategy` and `coverage` say how its static layout was chosen, and what share of measured utility is in its global
    heads.
    """

    name: str
    recipe: Recipe
    retrieval: bool = False
    strategy: str | None = None
    coverage: float | None = None

    @property
    def method(self) -> str:
        """What of the model is trained; "layout" with a static one, "dense" for a control."""
        if self.recipe.layout is not None:
            return "layout"
        if not self.recipe.gates:
            return "dense"
        if self.recipe.freeze_model:
            return "frozen"
        return "full" if self.recipe.lora_rank is None else "lora"

    @property
    def reference(self) -> str:
        """Which policy of the control tells what pruning costs: a frozen model is compared with itself."""
        return "base" if self.recipe.freeze_model else "dense"

    def with_changes(self, changes: dict[str, Any]) -> Run:
        """Vary the recipe; the name says how."""
        if not changes:
            return self
        name = " ".join([self.name, *_settings(changes)])
        return dataclasses.replace(self, name=name, recipe=self.recipe.replace(**changes))

    def with_layout(self, directory: Path) -> Run:
        """Train the layout of a checkpoint that `spkv hybrid` wrote, in place of gates.

        Raises:
            ValueError: if there is none.
        """
        config = stored_config(directory)
        if config is None or config.layout is None:
            raise ValueError(f"{directory} holds no static layout; `spkv hybrid` writes them")
        report = json.loads((directory / REPORT).read_text(encoding="utf-8"))
        control = control_of(self)
        settings = dict(
            layout=f"{report['strategy']}-{report['global_heads']}", window=config.window, sinks=config.sinks
        )
        name = " ".join([control.name.removeprefix("dense-"), *_settings(settings)])
        recipe = with_layout(control.recipe, config)
        return Run(name, recipe, self.retrieval, report["strategy"], report["utility_covered"])


def control_of(run: Run) -> Run:
    """Return the dense control of a run; equal for runs that share one."""
    rank = run.recipe.lora_rank
    usual = get_recipe("dense-control") if rank is None else get_recipe("dense-control", lora_rank=rank)
    recipe = dataclasses.replace(run.recipe, **{name: getattr(usual, name) for name in _UNUSED_BY_CONTROLS})
    changed = {} if rank is None else {"lora_rank": rank}
    for name, value in dataclasses.asdict(recipe).items():
        if name not in _LENGTHS and value != getattr(usual, name):
            changed[name] = value
    name = f"dense-{_length(recipe)}" + _RETRIEVAL * run.retrieval
    return Run(" ".join([name, *_settings(changed)]), recipe, run.retrieval)


def with_controls(runs: Iterable[Run]) -> Iterator[Run]:
    """Yield each run after its control, and none twice."""
    seen: dict[str, Run] = {}
    for run in runs:
        for one in (control_of(run), run):
            if one.name not in seen:
                seen[one.name] = one
                yield one
            elif seen[one.name] != one:
                raise ValueError(f"two runs are called {one.name!r}")


def frontier(budgets: Sequence[int] = BUDGETS, targets: Sequence[float] = TARGETS) -> list[Run]:
    """`fast` at each budget and density, cheap budgets first."""
    return [_full(budget, target) for budget in budgets for target in targets]


def lora(budget: int = 20, targets: Sequence[float] = (0.1, 0.2, 0.3)) -> list[Run]:
    """LoRA of several ranks, and full training, at one budget."""
    ranks = [_lora(rank, budget, target) for rank in RANKS for target in targets]
    return [*(_full(budget, target) for target in targets), *ranks]


def adapter() -> list[Run]:
    """The adapter of SmolLM2 that ships: LoRA and predictors, within 25 MB."""
    recipe = get_recipe("fast", tokens=30 * 10**6, target_density=0.2, lora_rank=24, predictor_width=256)
    return [Run("adapter", recipe)]


def targets(budget: int = 20) -> list[Run]:
    """Whether `target_density` is met."""
    wanted = (0.1, 0.2, 0.3, 0.4, 0.5)
    return [*(_full(budget, d) for d in wanted), *(_lora(32, budget, d) for d in wanted)]


def ablations(budget: int = 20, target: float = 0.2) -> list[Run]:
    """One choice of `fast` changed at a time, at one budget and target: what differs is the loss."""
    varied: dict[str, Sequence[Any]] = {
        "threshold": (0.1, 0.3, 0.7),
        "initial_bias": (0.0, 1.0, 3.0, 5.0, 20.0),
        "predictor_lr_multiplier": (1.0, 5.0, 10.0, 50.0),
        "predictor_width": (36, 144, 1152),
        "predictor_depth": (1, 3),
        "regulariser_form": ("linear", "square", "log", "binary"),
        "freeze_model": (True,),
        "window": (1, 16, 32, 64, 256, 512),
        "predictor_weight_decay": (0.0,),
        "weight_decay": (0.0,),
        "soft_fraction": (0.45, 0.55, 0.75, 0.85, 1.0),
        "anneal_steps": (0, 120, 240),
        "anneal_form": ("power",),
        "gate_noise": (0.5, 1.0, 2.0),
        "sequence_length": (2048, 8192),
    }
    changes = [{name: value} for name, values in varied.items() for value in values]
    base = _full(budget, target)
    return [base, *(base.with_changes(change) for change in changes)]


def hardening(budget: int = 10, target: float = 0.1) -> list[Run]:
    """Ways to lose less as gates become hard, at a low density, where soft gates would like to stay half open."""
    linear = {"regulariser_form": "linear"}
    changes: list[dict[str, Any]] = [
        linear,
        {**linear, "gate_noise": 1},
        {"gate_noise": 1},
        {"soft_fraction": 0.5},
        {"anneal_form": "power", "anneal_steps": 120},
    ]
    base = _full(budget, target)
    return [base, *(base.with_changes(change) for change in changes)]


def scratch(budgets: Sequence[int] = (100, 200), targets: Sequence[float] = (0.1, 0.15, 0.25)) -> list[Run]:
    """A model from scratch (see `benchmarks.from_scratch`), self-pruned from its first step.

    Free of a target, and of a regulariser as published, and to several densities.
    """
    runs = []
    for budget in budgets:
        free = get_recipe(
            "fast",
            tokens=budget * 10**6,
            sequence_length=2048,
            learning_rate=1e-3,
            predictor_lr_multiplier=5.0,
            initial_bias=5.0,
            regulariser=0.0,
            target_density=None,
            soft_fraction=0.75,
            anneal_steps=200,
        )
        runs.append(Run(f"scratch-{budget}M", free))
        for target in targets:
            runs.append(Run(f"scratch-{budget}M-d{target:g}", free.replace(target_density=target, initial_bias=2.0)))
    return runs


def retrieval(budget: int = 20, targets: Sequence[float] = (0.1, 0.2)) -> list[Run]:
    """With and without retrieval data mixed in (see `benchmarks.retrieval_data`)."""
    plain = [_full(budget, target) for target in targets]
    return [*plain, *(Run(run.name + _RETRIEVAL, run.recipe, retrieval=True) for run in plain)]


SUITES = {
    "frontier": frontier,
    "targets": targets,
    "lora": lora,
    "adapter": adapter,
    "ablations": ablations,
    "hardening": hardening,
    "retrieval": retrieval,
    "scratch": scratch,
}


def known_runs() -> dict[str, Run]:
    """Every run of every suite, and the recipes themselves, by name."""
    recipes = [Run(name, get_recipe(name)) for name in RECIPES if name != "dense-control"]
    return {run.name: run for run in (*recipes, *(run for suite in SUITES.values() for run in suite()))}


def known_controls() -> dict[str, Run]:
    """The controls of `known_runs`, by name."""
    return {control.name: control for control in map(control_of, known_runs().values())}


def find_run(name: str) -> Run:
    """Return a known run or control; further words of a name change its recipe, as in "20M-d0.2 window=32".

    They change what they name and nothing else: `learning_rate` moves the predictor's, too, by its multiplier.

    Raises:
        ValueError: if there is none, or a word is not of the form FIELD=VALUE.
    """
    known = known_controls() | known_runs()
    if name in known:
        return known[name]
    base, *settings = name.split() or [""]
    if base not in known:
        raise ValueError(f"unknown run {base!r}; --suite NAME --list shows those of a suite")
    return known[base].with_changes(dict(map(parse_setting, settings)))


def parse_setting(text: str) -> tuple[str, Any]:
    """Parse FIELD=VALUE; the value is JSON, True, False, None, or else a string.

    Raises:
        ValueError: if the form is another.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not of the form FIELD=VALUE")
    try:
        return name, _WORDS[value] if value in _WORDS else json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _full(budget: int, target: float) -> Run:
    return Run(f"{budget}M-d{target:g}", get_recipe("fast", tokens=budget * 10**6, target_density=target))


def _lora(rank: int, budget: int, target: float) -> Run:
    recipe = get_recipe("fast", tokens=budget * 10**6, target_density=target, lora_rank=rank)
    return Run(f"lora{rank}-{budget}M-d{target:g}", recipe)


def _settings(changes: dict[str, Any]) -> list[str]:
    return [f"{name}={_value(value)}" for name, value in changes.items()]


def _value(value: Any) -> str:
    """As `parse_setting` takes it, without spaces."""
    return json.dumps(value, separators=(",", ":")) if isinstance(value, (list, tuple)) else str(value)


def _length(recipe: Recipe) -> str:
    if recipe.tokens is not None:
        return f"{recipe.tokens / 1e6:g}M"
    return f"{recipe.steps}-steps" if recipe.steps is not None else f"{recipe.tokens_per_parameter:g}-per-parameter"
