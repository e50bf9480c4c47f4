"""All evaluations of a model, run by one command."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import evaluation_runs
from benchmarks.recipes import UNFINISHED


@pytest.fixture
def ran(monkeypatch):
    """Stands in for the processes: what was run, with the GPU of each; vt fails, and cwe goes beyond any limit."""
    commands = []

    def run(command, env, stdout, stderr, timeout):
        directory = Path(command[command.index("--output") + 1])
        commands.append((directory.name, env.get("CUDA_VISIBLE_DEVICES"), command))
        if directory.name.startswith("cwe"):
            raise subprocess.TimeoutExpired(command, timeout)
        if directory.name.startswith("vt"):
            return SimpleNamespace(returncode=1)
        task = "nll" if directory.name.startswith("books") else directory.name
        row = dict(task=task, policy="dense", score=0.5, length=64, examples=2)
        directory.mkdir()
        (directory / "results.json").write_text(json.dumps({"arguments": {"dtype": "float32"}, "rows": [row]}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(evaluation_runs.torch.cuda, "get_device_name", lambda: "a GPU")
    return commands


def arguments(folder, *more):
    given = f"{folder}/model --reference {folder}/control --twin {folder}/twin --name m --commit c --lengths 64"
    given += f" --text books={folder}/b.txt --essays {folder}/e.txt --output {folder}/runs --json {folder}/f.json"
    return [*given.split(), *more]


def test_each_is_run_once_and_what_is_done_is_gathered(ran, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    thresholds = ("--thresholds", "0.5,0.7", "--match-thresholds", "0.5")
    assert evaluation_runs.main(arguments(tmp_path, "--gpus", "2", "--at-once", "3", *thresholds)) == 1
    names = [name for name, _, _ in ran]
    assert len(names) == len(set(names)) == 14
    assert {gpu for _, gpu, _ in ran} <= {"0", "1"}
    states = json.loads(capsys.readouterr().out.splitlines()[-1])["evaluations"]
    assert states.pop("vt-64") == "failed with exit code 1, see vt-64.log"
    assert states.pop("cwe-64") == "undone"
    assert set(states.values()) == {"done"}
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert {row["task"] for row in rows} == {"nll", *states} - {"books-64"}
    assert {row["data"] for row in rows if row["task"] == "nll"} == {"books"}
    (fwe,) = (row for row in rows if row["task"] == "fwe-64")
    assert (fwe["model"], fwe["device"], fwe["commit"], fwe["dtype"]) == ("m", "a GPU", "c", "float32")
    assert fwe["command"] == (
        "spkv eval model --policies dense,spkv,streaming,random,h2o,expected-attention,snapkv,tova,keydiff,twin=twin "
        "--thresholds 0.5,0.7 --match-thresholds 0.5 --reference control --task fwe --sequence-length 64 --limit 2048 "
        "--batch-size 2048 --task-option essays=e.txt"
    )


def test_gpus_are_of_those_that_are_visible(ran, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    evaluation_runs.main(arguments(tmp_path, "--gpus", "2", "--at-once", "2"))
    assert {gpu for _, gpu, _ in ran} <= {"3", "5"}


def test_nothing_starts_past_the_time_limit(ran, tmp_path):
    assert evaluation_runs.main(arguments(tmp_path, "--gpus", "0", "--time-limit", "0")) == UNFINISHED
    assert ran == []
    evaluation_runs.main(arguments(tmp_path, "--gpus", "0"))
    assert {gpu for _, gpu, _ in ran} == {""}  # none is visible


def test_rows_of_another_commit_are_not_taken_for_its_own(ran, tmp_path):
    evaluation_runs.main(arguments(tmp_path, "--gpus", "0", "--time-limit", "0"))
    with pytest.raises(ValueError, match=r"holds what was measured by .*'commit': 'c'.*choose another --output"):
        evaluation_runs.main(arguments(tmp_path, "--gpus", "0", "--commit", "d"))


def test_a_text_needs_a_name(tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluation_runs.main(arguments(tmp_path, "--text", "books.txt"))
    assert "'books.txt' is not NAME=FILE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluation_runs.main(arguments(tmp_path, "--text", "books=other.txt"))
    assert "two --text have one name" in capsys.readouterr().err


def test_losses_and_answers_run_by_themselves_under_policies_with_settings(ran, tmp_path):
    evaluation_runs.main(arguments(tmp_path, "--gpus", "0", "--only", "losses", "--policies", "spkv", "keydiff+heads"))
    assert [name for name, _, _ in ran] == ["books-64"]
    assert "spkv,keydiff+heads,twin=" in " ".join(ran[0][2])
    ran.clear()
    evaluation_runs.main([*arguments(tmp_path, "--gpus", "0", "--only", "answers"), "--output", str(tmp_path / "more")])
    assert len(ran) == 13
    assert "books-64" not in {name for name, _, _ in ran}


def test_policies_are_checked_before_anything_runs(ran, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluation_runs.main(arguments(tmp_path, "--policies", "spkv", "keydiff+hads"))
    assert "keydiff takes the settings +recent, +half, +heads" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluation_runs.main(f"m --name m --commit c --only losses --output {tmp_path} --json {tmp_path}/f".split())
    assert "--only losses needs a --text" in capsys.readouterr().err
    assert ran == []
