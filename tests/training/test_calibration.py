from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import spkv
from spkv.checkpoint import load_base
from spkv.hf.attach import attach
from spkv.training import calibration
from spkv.training.calibration import calibrate
from spkv.training.data import PackedRows
from spkv.training.evaluation import evaluate_rows
from spkv.training.tokens import tokenize_files

# The text repeats itself, so that up to 3.3 % of the pairs have one and the same utility.
CLUMP = 0.033


@pytest.fixture
def rows(text_file: Path, tokenizer: Any) -> PackedRows:
    return PackedRows(tokenize_files([text_file], tokenizer, progress=False), 64)


@pytest.fixture
def model(model_directory: Path) -> Any:
    model = attach(load_base(model_directory), spkv.SPKVConfig(window=4))
    for predictor in spkv.attachment(model).predictors.values():
        torch.nn.init.normal_(predictor.up.weight, std=0.5)
        torch.nn.init.normal_(predictor.down.weight, std=0.5)
    return model


@pytest.mark.parametrize("off", [0.83, 1.0, 1.2])
def test_the_density_meets_the_target(model, rows, off) -> None:
    accelerator = Accelerator(cpu=True)
    density = evaluate_rows(model, rows, accelerator).density
    target = off * density
    before = {layer: p.down.bias.clone() for layer, p in spkv.attachment(model).predictors.items()}
    done = calibrate(model, rows, accelerator, target)
    found = evaluate_rows(model, rows, accelerator)
    assert done.density == found.density == pytest.approx(target, abs=CLUMP)
    assert (done.density_before, done.loss) == (density, found.loss)
    assert done.open_loss == evaluate_rows(model, rows, accelerator, open_gates=True).loss != done.loss
    for layer, predictor in spkv.attachment(model).predictors.items():
        assert torch.allclose(predictor.down.bias - before[layer], torch.tensor(done.shift), atol=1e-5)
    again = calibrate(model, rows, accelerator, done.density)
    assert (again.shift, again.density_before, again.density) == (0.0, done.density, done.density)


def test_another_threshold_is_kept(model, rows) -> None:
    spkv.attachment(model).config = spkv.SPKVConfig(window=4, threshold=0.8)
    target = 0.85 * evaluate_rows(model, rows, Accelerator(cpu=True)).density
    calibrate(model, rows, Accelerator(cpu=True), target)
    assert evaluate_rows(model, rows, Accelerator(cpu=True)).density == pytest.approx(target, abs=CLUMP)


@pytest.mark.parametrize("off", [0.75, 1.3])
def test_a_run_that_missed_by_far_is_left_and_says_so(model, rows, off, caplog) -> None:
    density = evaluate_rows(model, rows, Accelerator(cpu=True)).density
    done = calibrate(model, rows, Accelerator(cpu=True), off * density)
    assert (done.shift, done.density_before, done.density) == (0.0, density, density)
    assert "too far off to be mended in the end: train on more tokens" in caplog.text


@pytest.mark.parametrize(("allowed", "told"), [(2.0, False), (0.5, True)])
def test_a_model_that_misses_what_is_dropped_is_worth_a_warning(
    model, rows, allowed, told, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(calibration, "_SMALL_COST", allowed)
    density = evaluate_rows(model, rows, Accelerator(cpu=True)).density
    done = calibrate(model, rows, Accelerator(cpu=True), density)
    assert (f"the loss on training rows is {done.loss:.4f}" in caplog.text) is told


def test_equal_utilities_cannot_be_told_apart_and_are_left(model, rows) -> None:
    for predictor in spkv.attachment(model).predictors.values():
        torch.nn.init.zeros_(predictor.down.weight)
        torch.nn.init.constant_(predictor.down.bias, math.log(3))
    done = calibrate(model, rows, Accelerator(cpu=True), 0.85)
    assert (done.shift, done.density_before, done.density) == (0.0, 1.0, 1.0)
    assert done.loss == done.open_loss


def move(model, by: float) -> None:
    for predictor in spkv.attachment(model).predictors.values():
        with torch.no_grad():
            predictor.down.bias.add_(by)


def density_of_sinks(model, rows) -> float:
    """Give the model 4 sinks, and return the density that they have alone."""
    found = spkv.attachment(model)
    found.config = found.config.replace(sinks=4)
    move(model, -100.0)
    alone = evaluate_rows(model, rows, Accelerator(cpu=True)).density
    move(model, 100.0)
    return alone


def test_sinks_are_counted_and_stay(model, rows) -> None:
    alone = density_of_sinks(model, rows)
    density = evaluate_rows(model, rows, Accelerator(cpu=True)).density
    assert 0.02 < alone < 0.5 * density
    done = calibrate(model, rows, Accelerator(cpu=True), 0.9 * density)
    assert done.density == pytest.approx(0.9 * density, abs=CLUMP)


def test_a_target_below_the_sinks_alone_is_told_and_left(model, rows, caplog) -> None:
    alone = density_of_sinks(model, rows)
    move(model, -22.0)
    density = evaluate_rows(model, rows, Accelerator(cpu=True)).density
    assert alone < density < 1.2 * alone
    done = calibrate(model, rows, Accelerator(cpu=True), 0.99 * alone)
    assert (done.shift, done.density) == (0.0, density)
    assert f"{alone:.3f} of the pairs that leave the window are kept whatever the predictors say" in caplog.text


def test_rows_that_never_leave_the_window_change_nothing(model, rows) -> None:
    spkv.attachment(model).config = spkv.SPKVConfig(window=64)
    assert calibrate(model, rows, Accelerator(cpu=True), 0.5).shift == 0.0
