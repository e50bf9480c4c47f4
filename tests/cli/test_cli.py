"""The command line: what it prints, and where."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer

import spkv
from spkv.cli import main
from spkv.cli.console import format_kept_fraction
from spkv.cli.models import place_and_kind
from spkv.evals.task import Example, Question
from spkv.hf.generation import generate

COMMANDS = ("demo", "generate", "eval", "inspect", "adapt", "report")
PROMPT = "A prompt that is longer than the window of sixteen tokens."
GENERATION = {
    "text": str,
    "prompt_tokens": int,
    "new_tokens": int,
    "density": float,
    "kept_fraction": float,
    "kv_bytes": int,
    "dense_kv_bytes": int,
    "prefill_seconds": float,
    "decode_tokens_per_second": float,
}


needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs a command line and returns stdout, stderr and exit code."""

    def call(*arguments: object) -> tuple[str, str, int]:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return captured.out, captured.err, exit_.value.code or 0

    return call


@pytest.fixture
def run_json(run):
    """Runs a command with --json, which must print that and nothing else to stdout."""

    def call(*arguments: object):
        out, err, code = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(run, command):
    out, _, code = run(command, "--help")
    assert code == 0
    assert f"Example:\n    spkv {command} " in out
    assert "--json" in out


def test_help_names_every_recipe(run):
    from spkv.training import RECIPES

    out = run("adapt", "--help")[0]
    assert [name for name in RECIPES if name not in out] == []


