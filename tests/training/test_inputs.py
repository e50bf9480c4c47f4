from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spkv.checkpoint import load_base
from spkv.gates import OpenGate
from spkv.hf.attach import attach, attachment
from spkv.predictor import UtilityPredictor
from spkv.training.data import PackedRows, spread
from spkv.training.inputs import inputs_of, measure_inputs
from spkv.training.parameters import prepare_parameters
from spkv.training.tokens import tokenize_files


@given(depth=st.integers(1, 3), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_folding_changes_nothing_but_the_weights(depth: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    predictor = UtilityPredictor(7, 2, width, 0.5, depth)
    hidden_states = 3 * torch.randn(2, 5, 7) + torch.arange(7)
    assert torch.equal(_plain(predictor)(hidden_states), predictor(hidden_states))
    before = predictor(hidden_states)
    predictor.standardise_inputs(torch.randn(7), torch.rand(7) + 0.1)
    expected = predictor(hidden_states)
    assert not torch.allclose(expected, before)
    folded = _plain(predictor)
    predictor.fold_inputs()
    assert predictor.input_mean is None
    assert predictor.state_dict().keys() == UtilityPredictor(7, 2, width, 0.5, depth).state_dict().keys()
    for one in (predictor, folded):
        assert torch.allclose(one(hidden_states), expected, atol=1e-6)


def _plain(predictor: UtilityPredictor) -> UtilityPredictor:
    """Another predictor, of the parameters that would be saved."""
    other = copy.deepcopy(predictor)
    other.input_mean = other.input_scale = None
    other.load_state_dict(predictor.plain_parameters())
    return other


def test_each_channel_has_mean_0_and_variance_1(model_directory, text_file, tokenizer, recipe_of) -> None:
    recipe = recipe_of(standardised_inputs=True)
    model = prepare_parameters(attach(load_base(model_directory), recipe.config()), recipe)
    rows = spread(PackedRows(tokenize_files([text_file], tokenizer, progress=False), 64), 300)
    measure_inputs(model, rows, Accelerator(cpu=True))

    read: dict[int, list[Tensor]] = {}
    for layer, predictor in attachment(model).predictors.items():
        predictor.up.register_forward_pre_hook(
            lambda _, args, layer=layer: read.setdefault(layer, []).append(args[0].flatten(0, 1))
        )
    for row in rows:
        with torch.no_grad(), attachment(model).using(OpenGate()):
            model(**{key: value[None] for key, value in row.items()}, use_cache=False)
    assert len(read) == 2
    for inputs in map(torch.cat, read.values()):
        assert inputs.mean(0).abs().max() < 1e-4
        assert inputs.var(0).sub(1).abs().max() < 0.03  # the smallest variances are damped


def test_a_channel_that_does_not_vary_is_not_blown_up(model_directory, text_file, tokenizer, recipe_of) -> None:
    recipe = recipe_of(standardised_inputs=True)
    base = load_base(model_directory)
    with torch.no_grad():
        base.model.layers[0].input_layernorm.weight[3] = 0.0
    model = prepare_parameters(attach(base, recipe.config()), recipe)
    rows = spread(PackedRows(tokenize_files([text_file], tokenizer, progress=False), 64), 300)
    measure_inputs(model, rows, Accelerator(cpu=True))
    scale = attachment(model).predictors[0].input_scale
    assert scale[3] < 100 * scale.median()
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize(("name", "wanted"), [("fast", True), ("fast", False), ("dense-control", True)])
def test_a_trainer_measures_what_the_recipe_wants(make_trainer, recipe_of, name, wanted) -> None:
    trainer = make_trainer(recipe_of(name, steps=2, standardised_inputs=wanted))
    assert not inputs_of(trainer.model)
    trainer.train()
    assert len(inputs_of(trainer.model)) == (4 if wanted and name == "fast" else 0)
