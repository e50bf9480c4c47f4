"""Inspections as data frames, and two of them compared."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import spkv
from spkv.inspect import compare, heads_frame, inspect_texts, pairs_frame, tokens_frame

WINDOW = 8
TEXT = "Room 12 has 345 chairs, room 6 has none; so 789 people stand."


@pytest.fixture
def inspection(known_gates, tokenizer):
    return inspect_texts(known_gates, tokenizer, [("rooms", TEXT), ("more", "7 of 9" * 10)], strongest=0)


def test_tensors_join_the_documents(inspection):
    joined = TEXT[:-WINDOW] + ("7 of 9" * 10)[:-WINDOW]
    assert inspection.keep().shape == inspection.utilities().shape == (2, 2, len(joined))
    assert inspection.keep()[0, 0].tolist() == [char.isdigit() for char in joined]
    assert torch.equal(inspection.keep(), inspection.utilities() >= 0.5)


def test_frames_hold_what_the_tensors_hold(inspection):
    pytest.importorskip("pandas")
    heads = heads_frame(inspection)
    assert list(zip(heads["layer"], heads["head"], strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert heads["density"].tolist() == inspection.density_by_head().flatten().tolist()
    assert heads["numbers"].tolist() == [1, 0, 1, 0]
    tokens = tokens_frame(inspection)
    assert len(tokens) == len(TEXT) + 60
    rooms = tokens[tokens["document"] == "rooms"]
    assert "".join(rooms["piece"]) == TEXT
    assert set(rooms["kept_share"]) == {0.5}  # one head of layer 0, one of layer 1
    assert rooms["left"].sum() == len(TEXT) - WINDOW
    pairs = pairs_frame(inspection.documents[0])
    assert len(pairs) == 4 * len(TEXT)
    assert pairs.groupby(["layer", "head"])["keep"].mean().loc[1].tolist() == [1, 0]


def test_two_checkpoints_on_the_same_texts(inspection, known_gates, tokenizer):
    spkv.attachment(known_gates).threshold = 0.97  # above sigmoid(3), which layer 1 has
    texts = [("rooms", TEXT), ("more", "7 of 9" * 10)]
    comparison = compare(inspection, inspect_texts(known_gates, tokenizer, texts, strongest=0))
    assert comparison.density_change()[1].tolist() == [-1, 0]
    assert comparison.agreement is not None
    assert comparison.agreement[1].tolist() == [0, 1]
    assert comparison.overlap is not None
    assert comparison.overlap[1, 0] == 0
    assert comparison.overlap[1, 1].isnan()
    summary = comparison.to_dict()
    json.dumps(summary, allow_nan=False)
    assert summary["density"][0] > summary["density"][1]
    same = compare(inspection, inspection).to_dict()
    assert (same["agreement"], same["overlap"], same["largest_change"]) == (1, 1, 0)
    assert same["correlation"] == pytest.approx(1)


def test_two_texts_are_compared_head_by_head(inspection, known_gates, tokenizer):
    other = inspect_texts(known_gates, tokenizer, [("none", "no number stands in this text")], strongest=0)
    comparison = compare(inspection, other)
    assert comparison.agreement is None
    assert comparison.density[1].tolist() == [[0, 1], [1, 0]]
    assert comparison.to_dict()["overlap"] is None
    pytest.importorskip("pandas")
    assert "agreement" not in comparison.to_frame()
    assert list(comparison.to_frame()["density_second"]) == [0, 1, 1, 0]
    assert "agreement" in compare(inspection, inspection).to_frame()


def test_other_models_are_refused(inspection, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    other = spkv.attach(LlamaForCausalLM(LlamaConfig(vocab_size=257, num_hidden_layers=1, **sizes)).eval())
    with pytest.raises(ValueError, match=r"layers \[0, 1\] with 2 KV heads, and layers \[0\] with 4"):
        compare(inspection, inspect_texts(other, tokenizer, [("a", TEXT)], strongest=0))


def test_missing_pandas_is_named(inspection, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r'data frames need pandas .*pip install "spkv\[frames\]"'):
        heads_frame(inspection)
