"""Runs on several GPUs: each once, after its control, the rest in spite of one that fails."""

import json
import math
import subprocess
import threading
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from benchmarks import recipes_in_parallel
from benchmarks.recipe_runs import control_of, find_run, known_runs


@pytest.fixture
def finished(monkeypatch):
    """Stands in for the processes: the names of runs in the order in which they were measured, with their GPUs."""
    done, trained, measured = [], [], []

    def run(command, env=None, **_):
        if "--runs" in command:
            name, seed, own = (command[command.index(flag) + 1] for flag in ("--runs", "--seed", "--json"))
            if "--controls" in command:
                name = control_of(find_run(name)).name
            if "--merge" in command:
                assert (control_of(find_run(name)).name, seed) in measured
            elif (name, seed) in trained:
                raise AssertionError(f"{name} is measured before its control")
            time.sleep(0.01)
            if "--train-only" in command:
                trained.append((name, seed))
                return SimpleNamespace(returncode=0)
            code = {"20M-d0.3": 7, "20M-d0.4": recipes_in_parallel.UNFINISHED}.get(name, 0)
            done.append((name, env["CUDA_VISIBLE_DEVICES"]))
            measured.append((name, seed))
            with open(own, "w") as file:
                file.write("{}")
            return SimpleNamespace(returncode=code)
        done.append(("merged", len(command[command.index("--merge") + 1 :])))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return done


def test_every_run_is_measured_once_after_its_control(finished, tmp_path, capsys):
    names = ["20M-d0.1", "20M-d0.2", "20M-d0.3", "20M-d0.4", "50M-d0.1"]
    code = recipes_in_parallel.main(["--gpus", "3", "--runs", *names, "--json", str(tmp_path / "f.json")])
    assert code == 1
    ended = [name for name, _ in finished]
    assert sorted(ended) == sorted([*names, "dense-20M", "dense-50M", "merged"])
    assert ended[-1] == "merged"
    assert finished[-1][1] == 7
    assert {gpu for _, gpu in finished[:-1]} == {"0", "1", "2"}
    states = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert states["20M-d0.3-seed0"] == "failed with exit code 7, see f-20M-d0.3-seed0.log"
    assert states["20M-d0.4-seed0"] == "unfinished"
    assert states["50M-d0.1-seed0"] == "done"


def test_seeds_have_controls_of_their_own_and_gpus_are_those_that_are_visible(finished, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3,7")
    arguments = [
        "--gpus",
        "2",
        "--at-once",
        "2",
        "--training-batch-size",
        "8",
        "--seeds",
        "0",
        "4",
        "--json",
        str(tmp_path / "f.json"),
    ]
    assert recipes_in_parallel.main([*arguments, "--runs", "20M-d0.1 window=32", "20M-d0.1"]) == 0
    names = [f"{name}-seed{seed}" for name in ("20M-d0.1 window=32", "20M-d0.1", "dense-20M") for seed in (0, 4)]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["runs"] == dict.fromkeys(names, "done")
    assert {path.name for path in tmp_path.glob("*.json")} == {f"f-{name}.json" for name in names}
    assert {gpu for _, gpu in finished[:-1]} == {"5", "3"}
    with pytest.raises(SystemExit):
        recipes_in_parallel.main([*arguments, "--gpus", "4", "--runs", "20M-d0.1"])


@pytest.mark.parametrize("options", [["--set=window=3"], ["--controls"], ["--merge", "f"], ["--at-once", "2"]])
def test_options_that_would_go_wrong_are_refused(options, tmp_path):
    with pytest.raises(SystemExit):
        recipes_in_parallel.main(["--gpus", "1", "--runs", "20M-d0.1", "--json", str(tmp_path / "f.json"), *options])


def test_a_run_trains_beside_its_control_and_is_measured_after_it(monkeypatch, tmp_path):
    order, trains = [], threading.Event()

    def run(command, **_):
        if "--runs" in command:
            name = "control" if "--controls" in command else command[command.index("--runs") + 1]
            if "--train-only" in command:
                trains.set()
                order.append(f"{name} trained")
            else:
                if name == "control":
                    assert trains.wait(timeout=30)
                    time.sleep(0.05)
                order.append(name)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    assert recipes_in_parallel.main(["--gpus", "2", "--runs", "20M-d0.1", "--json", str(tmp_path / "f.json")]) == 0
    assert order == ["20M-d0.1 trained", "control", "20M-d0.1"]


def test_a_control_whose_name_is_not_known_is_reached_through_its_run(finished, tmp_path):
    name = "20M-d0.1 tokens=12345"
    assert recipes_in_parallel.main(["--gpus", "1", "--runs", name, "--json", str(tmp_path / "f.json")]) == 0
    assert [ended for ended, _ in finished] == ["dense-0.012345M", name, "merged"]


def test_a_process_that_cannot_be_started_holds_nobody_up(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=OSError("no such program")))
    assert recipes_in_parallel.main(["--gpus", "2", "--runs", "20M-d0.1", "--json", str(tmp_path / "f.json")]) == 1
    states = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert states["dense-20M-seed0"] == "failed: no such program"


def test_no_run_starts_past_the_deadline_or_without_its_control(finished, tmp_path):
    arguments = ["--gpus", "2", "--runs", "20M-d0.1", "--json", str(tmp_path / "f.json")]
    assert recipes_in_parallel.main([*arguments, "--time-limit", "0"]) == recipes_in_parallel.UNFINISHED
    assert not finished
    fleet = recipes_in_parallel.Fleet([known_runs()["20M-d0.1"]], [0], [], tmp_path / "f.json", math.inf)
    with pytest.raises(KeyError, match="dense-20M"):
        fleet.work("0")
