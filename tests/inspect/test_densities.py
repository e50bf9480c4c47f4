"""Decisions about a text: hand-made ones exactly, a model's own against its cache."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import PreTrainedModel

import spkv
from spkv.gates import SinkGate, SoftGate, ThresholdGate
from spkv.hf.generation import read
from spkv.inspect.densities import decisions, encode_pieces, text_densities, write_report

W, T = 5, 40


@pytest.fixture
def attached(tiny_llama: PreTrainedModel) -> PreTrainedModel:
    return spkv.attach(tiny_llama, spkv.SPKVConfig(window=W))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 97, (1, T))


def test_hand_made_utilities_give_exact_densities(attached):
    first = torch.tensor([[0.5, 0.49, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9], [0.0, 0.6, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    second = torch.ones(2, 8)
    result = decisions(spkv.attachment(attached), {0: first[None], 1: second[None]})
    assert result.layers == (0, 1)
    # Of eight tokens three have left the window of five; a utility equal to the threshold keeps.
    assert result.density_by_head().tolist() == [[pytest.approx(2 / 3), pytest.approx(1 / 3)], [1.0, 1.0]]
    assert result.density() == pytest.approx(9 / 12)
    assert result.kept_fraction() == pytest.approx((4 * 5 + 9) / (4 * 8))
    assert result.kept_share().tolist() == [0.75, 0.75, 0.75, 0.5, 0.75, 0.75, 0.75, 0.75]
    other = decisions(spkv.attachment(attached), {0: first[None], 1: second[None]}, ThresholdGate(0.95))
    assert other.density_by_head().tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_a_predictor_of_constant_heads(attached, ids):
    for predictor in spkv.attachment(attached).predictors.values():
        torch.nn.init.zeros_(predictor.down.weight)
        predictor.down.bias.data = torch.tensor([2.0, -2.0])
    result = text_densities(attached, ids, chunk_size=16)
    assert result.density_by_head().tolist() == [[1.0, 0.0], [1.0, 0.0]]
    torch.testing.assert_close(result.utilities[:, 0], torch.full((2, T), torch.tensor(2.0).sigmoid().item()))
    assert result.kept_share().tolist() == [0.5] * T


def test_decisions_are_those_of_the_cache(attached, ids, scatter_utilities):
    scatter_utilities(attached)
    cache = read(attached, ids).cache
    seen = []
    result = text_densities(attached, ids, chunk_size=7, progress=seen.append)
    torch.testing.assert_close(result.density_by_head(), cache.density_by_head(), rtol=0, atol=0)
    assert result.density() == pytest.approx(cache.density())
    assert result.kept_fraction() == pytest.approx(cache.kept_fraction())
    assert 0 < result.density() < 1
    assert seen == [7, 14, 21, 28, 35, 40]


def test_any_hard_gate_counts(attached, ids):
    with spkv.attachment(attached).using(SinkGate(3)):
        result = text_densities(attached, ids)
    assert result.density() == pytest.approx(3 / (T - W))
    assert result.keep.sum(2).unique().tolist() == [3]


def test_layers_without_a_predictor_keep_everything(tiny_llama, ids):
    spkv.attach(tiny_llama, spkv.SPKVConfig(window=W, layers=(1,), initial_bias=-9.0))
    result = text_densities(tiny_llama, ids)
    assert result.layers == (0, 1)
    assert result.density_by_head().tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_nothing_has_left_a_long_window(attached, ids, tmp_path):
    pytest.importorskip("matplotlib")
    result = text_densities(attached, ids[:, :W])
    assert result.density() is None
    assert result.kept_fraction() == 1.0
    paths = write_report(result, list("abcde"), tmp_path, title="t", facts={})
    values = json.loads((tmp_path / "densities.json").read_text())
    assert values["density"] is None
    assert values["density_by_head"] == [[None, None], [None, None]]
    assert paths["token_page"] == str(tmp_path / "tokens.html")


def test_a_report_is_three_files(attached, ids, tmp_path):
    pytest.importorskip("matplotlib")
    result = text_densities(attached, ids)
    paths = write_report(result, ["x"] * T, tmp_path / "new" / "folder", title="a $ b", facts={"model": "m"})
    assert sorted(paths) == ["densities_json", "density_png", "token_page"]
    values = json.loads((tmp_path / "new" / "folder" / "densities.json").read_text())
    assert list(values)[:3] == ["model", "tokens", "window"]
    assert values["density_by_head"] == result.density_by_head().tolist()
    assert values["kept_share"] == result.kept_share().tolist()
    assert (tmp_path / "new" / "folder" / "density.png").read_bytes().startswith(b"\x89PNG")


def test_pieces_join_to_the_text(tokenizer):
    text = "One é two\n\n  three – 👩 <|endoftext|> end"
    ids, pieces = encode_pieces(tokenizer, text)
    assert ids.shape == (1, len(text.encode()))
    assert "".join(pieces) == text
    assert 0 not in ids  # a special token in the text is text
    ids, pieces = encode_pieces(tokenizer, text, limit=5)
    assert ids.shape == (1, 5)
    assert "".join(pieces) == "One é"


def test_bad_arguments_are_named(attached, ids, tokenizer):
    with pytest.raises(ValueError, match="a hard gate is needed, which keeps or drops, not SoftGate"):
        decisions(spkv.attachment(attached), {0: torch.ones(1, 2, 3)}, SoftGate())
    with pytest.raises(ValueError, match="no utilities were recorded"):
        decisions(spkv.attachment(attached), {})
    with pytest.raises(ValueError, match=r"one text, \[1, tokens\], got shape \[2, 40\]"):
        text_densities(attached, ids.repeat(2, 1))
    with pytest.raises(ValueError, match="has no attachment"):
        text_densities(spkv.detach(attached), ids)
    with pytest.raises(ValueError, match="the text is empty"):
        encode_pieces(tokenizer, "")
    with pytest.raises(ValueError, match="the number of tokens must be at least 1, not 0"):
        encode_pieces(tokenizer, "a", 0)