def test_help_names_every_command_and_is_quick():
    code = (
        "import sys; from spkv.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted({'torch', 'transformers', 'rich.table', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(f"\n  {command} " in done.stdout for command in COMMANDS)
    assert done.stdout.endswith("[]\n")


def test_version(run):
    assert run("--version")[0] == f"{spkv.__version__}\n"


def test_generate_prints_what_the_library_measures(run_json, base, adapter):
    result = run_json("generate", base, "--adapter", adapter, "--prompt", PROMPT, "--max-new-tokens", 12)
    assert {key: type(value) for key, value in result.items()} == GENERATION
    assert list(result) == list(GENERATION)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    expected = generate(spkv.load(base, adapter=adapter), tokenizer, ids, max_new_tokens=12).to_dict()
    timed = ("prefill_seconds", "decode_tokens_per_second")
    assert {k: v for k, v in result.items() if k not in timed} == {k: v for k, v in expected.items() if k not in timed}
    assert (result["prompt_tokens"], result["new_tokens"]) == (len(PROMPT), 12)
    assert 0 < result["density"] < 1
    assert result["density"] < result["kept_fraction"] < 1


def test_generate_takes_a_whole_model_a_file_and_a_threshold(run_json, base, adapter, whole, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    given = ("--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 8)
    parts, one = run_json("generate", base, "--adapter", adapter, *given), run_json("generate", whole, *given)
    assert (parts["text"], parts["density"]) == (one["text"], one["density"])
    strict = run_json("generate", whole, *given, "--threshold", 0.9)
    assert strict["density"] < one["density"]


def test_coded_pages_take_less_and_change_little(run_json, whole, text_file):
    given = ("generate", whole, "--prompt", PROMPT, "--max-new-tokens", 8)
    plain, coded = run_json(*given), run_json(*given, "--page-dtype", "int8")
    assert coded["kept_fraction"] == pytest.approx(plain["kept_fraction"], rel=0.05)
    evaluated = ("eval", whole, "--data", text_file, "--sequence-length", 64, "--policies", "spkv")
    exact, rounded = (run_json(*evaluated, *more)[0] for more in ((), ("--page-dtype", "int8")))
    assert rounded["loss"] != exact["loss"]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=1e-2)


def test_generate_dense_is_the_model_as_it_was(run_json, base, adapter, whole):
    given = ("--prompt", PROMPT, "--max-new-tokens", 8, "--dense")
    plain = run_json("generate", base, *given)
    assert (plain["density"], plain["kept_fraction"]) == (1.0, 1.0)
    held = 2 * 2 * (len(PROMPT) + 7) * 2 * 8 * 4  # layers, key and value, tokens, heads, head size, bytes
    assert plain["kv_bytes"] == plain["dense_kv_bytes"] == held
    # The adapter has no LoRA, so the base's weights are the adapted ones.
    for model in ((base, "--adapter", adapter), (whole,)):
        assert run_json("generate", *model, *given)["text"] == plain["text"]


def test_generate_applies_the_chat_template(run_json, whole):
    result = run_json("generate", whole, "--prompt", "Hi", "--chat", "--max-new-tokens", 1, "--dtype", "bfloat16")
    assert result["prompt_tokens"] == len("[user] Hi[assistant]")
    assert result["decode_tokens_per_second"] is None
    assert result["dense_kv_bytes"] == 2 * 2 * 20 * 2 * 8 * 2


def test_generate_computes_in_float32_on_a_cpu(run_json, whole, tmp_path):
    spkv.save(spkv.load(whole, dtype="bfloat16"), tmp_path / "half")
    AutoTokenizer.from_pretrained(whole).save_pretrained(tmp_path / "half")
    given = ("generate", tmp_path / "half", "--prompt", "a" * 20, "--max-new-tokens", 1, "--device", "cpu")
    values = 2 * 2 * 20 * 2 * 8  # layers, key and value, tokens, heads, head size
    assert run_json(*given)["dense_kv_bytes"] == values * 4
    assert run_json(*given, "--dtype", "bfloat16")["dense_kv_bytes"] == values * 2


def test_generate_for_people(run, whole):
    out, _, code = run("generate", whole, "--prompt", PROMPT, "--max-new-tokens", 2)
    assert code == 0
    assert f"{len(PROMPT)} tokens of prompt, 2 new" in out
    assert "×)" in out
    assert format_kept_fraction(0.2083) == "0.21 (4.8×)"
    assert format_kept_fraction(None) == "–"


def test_eval_prints_a_row_a_policy(run_json, base, adapter, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    rows = run_json(
        "eval", base, "--adapter", adapter, "--task", "nll", "--data", text_file, other, "--sequence-length", 100,
        "--thresholds", "0.3,0.5,0.7", "--batch-size", 3,
    )  # fmt: skip
    keys = {"task", "policy", "threshold", "length", "score", "loss", "density", "kept_fraction", "kv_bytes", "seconds"}
    assert all(keys < set(row) for row in rows)
    assert [(row["policy"], row["threshold"]) for row in rows] == [
        ("dense", None), ("spkv", 0.3), ("spkv", 0.5), ("spkv", 0.7), ("streaming", None), ("random", None),
    ]  # fmt: skip
    assert {(row["examples"], row["tokens"]) for row in rows} == {(8, 8 * 100)}
    densities = [row["density"] for row in rows]
    assert densities[0] == 1 > densities[1] > densities[2] > densities[3]
    # Four standard deviations of the share of 84 positions in 4 heads.
    assert densities[5] == pytest.approx(densities[2], abs=0.11)
    few = run_json(
        "eval", base, "--adapter", adapter, "--data", text_file, "--sequence-length", 100, "--policies", "dense",
        "--limit", 1,
    )  # fmt: skip
    assert (few[0]["examples"], len(few)) == (1, 1)


def test_eval_takes_the_stored_threshold(run_json, run, whole, text_file, tmp_path):
    other = shutil.copytree(whole, tmp_path / "other")
    stored = json.loads((other / "spkv_config.json").read_text())
    stored["config"]["threshold"] = 0.7
    (other / "spkv_config.json").write_text(json.dumps(stored))
    data = ("--data", text_file, "--sequence-length", 100, "--policies", "spkv,random", "--limit", 1)
    for options in ((), ("--match-thresholds", "0.7")):
        rows = run_json("eval", other, *data, *options)
        assert [(row["policy"], row["threshold"]) for row in rows] == [("spkv", 0.7), ("random", None)]
    assert run_json("eval", other, *data, "--thresholds", "0.4")[0]["threshold"] == 0.4
    _, err, code = run("eval", other, *data, "--match-thresholds", "0.5")
    assert code != 0
    assert "cannot be matched: spkv is evaluated at [0.7]" in err


def test_eval_for_people(run, whole, text_file):
    out, err, code = run("eval", whole, "--data", text_file, "--sequence-length", 100, "--policies", "dense,spkv")
    assert code == 0
    assert "nll: 4 of 100 tokens" in out
    assert "(against dense)" in out
    assert "evaluating" in err


class StubTasks(ModuleType):
    """In the place of `spkv.evals.tasks`: a task whose answers count their letters e."""

    @dataclass
    class TaskOptions:
        depths: int = 2
        essays: Path | None = None

    class Letters:
        name = "letters"

        def __init__(self, depths: int):
            self.depths = depths

        def examples(self, tokenizer, length, count, seed):
            return [
                Example("A text. " * (10 + seed), (Question(f"{n}?", ("e",), 4),), {"depth": n % self.depths / 10})
                for n in range(count)
            ]

        def score(self, answer, question):
            return answer.count("e") / 4

    def make_tasks(self, names, options):
        if names != ["letters"]:
            raise ValueError(f"unknown tasks {names}; known are letters")
        return [self.Letters(options.depths)]


@pytest.fixture
def stub_tasks(monkeypatch):
    monkeypatch.setitem(sys.modules, "spkv.evals.tasks", StubTasks("spkv.evals.tasks"))


def test_a_cpu_computes_in_float32_unless_told_otherwise():
    cpu = torch.device("cpu")
    assert place_and_kind("cpu", None) == (cpu, torch.float32)
    assert place_and_kind("cpu", "bfloat16") == (cpu, torch.bfloat16)
    assert place_and_kind("meta", None) == (torch.device("meta"), None)


def test_eval_runs_tasks_at_several_lengths_and_goes_on(run_json, run, whole, text_file, tmp_path, stub_tasks):
    given = (
        "eval", whole, "--task", "letters,nll", "--data", text_file, "--sequence-length", "120,140", "--limit", 3,
        "--policies", f"dense,spkv,twin={whole}", "--task-option", "depths=3", "--batch-size", 2, "--seed", 2,
        "--output", tmp_path / "out",
    )  # fmt: skip
    rows = run_json(*given)
    assert [(row["task"], row["length"]) for row in rows[::3]] == [
        ("nll", 120), ("letters", 120), ("nll", 140), ("letters", 140),
    ]  # fmt: skip
    assert [row["policy"] for row in rows[:3]] == ["dense", "spkv", "twin"]
    assert list(rows[3]["by_fact"]["depth"]) == ["0.0", "0.1", "0.2"]
    assert {**rows[2], "policy": "spkv", "seconds": 0} == {**rows[1], "seconds": 0}
    assert run_json(*given) == rows
    stored = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert stored == [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    assert "letters: 3 of 120 tokens" in run(*given)[0]
    _, err, code = run(*given, "--seed", 3)
    assert code == 2
    assert "holds an evaluation with other arguments: examples was" in err


def test_eval_finds_the_base_of_an_adapter(run_json, run, base, adapter, whole, text_file, tmp_path):
    model = spkv.load(whole)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * weight.std(), alpha=0.02)
    spkv.save(model, tmp_path / "other")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "other")
    given = (
        "eval", tmp_path / "other", "--data", text_file, "--sequence-length", 100, "--limit", 2,
        "--policies", f"dense,spkv,twin={adapter}",
    )  # fmt: skip
    rows = {row["policy"]: row for row in run_json(*given, "--reference", base)}
    twin = run_json("eval", base, "--adapter", adapter, *given[2:8], "--policies", "spkv")[0]
    own = (
        "eval",
        base,
        "--adapter",
        adapter,
        *given[2:8],
        "--policies",
        "dense",
    )  # an adapter is not looked for on another one
    assert run_json(*own, "--reference", adapter)[0]["loss"] == run_json(*own)[0]["loss"]
    assert rows["twin"]["loss"] == twin["loss"] != rows["spkv"]["loss"]
    _, err, code = run(*given)
    assert code == 2
    assert "in the base it was trained on" in err


def test_eval_names_what_tasks_cannot_take(run, whole, text_file, stub_tasks):
    for arguments, message in (
        (["--task", "ruler"], "unknown tasks ['ruler']; known are letters"),
        (["--task", "letters", "--data", text_file], "task nll needs --data FILE..., and other tasks take none"),
        (["--task", "nll"], "task nll needs --data FILE..., and other tasks take none"),
        (["--task", "letters"], "the text has 4,096 tokens, but the model has 256 positions"),
        (["--task", "letters", "--task-option", "depth=3"], "NAME=VALUE with one of depths, essays, not 'depth=3'"),
        (["--task", "letters", "--sequence-length", "2k"], "--sequence-length takes whole numbers"),
        (["--task", "letters", "--sequence-length", "100", "--oracle"], "is answered in words, which takes a cache"),
    ):
        _, err, code = run("eval", whole, *arguments)
        assert code == 2
        assert message in err.splitlines()[-1]


def test_eval_reads_sequences_beyond_the_positions_in_windows(run_json, whole, text_file):
    (row,) = run_json("eval", whole, "--data", text_file, "--sequence-length", 400, "--policies", "dense")
    assert (row["examples"], row["tokens"]) == (1, 400)
    (masked,) = run_json(
        "eval", whole, "--data", text_file, "--sequence-length", 400, "--policies", "dense", "--oracle"
    )
    assert masked["loss"] == pytest.approx(row["loss"], rel=1e-5)


@needs_matplotlib
def test_report_draws_what_eval_wrote(run_json, run, whole, text_file, tmp_path):
    given = ("eval", whole, "--data", text_file, "--sequence-length", "100,140", "--policies", "dense,spkv")
    rows = run_json(*given, "--output", tmp_path / "results")
    result = run_json("report", tmp_path / "results", "--output", tmp_path / "out")
    assert Path(result["page"]).read_text().count("<tr>") == 1 + len(rows)
    assert all(Path(file).is_file() for file in result["pictures"])
    assert "report.html" in run("report", tmp_path / "results", "--output", tmp_path / "out")[0].replace("\n", "")
    _, err, code = run("report", tmp_path / "absent", "--output", tmp_path / "out")
    assert code == 2
    assert "no such file of results" in err


def test_lm_eval_hands_its_arguments_on(run, monkeypatch):
    calls = []
    stub = ModuleType("spkv.evals.harness")
    stub.main = calls.append
    monkeypatch.setitem(sys.modules, "spkv.evals.harness", stub)
    given = ["run", "--model", "spkv", "--model_args", "pretrained=m,threshold=0.3", "--help"]
    assert run("lm-eval", *given)[2] == 0
    assert calls == [given]


def test_lm_eval_says_how_to_install_it(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "spkv.evals.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    _, err, code = run("lm-eval", "run")
    assert code == 2
    assert 'pip install "spkv[lm-eval]"' in err


def test_inspect_writes_a_page_and_its_data(run_json, run, whole, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Another text, a shorter one.")
    given = (
        "inspect", whole, "--text", text_file, other, "--output", tmp_path / "out", "--tokens", 120, "--threshold", 0.4,
        "--later-queries", 2,
    )  # fmt: skip
    result = run_json(*given)
    for kind in ("inspection_page", "inspection_json", "density_png"):
        path = result.pop(kind, None)
        assert (path is None and kind == "density_png") or Path(path).is_file()
    assert result.pop("documents") == 2
    stored = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert result == {key: stored[key] for key in result}
    assert (result["tokens"], result["threshold"], result["window"]) == (120 + 28, 0.4, 16)
    assert 0 < result["density"] < 1
    assert [document["name"] for document in stored["documents"]] == ["notes.txt", "other.txt"]
    assert "inspection.html" in run(*given)[0].replace("\n", "")


def test_hybrid_writes_a_checkpoint_that_other_commands_take(run, run_json, whole, text_file, tmp_path):
    made = []

    def hybrid(*options):
        made.append(tmp_path / f"hybrid-{len(made)}")
        return run_json("hybrid", whole, "--text", text_file, "--tokens", 200, "--output", made[-1], *options)

    report = hybrid("--global-heads", 1)
    assert (report["sinks"], report["kept_fraction"]) == (4, pytest.approx(0.25 + 0.75 * (16 + 4) / 256))
    report = hybrid("--sinks", 0, "--global-heads", 1, "--strategy", "random", "--seed", 3)
    output = made[-1]
    assert json.loads((output / "hybrid.json").read_text()) == report
    assert (report["global_heads"], report["heads"], report["length"]) == (1, 4, 256)
    assert report["kept_fraction"] == pytest.approx(0.25 + 0.75 * 16 / 256)
    assert 0 < report["utility_covered"] < 1
    generated = run_json("generate", output, "--prompt", PROMPT, "--max-new-tokens", 2)
    assert generated["density"] == 0.25
    rows = run_json("eval", output, "--data", text_file, "--sequence-length", 100)
    assert [(row["policy"], row["threshold"]) for row in rows] == [
        ("dense", None), ("spkv", None), ("streaming", None), ("random", None),
    ]  # fmt: skip
    _, err, code = run("eval", output, "--data", text_file, "--sequence-length", 100, "--thresholds", "0.3")
    assert code != 0
    assert "a static layout has no threshold" in err
    assert rows[1]["density"] == 0.25
    inspected = run_json("inspect", output, "--text", text_file, "--tokens", 100, "--output", tmp_path / "page")
    assert (inspected["density"], inspected["threshold"]) == (0.25, None)
    learned = ("--strategy", "learned", "--steps", 2, "--sequence-length", 100)
    assert hybrid("--sinks", 0, "--global-heads", 1, *learned)["global_heads"] == 1
    half = hybrid("--sinks", 0, "--kv-budget", 0.5, "--length", 160, "--strategy", "interleave")
    assert (half["global_heads"], half["kept_fraction"]) == (0, 0.1)  # one layer of two would be 0.55
    half = hybrid("--sinks", 0, "--kv-budget", 0.55, "--length", 160, "--strategy", "interleave")
    assert (half["global_heads"], half["layout"]) == (2, {"0": [], "1": [0, 1]})


def test_hybrid_writes_over_no_model(run, whole, text_file, tmp_path):
    _, err, code = run("hybrid", whole, "--text", text_file, "--global-heads", 1, "--output", whole)
    assert code == 2
    assert "holds a model already" in err


def test_adapt_hands_its_options_on(run_json, monkeypatch, base, tmp_path):
    calls = []

    def fake(*arguments, **options):
        print("a library's own words")
        calls.append((arguments, options))
        return {"steps": 3}

    monkeypatch.setattr("spkv.training.adapt", fake)
    result = run_json(
        "adapt", base, "--data", "a.txt", "b.jsonl", "--data", "c.txt", "--output", tmp_path, "--recipe",
        "paper", "--lora-rank", 8, "--tokens", 5000, "--sequence-length", 64, "--learning-rate", 0.01,
        "--validation", "d.txt", "--resume", "--seed", 7, "--window", 32, "--standardised-inputs",
    )  # fmt: skip
    assert result == {"steps": 3}
    (model, data, output, recipe), options = calls[0]
    assert (model, sorted(map(str, data)), output) == (str(base), ["a.txt", "b.jsonl", "c.txt"], tmp_path)
    assert (recipe.name, recipe.lora_rank, recipe.tokens, recipe.window) == ("paper", 8, 5000, 32)
    assert (recipe.sequence_length, recipe.learning_rate, recipe.target_density) == (64, 0.01, None)
    assert recipe.standardised_inputs
    assert options == {
        "validation": [Path("d.txt")],
        "batch_size": None,
        "gradient_checkpointing": False,
        "compile": False,
        "resume": True,
        "seed": 7,
    }


BAD = {
    "no prompt": (["generate", "{whole}"], "give the prompt with one of --prompt TEXT and --prompt-file FILE"),
    "two prompts": (
        ["generate", "{whole}", "--prompt", "a", "--prompt-file", "b"],
        "give the prompt with one of --prompt TEXT and --prompt-file FILE",
    ),
    "empty prompt": (["generate", "{whole}", "--prompt", " \n"], "the prompt is empty"),
    "missing prompt file": (["generate", "{whole}", "--prompt-file", "absent"], "no such data file: absent"),
    "threshold": (
        ["generate", "{whole}", "--prompt", "a", "--threshold", "1.5"],
        "threshold must lie strictly between 0 and 1, not 1.5",
    ),
    "dense with threshold": (
        ["generate", "{whole}", "--prompt", "a", "--threshold", "0.5", "--dense"],
        "--dense keeps every pair as it is: it cannot be combined with --threshold or --page-dtype",
    ),
    "long prompt": (
        ["generate", "{whole}", "--prompt", "a" * 250, "--max-new-tokens", "7"],
        "the text has 250 tokens and 7 new ones are asked for, but the model has 256 positions",
    ),
    "no new tokens": (
        ["generate", "{whole}", "--prompt", "a", "--max-new-tokens", "0"],
        "max_new_tokens must be at least 1, not 0",
    ),
    "missing model": (["generate", "./absent", "--prompt", "a"], "no such model directory: ./absent"),
    "missing model to adapt": (
        ["adapt", "./absent", "--data", "{text}", "--output", "out"],
        "no such model directory: ./absent",
    ),
    "unknown model": (["generate", "no such!", "--prompt", "a"], "cannot find or download the model 'no such!'"),
    "unknown model to adapt": (
        ["adapt", "no such!", "--data", "{text}", "--output", "out"],
        "cannot find or download the model 'no such!'",
    ),
    "adapter as a model": (["generate", "{adapter}", "--prompt", "a"], "is an adapter; give the model that it was"),
    "adapter to adapt": (
        ["adapt", "{adapter}", "--data", "{text}", "--output", "out"],
        "is an adapter; give the model that it was made for, and this as adapter= (--adapter)",
    ),
    "not adapted": (["generate", "{base}", "--prompt", "a"], "Pass adapter=DIR (--adapter DIR)"),
    "dense control": (
        ["eval", "{base}", "--data", "{text}", "--sequence-length", "100", "--policies", "dense"],
        "`spkv eval` compares with a dense model given as --reference",
    ),
    "no adapter": (["generate", "{base}", "--adapter", "absent", "--prompt", "a"], "'absent' is no adapter"),
    "device": (["generate", "{whole}", "--prompt", "a", "--device", "abacus"], "unknown device 'abacus'"),
    "dtype": (
        ["generate", "{whole}", "--prompt", "a", "--dtype", "int3"],
        "unknown dtype 'int3'; known are float32, bfloat16, float16",
    ),
    "missing data": (
        ["eval", "{whole}", "--data", "absent", "--sequence-length", "50"],
        "no such data file: absent",
    ),
    "thresholds": (
        ["eval", "{whole}", "--data", "{text}", "--thresholds", "0.3;0.5"],
        "--thresholds takes numbers with commas between, such as 0.3,0.5, not '0.3;0.5'",
    ),
    "threshold of eval": (
        ["eval", "{whole}", "--data", "{text}", "--thresholds", "0.3,0"],
        "threshold must lie strictly between 0 and 1, not 0.0",
    ),
    "policy": (["eval", "{whole}", "--data", "{text}", "--policies", "h3o"], "unknown policies ['h3o']"),
    "lonely policy": (
        ["eval", "{whole}", "--data", "{text}", "--policies", "random"],
        "policy random takes its density from policy spkv",
    ),
    "absent twin": (
        ["eval", "{whole}", "--data", "{text}", "--policies", "twin=absent"],
        "policy twin needs a model or an adapter, and there is no directory 'absent'",
    ),
    "short sequences": (
        ["eval", "{whole}", "--data", "{text}", "--sequence-length", "16"],
        "sequence_length must exceed the window of 16 tokens",
    ),
    "short documents": (
        ["eval", "{whole}", "--data", "{short}", "--sequence-length", "200"],
        "no document has 200 tokens (sequence_length); the longest has 6",
    ),
    "long text": (
        ["inspect", "{whole}", "--text", "{text}", "--output", "out"],
        "the text has 448 tokens, but the model has 256 positions",
    ),
    "heads and budget": (
        ["hybrid", "{whole}", "--text", "{text}", "--output", "out"],
        "give one of --global-heads N and --kv-budget F",
    ),
    "no documents": (
        ["inspect", "{whole}", "--text", "{text}", "--output", "out", "--documents", "0"],
        "the number of documents must be at least 1, not 0",
    ),
    "recipe": (
        ["adapt", "{base}", "--data", "{text}", "--output", "out", "--recipe", "slow"],
        "unknown recipe 'slow'; known are paper, fast",
    ),
    "target density": (
        ["adapt", "{base}", "--data", "{text}", "--output", "out", "--target-density", "2"],
        "target_density must be strictly in (0, 1), not 2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(run, monkeypatch, tmp_path, base, adapter, whole, text_file, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("Short.")
    places = {
        "{base}": base,
        "{adapter}": adapter,
        "{whole}": whole,
        "{text}": text_file,
        "{short}": tmp_path / "short.txt",
    }
    arguments, message = BAD[name]
    out, err, code = run(*(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("tokenising")]
    assert len(lines) == 1, err
    assert lines[0].startswith("spkv: error: ")
    assert message in lines[0]


def test_errors_can_be_traced(monkeypatch):
    monkeypatch.setenv("SPKV_TRACEBACK", "1")
    with pytest.raises(ValueError, match="the prompt is empty"):
        main(["generate", "x", "--prompt", ""])


def test_faults_of_ours_are_not_hidden(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("a fault")

    monkeypatch.setattr("spkv.cli.commands.tokenizer_and_config", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["generate", "x", "--prompt", "a"])


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "spkv.cli", "--version"], capture_output=True, text=True)
    assert done.stdout == f"{spkv.__version__}\n"


def test_several_files_follow_an_option():
    from spkv.cli import _repeat_options

    given = "adapt m --data a b --validation c d --output o --data e"
    expected = "adapt m --data a --data b --validation c --validation d --output o --data e"
    assert " ".join(_repeat_options(given.split(" "))) == expected
