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
from spkv.training.calibration import calibrate
from spkv.training.data import PackedRows
from spkv.training.evaluation import evaluate_rows
from spkv.training.tokens import tokenize_files


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


@pytest.mark.parametrize("target", [0.1, 0.37, 0.9])
def test_the_density_meets_the_target(model, rows, target) -> None:
    accelerator = Accelerator(cpu=True)
    before = {layer: p.down.bias.clone() for layer, p in spkv.attachment(model).predictors.items()}
    shift = calibrate(model, rows, accelerator, target)
    assert evaluate_rows(model, rows, accelerator).density == pytest.approx(target, rel=0.02)
    for layer, predictor in spkv.attachment(model).predictors.items():
        assert torch.allclose(predictor.down.bias - before[layer], torch.tensor(shift), atol=1e-5)
    assert calibrate(model, rows, accelerator, target) == 0.0


def test_another_threshold_is_kept(model, rows) -> None:
    spkv.attachment(model).config = spkv.SPKVConfig(window=4, threshold=0.8)
    calibrate(model, rows, Accelerator(cpu=True), 0.3)
    assert evaluate_rows(model, rows, Accelerator(cpu=True)).density == pytest.approx(0.3, rel=0.02)


def test_equal_utilities_cannot_be_told_apart_and_are_left(model, rows) -> None:
    for predictor in spkv.attachment(model).predictors.values():
        torch.nn.init.zeros_(predictor.down.weight)
        torch.nn.init.constant_(predictor.down.bias, math.log(3))
    assert calibrate(model, rows, Accelerator(cpu=True), 0.6) == 0.0


def test_rows_that_never_leave_the_window_change_nothing(model, rows) -> None:
    spkv.attachment(model).config = spkv.SPKVConfig(window=64)
    assert calibrate(model, rows, Accelerator(cpu=True), 0.5) == 0.0
