from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from spkv.checkpoint import load_base
from spkv.gates import OpenGate
from spkv.hf.attach import attach, attachment
from spkv.training.parameters import parameter_groups, prepare_parameters
from spkv.training.recipes import START_OF_CONTROL
from spkv.training.regularisers import FORMS
from spkv.training.schedule import DensityController
from spkv.training.trainer import AdaptationTrainer


def weights(model: nn.Module, part: str = "") -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if part in name}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def history(trainer: AdaptationTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_the_predictor_is_frozen_bit_for_bit_while_the_model_goes_on(make_trainer, recipe_of) -> None:
    seen: list[tuple[str, dict[str, Tensor], dict[str, Tensor]]] = []

    def look(trainer: AdaptationTrainer) -> None:
        phase = trainer.schedule.phase(min(trainer.state.global_step, 11))
        seen.append((phase, weights(trainer.model, "utility_predictor"), weights(trainer.model, "q_proj")))

    make_trainer(recipe_of(), look=look).train()
    assert [phase for phase, _, _ in seen] == ["soft"] * 6 + ["anneal"] * 3 + ["hard"] * 4
    for (phase, predictor, model), (_, next_predictor, next_model) in itertools.pairwise(seen):
        assert equal(predictor, next_predictor) == (phase != "soft")
        assert not equal(model, next_model)


def test_a_frozen_model_stays_bit_for_bit_while_the_predictor_learns(make_trainer, recipe_of) -> None:
    trainer = make_trainer(recipe_of(freeze_model=True))
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, weight in weights(trainer.model).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if "utility_predictor" in name}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_regulariser_closes_gates(make_trainer, recipe_of, form) -> None:
    recipe = recipe_of(steps=6, soft_fraction=1.0, regulariser=3.0, regulariser_form=form)
    trainer = make_trainer(recipe)
    trainer.train()
    utilities = history(trainer, "mean_utility")
    assert utilities[-1] < utilities[0]


def test_the_gate_follows_the_schedule(make_trainer, recipe_of) -> None:
    gates = []
    trainer = make_trainer(recipe_of(), look=lambda trainer: gates.append(trainer.attachment.gate))
    trainer.train()
    # Callbacks run in the order they were added: the trainer's own first.
    assert gates[:12] == [trainer.schedule.gate(step) for step in range(12)]


