"""Palindromes are what they say, and those who can read them score as they should."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import palindrome
from benchmarks.losses import measure
from benchmarks.palindrome import QUICK, SEPARATOR, Palindromes
from spkv.training.data import IGNORED

TINY = dataclasses.replace(QUICK, symbols=12, half=6, window=3, steps=4, rows=4)


class Reader(nn.Module):
    """Reads on from the first half by rule, as far back as it can see; guesses a symbol that does not occur."""

    def __init__(self, size, sight):
        super().__init__()
        self.size, self.sight = size, sight
        self.device = nn.Parameter(torch.zeros(()))

    def forward(self, ids, use_cache):
        logits = torch.zeros(*ids.shape, self.size.symbols + 2)
        for row, tokens in zip(logits, ids.tolist(), strict=True):
            separator = tokens.index(SEPARATOR)
            for t in range(separator, len(tokens) - 1):
                source = 2 * separator - t - 1
                row[t, tokens[source] if t - source < self.sight else -1] = 1.0
        return SimpleNamespace(logits=logits)


def test_the_second_half_reverses_the_first():
    for row in Palindromes(TINY, 20, seed=3):
        ids = row["input_ids"].tolist()
        assert len(ids) == TINY.length == 13
        assert ids == ids[::-1]
        assert ids[6] == SEPARATOR
        assert len(set(ids)) == 7
        assert max(ids) <= 12
        assert row["labels"].tolist() == [IGNORED] * 7 + ids[7:]
        assert row["segment_ids"].tolist() == [0] * 13


def test_training_and_held_out_sequences_differ_by_seed():
    first, again, other = (Palindromes(TINY, 5, seed)[0]["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("sight", "accuracy"), [(TINY.length, 1.0), (4, 2 / 6), (1, 0.0)])
def test_a_reader_scores_by_how_far_it_sees(sight, accuracy):
    assert measure(Reader(TINY, sight), Palindromes(TINY, 9, 0), None, batch_size=4)["accuracy"] == accuracy


def test_every_method_leaves_a_row_and_is_not_trained_twice(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    arguments = ["--quick", "--json", str(path), "--set", "steps=3", "rows=4", "symbols=12", "half=6", "window=3"]
    palindrome.main(arguments)
    result = json.loads(path.read_text())
    dense, window, pruned = result["rows"]
    assert (dense["method"], dense["density"]) == ("dense", 1.0)
    assert (window["method"], window["density"]) == ("window", 0.0)
    assert (pruned["method"], pruned["target"]) == ("spkv", 0.3)
    monkeypatch.setattr(palindrome, "train", None)
    palindrome.main(arguments)
    assert json.loads(path.read_text())["rows"] == result["rows"]
    monkeypatch.undo()
    palindrome.main([*arguments, "--recipe", "gate_noise=1", "regulariser_form=concave"])
    *before, changed = json.loads(path.read_text())["rows"]
    assert before == result["rows"]
    assert (changed["method"], changed["changes"]) == ("spkv", {"gate_noise": 1, "regulariser_form": "concave"})
    with pytest.raises(SystemExit):
        palindrome.main([*arguments[:-1], "window=2"])
    assert "holds another task" in capsys.readouterr().err
