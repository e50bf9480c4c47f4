from __future__ import annotations

import json

import pytest

from spkv.config import SPKVConfig
from spkv.training.recipes import RECIPES, Recipe, get_recipe


def test_published_constants() -> None:
    recipe = get_recipe("paper")
    assert recipe.config() == SPKVConfig(window=128, threshold=0.5, initial_bias=5.0)
    assert (recipe.predictor_lr_multiplier, recipe.predictor_weight_decay) == (5.0, 0.1)
    assert (recipe.soft_fraction, recipe.anneal_steps) == (0.75, 500)
    assert (recipe.regulariser, recipe.target_density) == (0.0, None)
    schedule = recipe.schedule(recipe.total_steps(8_100_000_000))
    assert schedule.anneal_steps == 500
    assert schedule.steps * recipe.tokens_per_step == pytest.approx(20 * 8.1e9, rel=1e-4)


def test_the_predictor_learns_as_fast_with_lora() -> None:
    full, lora = get_recipe("fast"), get_recipe("fast-lora")
    assert lora.lora_rank is not None
    rates = [recipe.learning_rate * recipe.predictor_lr_multiplier for recipe in (full, lora)]
    assert rates[0] == pytest.approx(rates[1])


@pytest.mark.parametrize("name", ["fast", "fast-lora"])
def test_another_learning_rate_is_the_models_alone(name) -> None:
    usual, lower = get_recipe(name), get_recipe(name, learning_rate=1e-5)
    assert lower.learning_rate == 1e-5
    assert lower.predictor_lr_multiplier * 1e-5 == pytest.approx(usual.predictor_lr_multiplier * usual.learning_rate)
    both = get_recipe(name, learning_rate=1e-5, predictor_lr_multiplier=7.0)
    assert (both.learning_rate, both.predictor_lr_multiplier) == (1e-5, 7.0)
    assert get_recipe("paper", learning_rate=1e-5).predictor_lr_multiplier == 5.0
    # Where the predictor alone is trained, there is no other rate.
    assert get_recipe("fast-frozen", learning_rate=1e-5).predictor_lr_multiplier == 25.0
    assert get_recipe("fast", learning_rate=1e-5, freeze_model=True).predictor_lr_multiplier == 25.0


def test_the_control_differs_from_fast_in_its_gates_alone() -> None:
    fast, control = get_recipe("fast").to_dict(), get_recipe("dense-control").to_dict()
    assert {key for key in fast if fast[key] != control[key]} == {
        "name",
        "gates",
        "regulariser",
        "regulariser_form",
        "target_density",
    }


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_named_and_plain_json(name) -> None:
    recipe = get_recipe(name)
    assert recipe.name == name
    stored = json.loads(json.dumps(recipe.to_dict()))
    assert Recipe(**stored) == recipe


def test_changing_the_length_unsets_the_others() -> None:
    assert get_recipe("paper", steps=7).total_steps(10**9) == 7
    assert get_recipe("fast", tokens=65_537).total_steps(10**9) == 3
    assert get_recipe("fast", steps=5).tokens is None


def test_errors_name_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'quick'.*paper, fast"):
        get_recipe("quick")
    with pytest.raises(ValueError, match=r"no fields \['widow'\].*window"):
        get_recipe("fast", widow=3)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"steps": 3, "tokens": 3},
        {"tokens": None},
        {"learning_rate": 0.0},
        {"soft_fraction": 1.2},
        {"regulariser": -0.1},
        {"target_density": 1.0},
        {"target_density": 0.3, "gates": False},
        {"lora_rank": 0},
        {"lora_alpha": 8},
        {"regulariser_form": "cubic"},
        {"freeze_model": True, "gates": False},
        {"freeze_model": True, "lora_rank": 8},
        {"predictor_depth": 0},
        {"window": 0},
        {"threshold": 0.0},
    ],
)
def test_values_that_are_not_allowed(changes) -> None:
    with pytest.raises(ValueError, match=r"must|needs"):
        get_recipe("fast", **changes)


def test_values_of_another_type() -> None:
    with pytest.raises(TypeError, match="learning_rate must be a number"):
        get_recipe("fast", learning_rate="3e-4")
    with pytest.raises(TypeError, match="steps must be a whole number"):
        get_recipe("fast", steps=2.5)