@pytest.mark.parametrize("name", ["fast", "fast-lora"])
def test_accumulation_does_not_change_the_step(make_trainer, recipe_of, name) -> None:
    losses, densities, results = [], [], []
    for batch_size in (4, 1):
        trainer = make_trainer(recipe_of(name, steps=4), batch_size=batch_size)
        trainer.train()
        losses.append(history(trainer, "loss"))
        densities.append(history(trainer, "mean_utility"))
        results.append(weights(trainer.model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert densities[0] == pytest.approx(densities[1], rel=1e-5)
    for key in results[0]:
        assert torch.allclose(results[0][key], results[1][key], rtol=1e-3, atol=1e-5), key


def test_the_logged_loss_is_the_cross_entropy_alone(make_trainer, recipe_of) -> None:
    trainers = [make_trainer(recipe_of(steps=1, soft_fraction=1.0, regulariser=value)) for value in (0.0, 5.0)]
    for trainer in trainers:
        trainer.train()
    assert history(trainers[0], "loss") == history(trainers[1], "loss")
    assert history(trainers[1], "lambda") == [5.0]
    total = history(trainers[1], "train_loss")[0]
    assert total == pytest.approx(
        history(trainers[1], "loss")[0] + 5 * history(trainers[1], "mean_utility")[0], rel=1e-5
    )


def test_the_regulariser_is_the_mean_over_pairs_that_leave_the_window(make_trainer, recipe_of) -> None:
    trainer = make_trainer(recipe_of(steps=1, soft_fraction=1.0), batch_size=4)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = 1
    trainer.set_step(0)
    with trainer.attachment.record() as record:
        plain = trainer.model(**batch, use_cache=False).loss
    total = trainer.compute_loss(trainer.model, batch)
    segment, utilities, taken = batch["segment_ids"], record.utilities, []
    for b in range(segment.shape[0]):
        for s in range(segment.shape[1]):
            if (segment[b] == segment[b, s]).nonzero().max() - s >= 8:
                taken += [utilities[layer][b, :, s] for layer in (0, 1)]
    mean = torch.cat(taken).mean()
    assert total.item() == pytest.approx((plain + 0.015 * mean).item(), rel=1e-6)


def test_density_falls_under_a_regulariser(make_trainer, recipe_of) -> None:
    changes = dict(steps=24, soft_fraction=0.8)
    pruned = make_trainer(recipe_of(regulariser=0.3, **changes))
    pruned.train()
    free = make_trainer(recipe_of(regulariser=0.0, **changes))
    free.train()
    assert history(pruned, "density")[0] == 1.0
    assert history(pruned, "density")[-1] < 0.5
    assert history(free, "density")[-1] > 0.9


def test_the_controller_sees_the_density_and_sets_lambda(make_trainer, recipe_of, monkeypatch) -> None:
    seen: list[float] = []
    update = DensityController.update

    def watched(self: DensityController, step: int, density: float) -> float:
        seen.append(density)
        return update(self, step, density)

    monkeypatch.setattr(DensityController, "update", watched)
    trainer = make_trainer(recipe_of(steps=30, target_density=0.3))
    trainer.train()
    soft = trainer.schedule.soft_steps
    assert seen == history(trainer, "density")[:soft]
    replayed = DensityController(0.3, soft, 0.015)
    weights = [0.015, *(update(replayed, step, density) for step, density in enumerate(seen))]
    assert history(trainer, "lambda")[:soft] == weights[:soft]
    assert len(set(weights)) > soft / 2
    assert history(trainer, "lambda")[soft:] == [0.0] * (30 - soft)


def test_control_has_a_start_of_its_own(make_trainer, recipe_of) -> None:
    trainer = make_trainer(recipe_of(steps=2, soft_fraction=1.0, regulariser=0.0, target_density=0.3))
    trainer.train()
    assert history(trainer, "lambda")[0] == START_OF_CONTROL


def test_the_control_trains_the_model_and_no_predictor(make_trainer, recipe_of) -> None:
    trainer = make_trainer(recipe_of("dense-control"))
    before, predictor = weights(trainer.model, "q_proj"), weights(trainer.model, "utility_predictor")
    trainer.train()
    assert trainer.attachment.gate == OpenGate()
    assert not equal(before, weights(trainer.model, "q_proj"))
    assert equal(predictor, weights(trainer.model, "utility_predictor"))
    assert history(trainer, "density") == []


def test_parameter_groups(model_directory, recipe_of) -> None:
    recipe = recipe_of(learning_rate=1e-3, predictor_lr_multiplier=7.0, predictor_weight_decay=0.3)
    model = prepare_parameters(attach(load_base(model_directory), recipe.config()), recipe)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, recipe)
    found = [sorted({names[id(p)].split(".")[-2] for p in group["params"]}) for group in groups]
    assert found == [
        ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        ["embed_tokens", "input_layernorm", "norm", "post_attention_layernorm"],
        ["down", "up"],
    ]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (1e-3, 0.0), (7e-3, 0.3)]
    assert sum(len(group["params"]) for group in groups) == len(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("utility_predictor" in name)
    with pytest.raises(ValueError, match="set freeze_model to train the predictors alone"):
        parameter_groups(model, recipe)


def test_lora_leaves_predictors_whole_and_the_rest_frozen(model_directory, recipe_of) -> None:
    recipe = recipe_of("fast-lora")
    model = prepare_parameters(attach(load_base(model_directory), recipe.config()), recipe)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapted = {name.split(".lora_")[0].split(".")[-1] for name in trained if ".lora_" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    rest = {name for name in trained if ".lora_" not in name}
    assert rest == {name for name, _ in model.named_parameters() if "utility_predictor" in name}
    assert len(rest) == 8
    assert set(attachment(model).predictors) == {0, 1}


def test_a_loss_that_is_not_finite_stops_the_run(make_trainer, recipe_of) -> None:
    trainer = make_trainer(recipe_of())
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.train()


def test_evaluation_has_hard_gates_and_leaves_the_phase_alone(make_trainer, recipe_of) -> None:
    trainer = make_trainer(recipe_of())
    trainer.set_step(0)
    rows = [trainer.rows[i] for i in range(3)]
    result = trainer.evaluate_rows(rows)
    assert trainer.attachment.gate == trainer.schedule.gate(0)
    assert result.density == 1.0
    dense = trainer.evaluate_rows(rows, open_gates=True)
    assert result.loss == dense.loss  # gates start open
    assert dense.densities == {}
    logged = trainer.evaluate(rows)
    assert (logged["eval_loss"], logged["eval_density"]) == (result.loss, 1.0)
    with torch.no_grad():
        for predictor in trainer.attachment.predictors.values():
            predictor.down.bias.copy_(torch.tensor([-9.0, 9.0]))
    half = trainer.evaluate_rows(rows)
    assert half.densities == {0: [0.0, 1.0], 1: [0.0, 1.0]}
    assert half.density == 0.5
    assert half.loss != dense.loss
    expected = [float(nn.functional.cross_entropy(*_shifted(trainer, row), reduction="sum")) for row in rows]
    assert dense.loss == pytest.approx(sum(expected) / dense.tokens, rel=1e-5)


def _shifted(trainer: AdaptationTrainer, row: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and targets of one row with open gates."""
    with trainer.attachment.using(OpenGate()), torch.no_grad():
        batch = {name: value[None] for name, value in row.items()}
        return trainer.model(**batch, use_cache=False).logits[0, :-1], row["labels"][1:]


def test_logs_are_plain_json(make_trainer, recipe_of) -> None:
    trainer = make_trainer(recipe_of())
    trainer.train()
    first = json.loads(json.dumps(trainer.state.log_history))[0]
    assert {
        "loss",
        "density",
        "mean_utility",
        "lambda",
        "alpha",
        "learning_rate",
        "predictor_learning_rate",
    } <= first.keys()
    assert first["predictor_learning_rate"] == pytest.approx(3 * first["learning_rate"])
    assert history(trainer, "alpha")[-3:] == [1.0] * 3
    assert history(trainer, "predictor_learning_rate")[6:] == [0.0] * 6


@pytest.mark.parametrize("name", ["fast", "fast-lora"])
@pytest.mark.parametrize("half", [False, True])
def test_a_step_returns_no_logits_and_the_model_still_does(make_trainer, recipe_of, monkeypatch, name, half) -> None:
    trainer = make_trainer(recipe_of(name, steps=2), bf16=half)
    returned = []
    compute = Trainer.compute_loss

    def seen(self, *args, **kwargs):
        result = compute(self, *args, **kwargs)
        returned.append(set(result[1]))
        return result

    monkeypatch.setattr(Trainer, "compute_loss", seen)
    trainer.train()
    assert returned
    assert all(names == {"loss"} for names in returned)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, labels=ids, use_cache=False).logits
        assert logits.shape == (1, 8, 128)
        # What accelerate leaves around the forward pass follows the copy, and can be taken off.
        copied = copy.deepcopy(trainer.model)
        for parameter in copied.parameters():
            parameter.zero_()
        assert not torch.allclose(copied(input_ids=ids, use_cache=False).logits, logits)
        plain = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        assert plain(input_ids=ids, use_cache=False).logits.shape == (1, 8, 128)
    assert half or "forward" not in vars(trainer.model)
