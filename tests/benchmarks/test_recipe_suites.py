"""The suites of training runs: their controls, going on after a stop, and their rows."""

import itertools
import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import spkv
from benchmarks import from_scratch, recipes
from benchmarks.figures import frontier_figure
from benchmarks.losses import measure, whole_sequences
from benchmarks.recipe_results import Results
from benchmarks.recipe_runs import SUITES, Run, control_of, find_run, frontier, known_runs, with_controls
from benchmarks.retrieval_data import retrieval_documents
from spkv.checkpoint import load_base
from spkv.evals import evaluate_nll
from spkv.evals.policies import Policy
from spkv.gates import RandomGate, SinkGate, ThresholdGate
from spkv.training.data import PackedRows
from spkv.training.evaluation import evaluate_rows
from spkv.training.recipes import get_recipe
from spkv.training.tokens import tokenize_files

SMALL = ("tokens=1024", "sequence_length=64", "tokens_per_step=128", "window=8", "soft_fraction=0.5", "anneal_steps=1")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model of bytes, and text for it."""
    path = tmp_path_factory.mktemp("recipes")
    from_scratch.make_model(path / "model", "tiny", from_scratch.byte_tokenizer(), positions=256, seed=0)
    draw = random.Random(0)
    for name in ("train", "valid"):
        texts = ["".join(draw.choices("abcd ", k=draw.randint(20, 300))) for _ in range(15)]
        (path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def suite(work, tmp_path, monkeypatch):
    """Runs the command line; returns its exit code and rows."""
    monkeypatch.setenv("SPKV_CACHE", str(work / "cache"))

    def run(*runs, settings=(), output="out", options=()):
        arguments = ["--runs", *runs, "--model", work / "model", "--data", work / "train.jsonl"]
        arguments += ["--validation", work / "valid.jsonl", "--validation-tokens", 512, "--thresholds", 0.3, 0.5]
        arguments += ["--output", tmp_path / output, "--json", tmp_path / f"{output}.json", "--commit", "abc", *options]
        for setting in (*SMALL, *settings):
            arguments += ["--set", setting]
        code = recipes.main([str(argument) for argument in arguments])
        return code, Results(tmp_path / f"{output}.json", {"commit": "", "command": "", "device": ""}).rows

    return run


def test_runs_share_the_controls_of_their_tokens_rate_length_and_lora():
    names = [run.name for run in with_controls(frontier())]
    assert [name for name in names if name.startswith("dense")] == ["dense-10M", "dense-20M", "dense-50M", "dense-100M"]
    assert names.index("dense-20M") < names.index("20M-d0.05")
    base = known_runs()["20M-d0.2"]
    shared = [{"window": 1}, {"initial_bias": 5.0}, {"regulariser_form": "log"}, {"freeze_model": True}]
    assert {control_of(base.with_changes(change)) for change in shared} == {control_of(base)}
    own = [{"learning_rate": 1e-3}, {"sequence_length": 2048}, {"weight_decay": 0.0}, {"tokens": 10**6}]
    controls = {control_of(run) for run in (base, *map(base.with_changes, own), known_runs()["lora8-20M-d0.2"])}
    assert len(controls) == len({control.name for control in controls}) == 6
    assert all(not control.recipe.gates and control_of(control) == control for control in controls)


def test_a_name_may_change_its_recipe():
    base = known_runs()["10M-d0.1"]
    assert find_run("10M-d0.1") == base
    assert find_run("10M-d0.1 window=32 freeze_model=True").recipe == base.recipe.replace(window=32, freeze_model=True)
    for name, value in [
        ("freeze_model", True),
        ("sequence_length", 2048),
        ("target_density", None),
        ("betas", [0.9, 0.99]),
        ("gate_noise", 0.5),
        ("regulariser_form", "linear"),
    ]:
        run = base.with_changes({name: value})
        assert find_run(run.name) == run
        assert find_run(control_of(run).name) == control_of(run)
    for name, base_name in [("10M-d0.11", "10M-d0.11"), ("11M-d0.1 window=32", "11M-d0.1"), ("", "")]:
        with pytest.raises(ValueError, match=f"unknown run '{base_name}'"):
            find_run(name)
    with pytest.raises(ValueError, match="'window' is not of the form FIELD=VALUE"):
        find_run("10M-d0.1 window")


def test_no_two_runs_of_the_suites_have_one_name():
    runs = list(with_controls(run for make in SUITES.values() for run in make()))
    assert len({run.name for run in runs}) == len(runs)
    namesakes = [Run("mine", get_recipe("fast", window=window)) for window in (1, 2)]
    with pytest.raises(ValueError, match="two runs are called 'mine'"):
        list(with_controls(namesakes))


def test_rows_tell_losses_from_the_shared_control(suite, tmp_path):
    code, rows = suite("20M-d0.2", "lora8-20M-d0.2")
    assert code == 0
    controls = [row for row in rows if row["policy"] == "dense"]
    assert [row["method"] for row in controls] == ["dense", "dense"]  # full training's, and LoRA's
    for row in rows:
        assert row["increase"] == pytest.approx(row["loss"] / row["dense_loss"] - 1)
        assert (row["commit"], row["device"], row["seed"], row["tokens"]) == ("abc", "cpu", 0, 1024)
        assert str(tmp_path) not in row["command"]
    pruned = [row for row in rows if row["method"] == "full"]
    assert {row["dense_loss"] for row in pruned} == {controls[0]["loss"]}
    assert [(row["policy"], row["threshold"]) for row in pruned[:5]] == [
        ("spkv", 0.3),
        ("spkv", 0.5),
        ("streaming", None),
        ("random", None),
        ("open", None),
    ]
    assert {row["target"] for row in pruned} == {0.2}
    assert {row["method"] for row in rows} == {"dense", "full", "lora"}


def test_a_frozen_model_is_compared_with_itself(suite):
    _, rows = suite("20M-d0.2", settings=["freeze_model=true"])
    base, opened = (next(row for row in rows if row["policy"] == policy) for policy in ("base", "open"))
    assert opened["method"] == "frozen"
    assert opened["dense_loss"] == base["loss"]
    assert opened["increase"] == pytest.approx(0, abs=1e-6)


def test_static_layouts_are_trained_beside_their_run_and_share_its_control(suite, work, tmp_path):
    # What `spkv hybrid` writes: one of a layer's two heads stays global.
    model = spkv.attach(load_base(work / "model"), spkv.SPKVConfig(window=8, layout=((0,), ())))
    spkv.save(model, tmp_path / "hybrid")
    report = {"strategy": "densest-heads", "global_heads": 1, "utility_covered": 0.75}
    (tmp_path / "hybrid" / "hybrid.json").write_text(json.dumps(report))
    options = ["--layouts", tmp_path / "hybrid", "--no-baselines"]
    code, rows = suite("20M-d0.2", settings=["target_density=0.2"], options=options)
    assert code == 0
    dense, _, *pruned, layout = rows
    assert [row["policy"] for row in pruned] == ["spkv", "spkv"]
    assert layout["run"].startswith("0.001024M ")
    assert layout["run"].endswith("layout=densest-heads-1 window=8 sinks=0")
    wanted = ("layout", "layout", "densest-heads", 0.75, None)
    assert tuple(layout[key] for key in ("policy", "method", "strategy", "coverage", "threshold")) == wanted
    heads = 2 * 2
    assert layout["density"] == pytest.approx(1 / heads)
    assert layout["density"] < layout["kept_fraction"] < 1
    assert layout["dense_loss"] == dense["loss"]
    assert layout["loss"] != dense["loss"]
    assert suite("20M-d0.2", settings=["target_density=0.2"], options=options) == (0, rows)
    with pytest.raises(ValueError, match="model holds no static layout"):
        suite("20M-d0.2", options=["--layouts", work / "model"])


def test_a_stopped_suite_goes_on_to_the_same_rows(suite, tmp_path, monkeypatch):
    _, expected = suite("20M-d0.2", output="whole")
    clock = itertools.count()
    with monkeypatch.context() as patch:
        # A second a look: the limit is reached within the second run's training.
        patch.setattr(recipes, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
        code, rows = suite("20M-d0.2", options=["--time-limit", 20])
    assert code == recipes.UNFINISHED
    assert [row["policy"] for row in rows] == ["dense", "base"]
    assert list(tmp_path.glob("out/model/20M*/checkpoint-*"))
    code, rows = suite("20M-d0.2")
    assert code == 0
    results = ("run", "policy", "threshold", "loss", "density", "increase")
    assert [[row[key] for key in results] for row in rows] == [[row[key] for key in results] for row in expected]

    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(recipes, "adapt", fail)
    assert suite("20M-d0.2") == (0, rows)


def test_retrieval_data_ask_for_what_they_say(work, tmp_path):
    tokenizer = from_scratch.byte_tokenizer()
    corpus = tokenize_files([work / "train.jsonl"], tokenizer, cache_dir=tmp_path, progress=False)
    made = retrieval_documents(corpus, tokenizer, tokens=3000, longest=300, seed=0)
    assert 3000 <= len(made.tokens) < 4000
    for document in np.split(made.tokens, made.document_starts[1:]):
        assert document[-1] == 0
        assert (document[:-1] != 0).all()
        context, question, answer = tokenizer.decode(document[:-1]).partition(" What is ")
        name = re.fullmatch(r"the magic number of (\w+)\?( The magic number of \1 is \d{7}\.)", answer)
        assert question
        assert name
        assert name[2] in context


def test_retrieval_data_belong_to_their_runs_alone(suite, work):
    with pytest.raises(SystemExit):
        suite("20M-d0.2+retrieval")
    _, rows = suite("20M-d0.2+retrieval", options=["--retrieval", work / "valid.jsonl"])
    assert {tuple(row["data"]) for row in rows} == {("train.jsonl", "valid.jsonl")}
    assert {row["run"].partition(" ")[0] for row in rows} == {"dense-0.001024M+retrieval", "20M-d0.2+retrieval"}


def test_nothing_starts_when_the_time_is_up(suite, capsys):
    code, rows = suite("20M-d0.2", options=["--time-limit", 0])
    assert (code, rows) == (recipes.UNFINISHED, [])
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["undone"]) == 2


def test_rows_of_several_files_add_up_by_key(tmp_path):
    circumstances = {"commit": "a", "command": "c", "device": "d"}
    recipe = get_recipe("fast")

    def results(name, **values):
        made = Results(tmp_path / name, circumstances)
        for seed, loss in values.items():
            identity = {"model": "m", "run": "fast", "seed": seed, "data": ["x"], "validation": "v"}
            identity |= {"validation_tokens": 1, "evaluation_length": 1}
            made.add_recipe(identity, recipe)
            made.add({**identity, "policy": "open", "threshold": None, "loss": loss})
        return made

    first = results("first.json", one=1.0, two=2.0)
    results("second.json", two=2.5, three=3.0)
    first.merge(tmp_path / "second.json")
    read = Results(tmp_path / "first.json", circumstances)
    assert [row["loss"] for row in read.rows] == [1.0, 2.5, 3.0]
    read.check_recipe({"model": "m", "run": "fast"}, recipe)
    with pytest.raises(ValueError, match="differs in window"):
        read.check_recipe({"model": "m", "run": "fast"}, recipe.replace(window=5))


@pytest.fixture
def attached(work, scatter_utilities):
    model = spkv.attach(spkv.checkpoint.load_base(work / "model"), spkv.SPKVConfig(window=8)).eval()
    scatter_utilities(model)
    return model


def test_the_mask_gives_what_the_cache_gives(attached):
    sequences = torch.randint(1, 250, (3, 40))
    gates = (ThresholdGate(0.5), SinkGate(2), RandomGate(0.3))
    policies = [Policy(type(gate).__name__, gate) for gate in gates]
    for gate, expected in zip(gates, evaluate_nll(attached, sequences, policies), strict=True):
        found = measure(attached, whole_sequences(sequences), gate, batch_size=2)
        for name in ("loss", "density", "kept_fraction"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name


def test_packed_rows_score_as_the_trainer_scores_them(attached, work, tmp_path):
    tokens = tokenize_files([work / "valid.jsonl"], from_scratch.byte_tokenizer(), cache_dir=tmp_path, progress=False)
    rows = PackedRows(tokens, 64)
    expected = evaluate_rows(attached, rows, Accelerator(cpu=True))
    found = measure(attached, rows, ThresholdGate(0.5), batch_size=4)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert found["density"] == pytest.approx(expected.density, rel=1e-5)


def test_the_figure_has_a_line_a_budget():
    row = {"model": "smollm2", "policy": "spkv", "evaluation_length": 4096, "seed": 0}
    rows = [
        {**row, "run": f"{budget}M-d{target:g}", "tokens": budget * 10**6, "threshold": threshold}
        | {"density": target / threshold / 2, "increase": 1e-4 / target}
        for budget, target, threshold in itertools.product((10, 20), (0.1, 0.2), (0.3, 0.5))
    ]
    (axes,) = frontier_figure({"rows": rows}).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["10 M tokens", "20 M tokens"]
    assert axes.lines[0].get_xdata().tolist() == [0.1, 0.2]
    wide = {**rows[1], "run": "10M-d0.1 window=512", "density": 0.07}
    other = {**wide, "run": "10M-d0.1 window=256"}
    (axes,) = frontier_figure({"rows": [*rows, wide, other]}).axes
    squares = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "s"]
    assert [points for points in squares if points] == [[0.07]]
    assert axes.get_legend().get_texts()[-1].get_text() == "window 512"
