from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import spkv
from spkv.checkpoint import load_base
from spkv.hf import compiled
from spkv.hf.attach import attach
from spkv.predictor import UtilityPredictor
from spkv.training import adapt
from spkv.training.checkpoints import last_checkpoint
from spkv.training.data import PackedRows, spread
from spkv.training.parameters import prepare_parameters
from spkv.training.schedule import DensityController
from spkv.training.sizes import accumulation_steps, allowed_batch_sizes, base_parameters, default_batch_size
from spkv.training.tokens import tokenize_files
from spkv.training.trainer import AdaptationTrainer


@pytest.fixture
def run(model_directory: Path, text_file: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(recipe: Any, output: str = "out", **options: Any) -> dict[str, Any]:
        options = dict(model=model_directory, data=[text_file], batch_size=2, log_every=1, progress=False) | options
        return adapt(options.pop("model"), options.pop("data"), tmp_path / output, recipe, **options)

    return run


def stored(directory: Path) -> dict[str, Tensor]:
    """All weights in a result directory."""
    files = sorted(directory.glob("*.safetensors"))
    return {f"{file.name}:{key}": value for file in files for key, value in load_file(file).items()}


def entries(directory: Path) -> list[dict[str, float]]:
    """The training log of a finished run, without what depends on the clock."""
    history = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.mark.parametrize("name", ["fast", "fast-lora", "fast-frozen"])
def test_the_result_loads_and_scores_as_the_summary_says(
    run, recipe_of, tmp_path, text_file, model_directory, tokenizer, name
) -> None:
    recipe = recipe_of(name, initial_bias=0.0, predictor_lr_multiplier=0.3)
    summary = run(recipe, validation=[text_file], validation_tokens=300)
    output = tmp_path / "out"
    assert summary == json.loads((output / "summary.json").read_text())
    assert not list(output.glob("checkpoint-*"))
    assert 0.0 < summary["density"] < 1.0
    assert name == "fast-frozen" or summary["validation_loss"] < summary["base_validation_loss"]

    model = spkv.load(output) if name == "fast" else spkv.load(model_directory, adapter=output)
    assert spkv.attachment(model).config == recipe.config()
    rows = spread(PackedRows(tokenize_files([text_file], tokenizer, progress=False), 64), 300)
    losses, kept, left = [], 0, 0
    for row in rows:
        batch = {key: value[None] for key, value in row.items()}
        with torch.no_grad(), spkv.attachment(model).record() as record:
            losses += [float(model(**batch, use_cache=False).loss)] * int((row["labels"] != -100).sum())
        for utility in record.utilities.values():
            for s in range(64 - 8):
                if row["segment_ids"][s + 8] == row["segment_ids"][s]:
                    kept += int((utility[0, :, s] >= 0.5).sum())
                    left += utility.shape[1]
    assert summary["validation_tokens"] == len(losses)
    assert summary["validation_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert summary["density"] == pytest.approx(kept / left, abs=2e-3)
    AutoTokenizer.from_pretrained(output)


def test_a_frozen_model_gets_an_adapter_and_stays_what_it_was(run, recipe_of, tmp_path, model_directory) -> None:
    run(recipe_of("fast-frozen"))
    output = tmp_path / "out"
    assert {path.name for path in output.glob("*.safetensors")} == {"predictor.safetensors"}
    assert {weight.dtype for weight in stored(output).values()} == {torch.bfloat16}
    model, base = spkv.load(model_directory, adapter=output), load_base(model_directory)
    weights = {key: weight for key, weight in model.state_dict().items() if "utility_predictor" not in key}
    assert weights.keys() == base.state_dict().keys()
    assert all(torch.equal(weights[key], weight) for key, weight in base.state_dict().items())


def test_a_static_layout_leaves_a_frozen_model_nothing_to_train(run, recipe_of, tmp_path, model_directory) -> None:
    base = attach(load_base(model_directory), spkv.SPKVConfig(window=8, layout=((1,), ())))
    spkv.save(base, tmp_path / "hybrid")
    with pytest.raises(ValueError, match="no gates to train, and fast-frozen trains nothing else"):
        run(recipe_of("fast-frozen"), model=tmp_path / "hybrid")


def test_the_summary_is_complete(run, recipe_of, tmp_path, text_file) -> None:
    summary = run(recipe_of(), validation=[text_file])
    assert summary["recipe"] == recipe_of().to_dict()
    assert (summary["steps"], summary["tokens"], summary["seed"]) == (12, 12 * 256, 0)
    assert (summary["device"], summary["processes"], summary["data"]) == ("cpu", 1, ["train.jsonl"])
    assert summary["versions"].keys() == {"spkv", "python", "torch", "transformers", "accelerate", "peft"}
    assert [len(heads) for heads in summary["densities"].values()] == [2, 2]
    assert summary["train_loss"] == entries(tmp_path / "out")[-1]["loss"]
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"])
    trained_to = json.loads((tmp_path / "out" / "spkv_config.json").read_text())["training"]
    assert trained_to["density"] == summary["density"]


def test_a_loss_that_rose_is_worth_a_warning(run, recipe_of, text_file, caplog) -> None:
    run(recipe_of(), validation=[text_file])
    assert "the held-out loss rose" not in caplog.text
    run(recipe_of(learning_rate=3.0, predictor_lr_multiplier=0.0), "wrecked", validation=[text_file])
    assert "the held-out loss rose" in caplog.text


def test_a_frozen_model_whose_loss_rose_is_told_why(run, recipe_of, text_file, caplog, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["spkv.training.adapt"], "_TOLERATED_RISE", 0.5)
    run(recipe_of("fast-frozen"), validation=[text_file])
    assert "the frozen model misses what is dropped" in caplog.text


def test_the_control_is_an_ordinary_model(run, recipe_of, tmp_path) -> None:
    summary = run(recipe_of("dense-control"))
    assert "density" not in summary
    output = tmp_path / "out"
    assert not (output / "spkv_config.json").exists()
    assert not any("utility_predictor" in key for key in stored(output))
    AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_a_static_layout_is_trained_with_constant_gates(
    run, recipe_of, tmp_path, text_file, model_directory, tokenizer, lora_rank
) -> None:
    layout = ((1,), ())
    config = spkv.SPKVConfig(window=8, layout=layout, page_size=4, page_dtype="int8")
    base = attach(load_base(model_directory, dtype=torch.float32), config)
    spkv.save(base, tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    recipe = recipe_of("fast" if lora_rank is None else "fast-lora")
    summary = run(recipe, model=tmp_path / "hybrid", validation=[text_file], validation_tokens=600)
    losses = [entry["loss"] for entry in entries(tmp_path / "out")]
    assert losses[-1] < losses[0]
    assert summary["recipe"]["layout"] == [[1], []]
    output = tmp_path / "out"
    assert not (output / "predictor.safetensors").exists()
    trained = spkv.load(output) if lora_rank is None else spkv.load(tmp_path / "hybrid", adapter=output)
    kept = spkv.attachment(trained).config
    assert (kept.layout, kept.page_size, kept.page_dtype) == (layout, 4, "int8")
    rows = spread(PackedRows(tokenize_files([text_file], tokenizer, progress=False), 64), 600)
    total = tokens = 0.0
    for row in rows:
        count = int((row["labels"][1:] != -100).sum())
        with torch.no_grad():
            loss = trained(**{key: value[None] for key, value in row.items()}, use_cache=False).loss
        total, tokens = total + float(loss) * count, tokens + count
    assert summary["validation_loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_a_layout_fixes_its_density_whatever_the_recipe_aims_at(
    run, recipe_of, tmp_path, model_directory, tokenizer, caplog
) -> None:
    base = attach(load_base(model_directory), spkv.SPKVConfig(window=8, layout=((), ())))
    spkv.save(base, tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    # `fast` has a target of its own, about which there is nothing to say.
    summary = run(recipe_of(target_density=0.2, regulariser_form="concave"), model=tmp_path / "hybrid")
    assert "target_density" not in caplog.text
    other = run(recipe_of(target_density=0.3), "other", model=tmp_path / "hybrid")
    assert "so target_density has no effect" in caplog.text
    assert summary["recipe"] == other["recipe"]


def test_a_run_with_a_layout_resumes(run, run_until, recipe_of, tmp_path, model_directory, tokenizer) -> None:
    base = attach(load_base(model_directory, dtype=torch.float32), spkv.SPKVConfig(window=8, layout=((1,), ())))
    spkv.save(base, tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    options = dict(model=tmp_path / "hybrid", save_every=5)
    run(recipe_of(), "through", **options)
    run_until(7, recipe_of(), "broken", **options)
    run(recipe_of(), "broken", resume=True, **options)
    through, broken = stored(tmp_path / "through"), stored(tmp_path / "broken")
    assert through.keys() == broken.keys()
    assert all(torch.equal(through[key], broken[key]) for key in through)


@pytest.fixture
def run_until(run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs as `run` does, and breaks off when the step `at` is done."""
    finish = AdaptationTrainer.finish_step

    def run_until(at: int, *args: Any, **options: Any) -> None:
        def stop(self: AdaptationTrainer, step: int) -> None:
            finish(self, step)
            if step == at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(AdaptationTrainer, "finish_step", stop)
            with pytest.raises(KeyboardInterrupt):
                run(*args, **options)

    return run_until


@pytest.mark.parametrize("name", ["fast", "fast-lora", "fast-frozen"])
@pytest.mark.parametrize(("at", "standardised"), [(7, True), (12, False)])
def test_a_resumed_run_is_exact(run, run_until, recipe_of, tmp_path, monkeypatch, name, at, standardised) -> None:
    # Three looks in nine soft steps, so that the checkpoint at step 5 lies between two of them.
    monkeypatch.setattr(DensityController, "UPDATES", 3)
    changes = dict(target_density=0.4, gate_noise=0.5, standardised_inputs=standardised)
    recipe = recipe_of(name, steps=15, soft_fraction=0.6, **changes)
    options = dict(save_every=5, batch_size=2)
    run(recipe, "through", **options)
    run_until(at, recipe, "broken", **options)
    with pytest.raises(FileExistsError, match="resume it"):
        run(recipe, "broken", **options)
    assert last_checkpoint(tmp_path / "broken").endswith(f"checkpoint-{at // 5 * 5}")
    run(recipe, "broken", resume=True, **options)

    expected, actual = stored(tmp_path / "through"), stored(tmp_path / "broken")
    assert expected.keys() == actual.keys()
    assert len(expected) == 8 if name == "fast-frozen" else len(expected) > 8
    for key in expected:
        assert torch.equal(expected[key], actual[key]), key
    assert entries(tmp_path / "broken") == entries(tmp_path / "through")


def test_a_resumed_run_keeps_its_batch_size(run, run_until, recipe_of, tmp_path) -> None:
    run(recipe_of(), "through", save_every=4)
    run_until(9, recipe_of(), "broken", save_every=4)
    summary = run(recipe_of(), "broken", resume=True, batch_size=None)
    assert summary["batch_size"] == 2  # the default of a CPU is 1
    expected, actual = stored(tmp_path / "through"), stored(tmp_path / "broken")
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_what_has_diverged_is_not_saved(run, recipe_of, tmp_path, monkeypatch) -> None:
    set_step = AdaptationTrainer.set_step

    def diverge(trainer: AdaptationTrainer, step: int) -> None:
        set_step(trainer, step)
        if step == 5:
            with torch.no_grad():
                trainer.model.model.norm.weight.fill_(math.nan)

    monkeypatch.setattr(AdaptationTrainer, "set_step", diverge)
    with pytest.raises(FloatingPointError, match="step 5"):
        run(recipe_of(), save_every=3, log_every=100)
    assert last_checkpoint(tmp_path / "out").endswith("checkpoint-3")


@pytest.mark.parametrize("name", ["fast", "fast-lora", "fast-frozen"])
def test_half_precision_as_on_a_gpu(run, run_until, recipe_of, tmp_path, text_file, monkeypatch, name) -> None:
    monkeypatch.setattr(sys.modules["spkv.training.adapt"], "_computes_in_bfloat16", lambda: True)
    options = dict(save_every=5, validation=[text_file], validation_tokens=300)
    summary = run(recipe_of(name), "through", **options)
    assert summary["validation_loss"] < 5.0
    run_until(7, recipe_of(name), "broken", **options)
    run(recipe_of(name), "broken", resume=True, **options)
    expected, actual = stored(tmp_path / "through"), stored(tmp_path / "broken")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_an_incomplete_checkpoint_is_passed_over(run, run_until, recipe_of, tmp_path) -> None:
    recipe = recipe_of()
    run(recipe, "through", save_every=4)
    run_until(9, recipe, "broken", save_every=4)
    (tmp_path / "broken" / "checkpoint-8" / "spkv_training.json").unlink()
    assert last_checkpoint(tmp_path / "broken").endswith("checkpoint-4")
    run(recipe, "broken", save_every=4, resume=True)
    expected, actual = stored(tmp_path / "through"), stored(tmp_path / "broken")
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_a_checkpoint_from_before_a_field_of_the_recipe_goes_on(run, run_until, recipe_of, tmp_path) -> None:
    run(recipe_of(), "through", save_every=4)
    run_until(9, recipe_of(), "broken", save_every=4)
    for path in (tmp_path / "broken").glob("checkpoint-*/spkv_training.json"):
        state = json.loads(path.read_text())
        del state["run"]["sinks"]
        path.write_text(json.dumps(state))
    run(recipe_of(), "broken", save_every=4, resume=True)
    expected, actual = stored(tmp_path / "through"), stored(tmp_path / "broken")
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_predictors_that_do_not_fit_are_refused(run, run_until, recipe_of, tmp_path) -> None:
    run_until(9, recipe_of(), "broken", save_every=4)
    file = tmp_path / "broken" / "checkpoint-8" / "trained_predictor.safetensors"
    weights = load_file(file)
    save_file({name.replace("up", "sideways"): weight for name, weight in weights.items()}, file)
    with pytest.raises(ValueError, match="holds other predictors"):
        run(recipe_of(), "broken", save_every=4, resume=True)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="an earlier version of spkv made it"):
        run(recipe_of(), "broken", save_every=4, resume=True)


def test_another_recipe_cannot_go_on(run, run_until, recipe_of) -> None:
    run_until(9, recipe_of(), save_every=4)
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        run(recipe_of(), resume=True, seed=1)
    with pytest.raises(ValueError, match=r"regulariser: 0.015 there, 0.1 now"):
        run(recipe_of(regulariser=0.1), resume=True)


def test_a_finished_run_is_not_run_again(run, recipe_of) -> None:
    summary = run(recipe_of(steps=2), resume=True)  # nothing to resume: from the start
    assert run(recipe_of(steps=2), resume=True) == summary
    with pytest.raises(FileExistsError, match="finished run"):
        run(recipe_of(steps=2))
    with pytest.raises(ValueError, match=r"made by another run \(seed: 0 there, 5 now, window: 8 there, 9 now\)"):
        run(recipe_of(steps=2, window=9), resume=True, seed=5)


def test_a_model_is_not_written_over(run, recipe_of, tmp_path, model_directory) -> None:
    before = stored(model_directory)
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"holds a model already \(config.json, model.safetensors\)"):
            run(recipe_of(steps=2), model_directory, resume=resume)
    mine = shutil.copytree(model_directory, tmp_path / "mine")
    (mine / "checkpoint-5").mkdir()  # of another trainer
    with pytest.raises(FileExistsError, match="holds a model already"):
        run(recipe_of(steps=2), mine, resume=True)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="is not that of a run of `spkv adapt`"):
        run(recipe_of(steps=2), "else", resume=True)
    assert stored(model_directory).keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in stored(model_directory).items())


def test_what_would_prune_nothing_is_refused(run, recipe_of, tmp_path) -> None:
    with pytest.raises(ValueError, match="nothing leaves a window of 64 tokens in rows of sequence_length 64"):
        run(recipe_of(window=64, sequence_length=64))
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "words"}\n' * 200)
    with pytest.raises(ValueError, match="no document of the data is longer than the window of"):
        run(recipe_of(steps=2), data=[short])


def test_a_high_learning_rate_of_a_larger_model_is_told(run, recipe_of, monkeypatch, caplog) -> None:
    monkeypatch.setattr(sys.modules["spkv.training.sizes"], "base_parameters", lambda model: 7 * 10**9)
    for name, rate, warned in (("fast", 5e-5, False), ("fast-lora", 3e-4, False), ("fast", 3e-4, True)):
        run(recipe_of(name, steps=1, learning_rate=rate), f"{name}-{rate}")
        assert ("this one has 7000 M, and may want less" in caplog.text) == warned


def test_tokens_that_are_rounded_up_are_told(run, recipe_of, caplog) -> None:
    recipe = recipe_of(steps=None, tokens=100)
    run(recipe)
    assert f"100 tokens were asked for, and 1 steps of {recipe.tokens_per_step:,} are trained" in caplog.text


def test_the_seed_decides(run, recipe_of, tmp_path) -> None:
    for output, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(recipe_of(steps=2), output, seed=seed)
    a, b, c = (stored(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_checkpoints_can_be_kept_and_loaded(run, recipe_of, tmp_path) -> None:
    run(recipe_of(steps=4), keep_checkpoints=True, save_every=2)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    last, result = stored(tmp_path / "out" / "checkpoint-4"), stored(tmp_path / "out")
    assert all(torch.equal(last[key], result[key]) for key in result)
    assert spkv.attachment(spkv.load(tmp_path / "out" / "checkpoint-2")).threshold == 0.5


@pytest.mark.parametrize("name", ["fast", "fast-lora"])
def test_what_others_load_has_plain_predictors(run, recipe_of, tmp_path, model_directory, name) -> None:
    run(recipe_of(name, steps=4, standardised_inputs=True), keep_checkpoints=True, save_every=2)
    for directory in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        found = load_file(directory / "predictor.safetensors")
        assert {key.split(".", 2)[2] for key in found} == {"up.weight", "up.bias", "down.weight", "down.bias"}
        model = spkv.load(directory) if name == "fast" else spkv.load(model_directory, adapter=directory)
        assert all(predictor.input_scale is None for predictor in spkv.attachment(model).predictors.values())
    trained = load_file(tmp_path / "out" / "checkpoint-4" / "trained_predictor.safetensors")
    scales = [value for key, value in trained.items() if key.endswith("input_scale")]
    assert len(scales) == 2
    assert not any(torch.equal(scale, torch.ones(32)) for scale in scales)


@pytest.mark.parametrize("name", ["fast", "fast-lora"])
def test_gradient_checkpointing_computes_again_what_it_did(run, recipe_of, tmp_path, monkeypatch, name) -> None:
    passes = []
    forward = UtilityPredictor.forward
    monkeypatch.setattr(UtilityPredictor, "forward", lambda self, x: passes.append(1) or forward(self, x))
    counts = []
    for output, recompute in (("a", False), ("b", True)):
        passes.clear()
        run(recipe_of(name, steps=8), output, gradient_checkpointing=recompute)
        counts.append(len(passes))
    assert counts[1] == 2 * counts[0]
    a, b = stored(tmp_path / "a"), stored(tmp_path / "b")
    for key in a:
        assert torch.allclose(a[key], b[key], rtol=1e-2 if name == "fast-lora" else 1e-4, atol=1e-6), key


def test_sizes_that_do_not_fit(run, recipe_of, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"batch_size may be 1, 2, 4"):
        run(recipe_of(), batch_size=3)
    with pytest.raises(ValueError, match=r"beyond the model's 256 positions"):
        run(recipe_of(sequence_length=512, tokens_per_step=512), batch_size=1)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match="fewer than one row"):
        run(recipe_of(), data=[tmp_path / "short.txt"])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        run(recipe_of(), data=[tmp_path / "nowhere.txt"])
    with pytest.raises(ValueError, match="no data files"):
        run(recipe_of(), data=[])
    assert not (tmp_path / "out").exists()


def test_accumulation(recipe_of) -> None:
    recipe = recipe_of(sequence_length=64, tokens_per_step=64 * 24)
    assert allowed_batch_sizes(recipe, 2) == [1, 2, 3, 4, 6, 12]
    assert [accumulation_steps(recipe, size, 2) for size in (1, 4, 12)] == [12, 3, 1]
    with pytest.raises(ValueError, match="1 rows of sequence_length must divide tokens_per_step"):
        accumulation_steps(recipe_of(tokens_per_step=100), 1, 1)


def test_processes_with_unlike_gpus_take_the_same_batch_size(model_directory, recipe_of, monkeypatch) -> None:
    sizes = sys.modules["spkv.training.sizes"]
    monkeypatch.setattr(sizes, "gather_object", lambda own: [4, *own, 2])
    monkeypatch.setattr(sizes, "_fitting_batch_size", lambda *_: 8)
    assert default_batch_size(load_base(model_directory), recipe_of(), 3, gradient_checkpointing=False) == 2


def test_a_budget_per_parameter_counts_the_base_model_alone(model_directory, recipe_of) -> None:
    expected = load_base(model_directory).num_parameters()
    for name in ("fast", "fast-lora"):
        recipe = recipe_of(name)
        model = prepare_parameters(attach(load_base(model_directory), recipe.config()), recipe)
        assert base_parameters(model) == expected


def test_compiling_wraps_the_training_and_nothing_else(run, recipe_of, monkeypatch) -> None:
    inside = []

    @contextlib.contextmanager
    def parts(model: Any, training: bool) -> Iterator[None]:
        assert training
        inside.append(type(model).__name__)
        yield
        inside.append("left")

    monkeypatch.setattr(compiled, "compiled_parts", parts)
    run(recipe_of("fast", steps=2), compile=True)
    run(recipe_of("fast-lora", steps=2), "lora", compile=True)
    assert inside == ["LlamaForCausalLM", "left"] * 2
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="compile is not supported with FSDP"):
        run(recipe_of("fast", steps=2), "sharded", compile=True)
