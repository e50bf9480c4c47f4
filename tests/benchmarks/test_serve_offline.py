"""The offline serving benchmark: what it computes from numbers, engines that fail, and a small shape through vLLM."""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import spkv
from benchmarks import serve_offline, serve_offline_engine, serve_offline_model
from benchmarks.figures import RESULTS, offline_serving_figure
from benchmarks.serve_load import Reply
from benchmarks.serve_offline_engine import Run
from spkv.config import read_stored
from spkv.predictor import UtilityPredictor
from spkv.serving.settings import check_model
from spkv.serving.slabs import SlabCache


def options(*arguments, quick=True):
    return serve_offline._parse([*(["--quick"] if quick else []), *arguments])


def test_the_memory_holds_the_longest_dense_requests():
    eight_b = options(quick=False)
    eight_b.dtype = "bfloat16"
    # 129 steps read eight prompts, 100 are timed, 20 to spare.
    assert serve_offline.new_tokens("tpot", eight_b) == 249
    # 28 at 0.253 of their pairs fill 0.9 of what 8 do; 455 steps read them.
    assert serve_offline.requests("full", eight_b) == 28
    assert serve_offline.new_tokens("full", eight_b) == 455 + 120
    assert serve_offline.longest_request(eight_b) == 32_768 + 575
    assert serve_offline.kv_bytes(eight_b) == (8 * 261 + 1) * 128 * 131_072  # bytes of a token of Llama-3.1-8B
    eight_b.new_tokens = 1024
    assert serve_offline.longest_request(eight_b) == 32_768 + 1024


def test_rows_of_the_other_implementation_stay_if_they_were_measured_alike(tmp_path):
    chosen = options("--implementations", "spkv", "--json", str(tmp_path / "f.json"))

    def new(**changes):
        found = {"device": "d", "commit": "c", "versions": {}, "settings": {"steps": 3}, "engines": {}, "rows": []}
        return found | {"command": "two"} | changes

    alone = serve_offline.with_others(new(), chosen)
    assert (alone["commands"], alone["rows"]) == ({"spkv": "two"}, [])
    rows = [{"implementation": name} for name in ("dense", "spkv")]
    stored = alone | {"commands": {"dense": "one", "spkv": "old"}, "engines": {"dense": 1, "spkv": 2}, "rows": rows}
    chosen.json.write_text(json.dumps(stored))
    both = serve_offline.with_others(new(), chosen)
    assert (both["engines"], both["rows"]) == ({"dense": 1}, rows[:1])
    assert both["commands"] == {"dense": "one", "spkv": "two"}
    with pytest.raises(ValueError, match="holds rows with other commit, settings; choose another file"):
        serve_offline.with_others(new(commit="another", settings={"steps": 4}), chosen)
    chosen.json.write_text(json.dumps(stored | {"rows": rows[1:]}))
    assert serve_offline.with_others(new(commit="another"), chosen)["rows"] == []


def test_low_densities_fill_the_memory_as_far_as_the_engine_goes():
    assert options("--density", "0.1", quick=False).full_requests == 64


def test_of_dense_the_phase_full_would_be_tpot_again():
    assert serve_offline.phases("spkv", options("--phases", "load", "full")) == ["full", "load"]
    assert serve_offline.phases("dense", options("--phases", "load", "full")) == ["load"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--density", "0"],
        ["--chunk", "8"],
        ["--max-requests", "7"],
        ["--density", "1"],
        ["--full-requests", "65"],
        ["--implementations", "dense", "--phases", "full"],
    ],
)
def test_options_that_cannot_be_measured_are_refused(arguments):
    with pytest.raises(SystemExit):
        options(*arguments, quick=False)


def test_only_steps_in_which_all_make_a_token_are_timed(monkeypatch):
    monkeypatch.setattr(serve_offline_engine, "_SETTLING", 2)
    made = [1, 2, 3, 3, 3, 3, 3, 2, 3, 3, 3, 3]
    clock = [2.0**n for n in range(len(made))]
    times = serve_offline_engine.full_step_times(list(zip(clock, made, strict=True)), 3)
    assert times == [clock[n] - clock[n - 1] for n in (4, 5, 6, 10, 11)]


@pytest.fixture
def cache():
    cache = SlabCache(torch.zeros(64, 2, 16, 8), layers=2, kv_heads=2, window=4, slab_tokens=16, rows=3, max_tokens=64)
    cache.seen[:, 0], cache.seen[:, 1] = 24, 2  # the third has not run
    cache.kept[:, :2] = 5
    cache.kept[:, cache.padding_row * 2 :] = 99
    return cache


