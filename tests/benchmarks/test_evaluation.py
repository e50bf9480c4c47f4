"""Evaluations of one model from several runs become one file."""

import json

import pytest

from benchmarks import evaluation
from benchmarks.figures import RESULTS


def row(task, policy, score, **more):
    known = dict(task=task, policy=policy, score=score, length=64, examples=2, threshold=None, match_threshold=None)
    return known | more


def save(path, *rows):
    path.mkdir(exist_ok=True)
    (path / "results.json").write_text(json.dumps({"arguments": {"dtype": "bfloat16"}, "rows": rows}))
    return str(path)


def test_runs_are_gathered_and_newer_rows_replace_older_ones(tmp_path):
    file = tmp_path / "evaluation.json"
    about = ["--model", "m", "--device", "d", "--commit", "c", "--command", "spkv eval m", "--json", str(file)]
    first = save(tmp_path / "a", row("vt", "dense", 0.5), row("vt", "spkv", 0.25, threshold=0.5, by_fact={}))
    texts = [save(tmp_path / name, row("nll", "dense", None, loss=2.0)) for name in ("books", "code")]
    assert evaluation.main([first, *texts, *about]) == 0
    evaluation.main([save(tmp_path / "b", row("vt", "spkv", 0.75, threshold=0.5)), *about])
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    found = [(r["task"], r["data"], r["policy"], r["score"], r["model"], r["dtype"]) for r in rows]
    assert found == [
        ("vt", None, "dense", 0.5, "m", "bfloat16"),
        ("vt", None, "spkv", 0.75, "m", "bfloat16"),
        ("nll", "books", "dense", None, "m", "bfloat16"),
        ("nll", "code", "dense", None, "m", "bfloat16"),
    ]
    assert not any("by_fact" in r for r in rows)
    with pytest.raises(FileNotFoundError, match="no such file of results"):
        evaluation.main([str(tmp_path / "nothing"), *about])


def test_the_committed_rows_are_complete_and_matched():
    rows = json.loads((RESULTS / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    needed = {
        "model",
        "device",
        "commit",
        "command",
        "task",
        "policy",
        "threshold",
        "length",
        "kept_fraction",
        "density",
        "score",
    }
    pruned = {
        (r["model"], r["data"], r["task"], r["length"]): r
        for r in rows
        if r["policy"] == "spkv" and r["threshold"] == 0.5
    }
    for r in rows:
        assert needed <= r.keys()
        if r["match_threshold"] == 0.5 and r["policy"] != "random":
            like = pruned[r["model"], r["data"], r["task"], r["length"]]
            assert r["examples"] == like["examples"]
            # Methods of kvpress keep a whole number of pairs.
            assert r["context_kept_fraction"] == pytest.approx(like["context_kept_fraction"], abs=2 / r["length"])
