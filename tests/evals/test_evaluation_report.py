"""Reports: drawn from JSON alone, of one run or several, with everything in one page."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spkv.evals.labels import beside
from spkv.evals.report import load_results, merge, write_report

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


def row(policy="spkv", task="niah", length=1024, threshold=0.5, **values):
    return {
        "task": task, "policy": policy, "threshold": threshold, "match_threshold": None, "length": length,
        "examples": 4, "tokens": 4096, "score": None, "loss": None, "continuation_loss": None, "density": 0.2,
        "kept_fraction": 0.3, "context_kept_fraction": 0.3, "kv_bytes": 1000.0, "seconds": 2.0, "by_fact": {},
        "by_turn": [], "by_position": [], **values,
    }  # fmt: skip


def depths(*scores):
    return {"depth": {f"{n / 10}": {"score": score, "examples": 2} for n, score in enumerate(scores)}}


@pytest.fixture
def rows():
    positions = [{"start": 0, "stop": 64, "loss": 3.0}, {"start": 64, "stop": 128, "loss": 2.5}]
    made = []
    for length in (1024, 2048):
        made += [
            row("dense", length=length, threshold=None, score=1.0, kept_fraction=1.0, by_fact=depths(1.0, 1.0)),
            row(length=length, score=0.75, by_fact=depths(0.5, 1.0)),
            row(length=length, score=0.5, threshold=0.9, kept_fraction=0.2, by_fact=depths(0.5, 0.5)),
        ]
    made += [
        row("dense", "nll", 128, None, loss=2.75, continuation_loss=2.4, kept_fraction=1.0, by_position=positions),
        row("spkv", "nll", 128, loss=2.8, continuation_loss=2.5, by_position=positions),
        row("h2o", "nll", 128, None, match_threshold=0.5, continuation_loss=2.9, density=None),
    ]
    return made


def save(folder, rows, **arguments):
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"format": 1, "arguments": arguments, "rows": rows}))
    return folder


@needs_matplotlib
def test_a_page_holds_the_table_and_every_picture(rows, tmp_path):
    source = save(tmp_path / "run", rows, model="a <b> model", policies=["dense"])
    result = write_report([source], tmp_path / "out")
    names = [file.rsplit("/", 1)[1] for file in result["pictures"]]
    assert names == [
        "score-niah.png", "depth-niah.png", "loss-nll.png", "continuation-loss-nll.png", "position-nll.png",
        "density.png",
    ]  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(names)
    assert re.search(r'(src|href)="(?!data:)', page) is None
    assert page.count("<tr>") == 1 + len(rows)
    for text in ("0.750 (-0.250)", "2.8000 (+1.82%)", "2.9000 (+20.83%)", "0.30 (3.3×)", "h2o like 0.5", "spkv 0.9"):
        assert f"<td>{text}</td>" in page
    assert "a &lt;b&gt; model" in page
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [r["policy"] for r in stored["rows"]] == [r["policy"] for r in rows]


@needs_matplotlib
def test_a_report_is_drawn_again_the_same(rows, tmp_path):
    source = save(tmp_path / "run", rows)
    for name in ("one", "two"):
        write_report([source], tmp_path / name)
    write_report([tmp_path / "one" / "report.json"], tmp_path / "three")
    pages = [(tmp_path / name / "report.html").read_text() for name in ("one", "two", "three")]
    assert pages[0] == pages[1] == pages[2]


@needs_matplotlib
def test_runs_are_merged_and_told_apart(rows, tmp_path):
    again = [{**r, "score": 0.25} for r in rows[:2]]
    other = [row("twin", score=0.5)]
    sources = [save(tmp_path / "first", rows), save(tmp_path / "second", again), tmp_path / "plain.json"]
    (tmp_path / "plain.json").write_text(json.dumps(other))
    write_report(sources, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    for label in ("dense (first)", "dense (second)", "spkv 0.5 (second)", "spkv 0.9", "twin 0.5"):
        assert f"<td>{label}</td>" in page
    merged = merge([rows, again], ["run", "run"])
    assert {r["run"] for r in merged} == {"run 1", "run 2", None}
    assert [r["length"] for r in merged if r["task"] == "niah"] == [1024] * 5 + [2048] * 3


@needs_matplotlib
def test_texts_and_models_of_one_file_are_told_apart(tmp_path):
    loss = dict(density=None, kept_fraction=1.0)
    given = [
        {**row("dense", "nll", 128, None, loss=2.0, **loss), "model": "small", "data": "books"},
        {**row("dense", "nll", 128, None, loss=3.0, **loss), "model": "small", "data": "code"},
        {**row("dense", "nll", 128, None, loss=1.0, **loss), "model": "large", "data": "books"},
        {**row("spkv", "nll", 128, loss=1.5), "model": "large", "data": "books"},
        # What the harness measures has no length, and says nothing of memory.
        {**row("spkv", "piqa", None, score=0.6, density=None, kept_fraction=None), "model": "large", "data": None},
    ]
    (tmp_path / "all.json").write_text(json.dumps({"rows": given}))
    write_report([tmp_path / "all.json"], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<td>nll: books</td>") == 3
    assert page.count("<td>nll: code</td>") == 1
    assert page.count("<td>dense (small)</td>") == 2
    assert "<td>1.5000 (+50.00%)</td>" in page  # against its own dense
    write_report([tmp_path / "out" / "report.json"], tmp_path / "again")
    assert (tmp_path / "again" / "report.html").read_text() == page


@needs_matplotlib
def test_the_published_evaluation_is_drawn(tmp_path):
    published = Path(__file__).parents[2] / "benchmarks" / "results" / "evaluation.json"
    result = write_report([published], tmp_path)
    names = {Path(file).stem for file in result["pictures"]}
    assert {"loss-nll-valid", "loss-nll-wikitext-2", "depth-niah", "score-turns", "density"} <= names


def test_a_difference_comes_with_its_standard_error():
    dense = row("dense", score=0.5, loss=2.0)
    pruned = row(score=0.4, loss=2.1, standard_error={"score": 0.02, "loss": 0.01})
    assert beside("score", pruned, dense) == "0.400 (-0.100±0.020)"
    assert beside("loss", pruned, dense) == "2.1000 (+5.00%±0.50%)"
    assert beside("loss", row(loss=2.1, standard_error={}), dense) == "2.1000 (+5.00%)"


def test_what_holds_no_results_is_named(tmp_path, rows):
    with pytest.raises(FileNotFoundError, match=r"no such file of results: .*absent; give a directory that"):
        load_results(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"holds no results\.json"):
        load_results(tmp_path)
    for content, message in (
        ("words", "is not JSON"),
        ("[]", "holds no rows of an evaluation"),
        ('[{"policy": "dense"}]', "a row lacks task, length, examples"),
        ('{"rows": [3]}', "is no result of `spkv eval`"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_results(tmp_path / "bad.json")


def test_reading_results_takes_no_torch():
    code = "import spkv.evals.report, sys; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"