def test_density_is_that_of_the_rows(cache):
    read = serve_offline_model.read_density(cache, 0.25)
    assert read["density"] == pytest.approx(5 / 20)
    assert read["kept_fraction"] == pytest.approx((5 + 4 + 2) / 26)
    for asked in (0.2, 0.35):
        with pytest.raises(RuntimeError, match=f"the cache keeps 0.250 .* and {asked} was asked for"):
            serve_offline_model.read_density(cache, asked)


def test_an_empty_cache_has_no_density(cache):
    cache.seen.zero_()
    cache.kept.zero_()
    with pytest.raises(RuntimeError, match="keeps nan"):
        serve_offline_model.read_density(cache, 0.25)


def test_every_head_keeps_its_share_after_calibration():
    first, second = model = torch.nn.ModuleList(UtilityPredictor(16, 4, initial_bias=0.0) for _ in range(2))
    text = torch.randn(1, 1000, 16)

    @torch.no_grad()
    def read():
        for chunk in text.split(100, 1):
            kept = first(chunk) > 0.5
            second(chunk + kept.float().mean(1).unsqueeze(-1))

    passes = serve_offline_model.calibrate(model, 0.25, read)
    assert passes[0]["most"] - passes[0]["least"] > 0.05
    assert len(passes) == 3  # the second pass shows the later layer what the first shift did to the earlier one
    assert 0.24 < passes[-1]["least"] <= passes[-1]["mean"] <= passes[-1]["most"] < 0.26
    assert not any(module._forward_hooks for module in model)


def test_weights_are_drawn_in_place():
    model = torch.nn.Sequential(torch.nn.Linear(8, 64, bias=False), torch.nn.RMSNorm(64), UtilityPredictor(64, 2))
    before = [(parameter, parameter.data_ptr()) for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    serve_offline_model.randomise(model)
    assert [(parameter, parameter.data_ptr()) for parameter in model.parameters()] == before
    assert 0.015 < model[0].weight.std() < 0.025
    assert (model[1].weight == 1).all()
    assert (model[2].down.bias == 5.0).all()
    assert model[2].up.weight.std() > 0.1


def test_only_the_self_pruned_directory_says_so(tmp_path):
    for name in serve_offline.IMPLEMENTATIONS:
        (tmp_path / name).mkdir()
        serve_offline_model.write_directory(name, options(), tmp_path / name)
    assert {file.name for file in (tmp_path / "dense").iterdir()} <= {"config.json", "generation_config.json"}
    stored = read_stored(tmp_path / "spkv")
    assert check_model(stored, SimpleNamespace()) == spkv.SPKVConfig(window=32, initial_bias=0.0)
    assert stored["training"] == {"density": 0.25}
    written = json.loads((tmp_path / "spkv" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert (written["head_dim"], written["num_key_value_heads"]) == (128, 8)


def stub(run):
    return SimpleNamespace(drive=lambda *args: run)


def gauges(count):
    return [dict(in_flight=n, waiting=0, kv_use=n / 4, preemptions=n) for n in range(count)]


def test_a_step_of_the_whole_batch_is_what_tpot_says():
    chosen = options()
    steps = [(0.5 * n, chosen.dense_requests) for n in range(40)]
    replies = [Reply(sent=0, tokens=[0] * 45, first=n + 1.0, last=30) for n in range(chosen.dense_requests)]
    row = serve_offline_engine.measure_steps(stub(Run(replies, gauges(4), steps)), "tpot", chosen)
    assert (row["steps"], row["tpot_ms_median"], row["tpot_ms_p90"]) == (20, 500, 500)
    assert row["tokens_per_second"] == pytest.approx(chosen.dense_requests / 0.5)
    assert row["seconds_to_all_first_tokens"] == chosen.dense_requests
    assert (row["in_flight_max"], row["preemptions"]) == (2, 3)
    with pytest.raises(RuntimeError, match="5 steps in which all 2 requests made a token, not 20"):
        serve_offline_engine.measure_steps(stub(Run(replies, gauges(4), steps[:11])), "tpot", chosen)


def test_a_load_that_is_broken_off_says_so():
    chosen = options()
    replies = [Reply(sent=0, tokens=[0] * 48, first=1, last=n + 2.0) for n in range(chosen.requests)]
    whole = serve_offline_engine.measure_load(stub(Run(replies, gauges(4), [])), chosen, 0)
    assert whole["tokens_per_second"] == pytest.approx(48 * 8 / 9)
    assert "error" not in whole
    replies[5:] = [Reply(sent=0, tokens=[0] * 3, first=1), Reply(sent=0), Reply(sent=0)]
    part = serve_offline_engine.measure_load(stub(Run(replies, gauges(4), [])), chosen, 0)
    assert part["error"] == "broken off when 5 of 8 requests had ended; the numbers are theirs"
    assert part["tokens_per_second"] == pytest.approx(48 * 5 / 6)
    with pytest.raises(RuntimeError, match="no request ended in time"):
        serve_offline_engine.measure_load(stub(Run([Reply(sent=0)], gauges(2), [])), chosen, 0)


@pytest.mark.parametrize(
    ("work", "limit", "words"),
    [
        ("raise SystemExit(3)", "60", "its process ended with code 3"),
        ("import time; time.sleep(600)", "2", "not done in 2 s"),
    ],
)
def test_rows_that_an_engine_did_not_come_to_say_why(tmp_path, monkeypatch, capfd, work, limit, words):
    """Its first row stays."""
    first = serve_offline.row_head("dense", "tpot", options()) | {
        "tokens_per_second": 1.0, "tpot_ms_median": 2.0, "tpot_ms_p90": 3.0, "kv_use_max": 0.5,
    }  # fmt: skip
    script = f"import json; path = {str(tmp_path / 'rows.json')!r}; result = json.load(open(path)); "
    script += f"result['rows'].append(json.loads({json.dumps(first)!r})); json.dump(result, open(path, 'w')); {work}"
    monkeypatch.setattr(serve_offline, "command", lambda *args: [sys.executable, "-c", script])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    arguments = ["--quick", "--implementations", "dense", "--time-limit", limit, "--json", str(tmp_path / "rows.json")]
    start = time.monotonic()
    assert serve_offline.main([*arguments, "--commit", "abc"]) == 1
    assert time.monotonic() - start < 60
    result = json.loads((tmp_path / "rows.json").read_text())
    assert result["commit"] == "abc"
    assert result["rows"][0] == first
    assert (result["rows"][1]["phase"], result["rows"][1]["error"]) == ("load", words)
    captured = capfd.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["errors"] == 1
    assert (
        "dense  tpot 2 x (256+45) density 1.000: TPOT 2.00 ms (p90 3.00), 1.0 tokens/s, KV at most 50%" in captured.err
    )


def test_an_engine_that_fails_leaves_its_reason(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise ValueError("no memory")

    monkeypatch.setattr(serve_offline_engine, "Engine", fail)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": [], "engines": {}}))
    _, _, _, name, _, values = serve_offline.command("spkv", options("--phases", "load"), path)
    assert argparse.Namespace(**json.loads(values)).phases == ["load"]
    assert serve_offline_engine.main([name, str(path), values]) == 1
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["implementation"], row["phase"], row["error"]) == ("spkv", "load", "ValueError: no memory")
    assert "Traceback" in capsys.readouterr().err


def test_the_figure_shows_what_is_in_the_docs():
    result = json.loads((RESULTS / "serve-offline.json").read_text())
    axes = offline_serving_figure(result).axes
    shown = [[text.get_text() for text in panel.texts] for panel in axes]
    assert shown == [["12.5", "7.8"], ["8", "28"], ["642", "2,087"], ["440", "922"]]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_so(capsys):
    assert serve_offline.main(["--quick"]) == 2
    assert "pip install 'spkv[vllm]'" in capsys.readouterr().err


def test_vllm_runs_the_small_shape(tmp_path):
    pytest.importorskip("vllm")
    command = [sys.executable, "-m", "benchmarks.serve_offline", "--quick", "--implementations", "spkv"]
    command += ["--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(serve_offline.__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["errors"] == 0
    result = json.loads((tmp_path / "rows.json").read_text())
    assert result["engines"]["spkv"]["attention"] == "SelfPrunedAttention"
    tpot, full, load = result["rows"]
    for row in (tpot, full, load):
        assert row["density"] == pytest.approx(0.25, abs=0.05)
        assert row["kept_fraction"] < 0.5
        assert row["tokens_per_second"] > 0
    assert tpot["kv_use_max"] < 0.5  # and a dense cache would fill it
    assert full["requests"] == full["in_flight_max"] == 3
    assert load["in_flight_max"] > tpot["requests"] == tpot["in_flight_max"]
