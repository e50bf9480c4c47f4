"""Saving and loading: whole models, adapters with and without LoRA, and what is refused."""

import json
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import spkv
from spkv.checkpoint import fingerprint, load_base, load_predictors, save_adapter

IDS = torch.arange(3, 63)[None]


@pytest.fixture
def base(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def attached(base, tiny_llama, scatter_utilities):
    spkv.attach(tiny_llama, spkv.SPKVConfig(window=8, threshold=0.4))
    scatter_utilities(tiny_llama)
    return tiny_llama


def with_lora(model):
    peft = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return peft.eval()


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def test_a_whole_model_round_trips_and_transformers_reads_it(attached, tmp_path):
    spkv.save(attached, tmp_path / "whole", training={"density": 0.3})
    loaded = spkv.load(tmp_path / "whole")
    assert torch.equal(logits(loaded), logits(attached))
    assert spkv.attachment(loaded).config == spkv.attachment(attached).config
    assert json.loads((tmp_path / "whole/spkv_config.json").read_text())["training"] == {"density": 0.3}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    with spkv.dense(attached):
        assert torch.equal(logits(plain), logits(attached))
    suffixes = {file.suffix for file in (tmp_path / "whole").iterdir()}
    assert suffixes == {".json", ".safetensors"}


@pytest.mark.parametrize("depth", [1, 3])
def test_predictors_of_other_depths_round_trip(tiny_llama, tmp_path, depth):
    config = spkv.SPKVConfig(window=8, threshold=0.6, initial_bias=0.4, predictor_depth=depth)
    spkv.save(spkv.attach(tiny_llama, config), tmp_path / "whole")
    loaded = spkv.load(tmp_path / "whole")
    assert spkv.attachment(loaded).config == config
    assert torch.equal(logits(loaded), logits(tiny_llama))


def test_an_adapter_round_trips(attached, base, tmp_path):
    save_adapter(attached, tmp_path / "adapter")
    loaded = spkv.load(base, adapter=tmp_path / "adapter", threshold=0.6)
    assert spkv.attachment(loaded).threshold == 0.6
    spkv.attachment(loaded).threshold = 0.4
    assert torch.equal(logits(loaded), logits(attached))
    assert sum(f.stat().st_size for f in (tmp_path / "adapter").iterdir()) < 50_000


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_an_adapter_with_lora_round_trips(attached, base, tmp_path, dtype):
    model = with_lora(attached)
    save_adapter(model, tmp_path / "adapter", dtype=dtype)
    loaded = spkv.load(base, adapter=tmp_path / "adapter")
    tolerance = 1e-5 if dtype is None else 0.05
    torch.testing.assert_close(logits(loaded), logits(model), rtol=tolerance, atol=tolerance)
    if dtype is not None:
        stored = load_file(tmp_path / "adapter/predictor.safetensors")
        stored |= load_file(tmp_path / "adapter/adapter_model.safetensors")
        assert {t.dtype for t in stored.values()} == {dtype}


def test_other_types_and_devices_can_be_asked_for(attached, base, tmp_path):
    save_adapter(attached, tmp_path / "adapter")
    loaded = spkv.load(base, adapter=tmp_path / "adapter", dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    named = spkv.load(base, adapter=tmp_path / "adapter", dtype="float16")
    assert {p.dtype for p in named.parameters()} == {torch.float16}
    for wrong in ("bf16", ""):
        with pytest.raises(
            ValueError, match=f"must be a torch.dtype or one of auto, float32, bfloat16, float16, not '{wrong}'"
        ):
            spkv.load(base, adapter=tmp_path / "adapter", dtype=wrong)


def test_the_fingerprint_ignores_what_adaptation_adds(attached, base):
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert fingerprint(with_lora(attached)) == fingerprint(plain)
    rounded = fingerprint(plain.to(torch.bfloat16))["mean_magnitudes"]
    for name, value in fingerprint(plain.float())["mean_magnitudes"].items():
        assert rounded[name] == pytest.approx(value, rel=1e-3)


def test_an_adapter_for_another_model_is_refused(attached, base, tmp_path):
    save_adapter(attached, tmp_path / "adapter")
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is for another model of the same sizes: the mean magnitude of embed_tokens"):
        spkv.load(tmp_path / "other", adapter=tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="it needs num_hidden_layers=2, this one has num_hidden_layers=1"):
        spkv.load(base, adapter=tmp_path / "adapter")


@pytest.mark.parametrize("lora", [False, True])
def test_an_adapter_is_no_model(attached, base, tmp_path, lora):
    save_adapter(with_lora(attached) if lora else attached, tmp_path / "adapter")
    message = r"adapter' is an adapter; give the model that it was made for, and this as adapter= \(--adapter\)"
    for refused in (spkv.load, load_base, partial(spkv.load, adapter=tmp_path / "adapter")):
        with pytest.raises(ValueError, match=message):
            refused(tmp_path / "adapter")
    assert spkv.load(base, adapter=tmp_path / "adapter") is not None


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
def test_an_attached_model_that_transformers_saved_is_told_apart(attached, tmp_path, shards):
    attached.save_pretrained(tmp_path / "saved", **shards)
    with pytest.raises(FileNotFoundError, match=r"was saved with save_pretrained; use spkv.save\(model, directory\)"):
        spkv.load(tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.safetensors"):
        file.write_bytes(b"not safetensors")
    with pytest.raises(FileNotFoundError, match="it is not a self-pruned model"):
        spkv.load(tmp_path / "saved")


def test_missing_and_broken_files_are_named(attached, base, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"holds no spkv_config.json: it is not a self-pruned model. Pass adapter=DIR \(--adapter DIR\)",
    ):
        spkv.load(base)
    with pytest.raises(FileNotFoundError, match="is no adapter: it holds no spkv_config.json"):
        spkv.load(base, adapter=tmp_path / "nowhere")
    spkv.save(attached, tmp_path / "whole")
    with pytest.raises(ValueError, match="holds a whole model, not an adapter: load it by itself"):
        spkv.load(base, adapter=tmp_path / "whole")
    file = tmp_path / "whole/predictor.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if "layers.1" not in k}, file)
    with pytest.raises(ValueError, match=r"it holds layers \[0\] with .*, the model needs layers \[0, 1\]"):
        spkv.load(tmp_path / "whole")
    file.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        load_predictors(attached, tmp_path / "whole")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no predictor.safetensors"):
        spkv.load(tmp_path / "whole")
    stored = json.loads((tmp_path / "whole/spkv_config.json").read_text())
    (tmp_path / "whole/spkv_config.json").write_text(json.dumps(stored | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99; this version reads format 1"):
        spkv.load(tmp_path / "whole")


def test_lora_is_not_saved_as_a_whole_model(attached, tmp_path):
    with pytest.raises(ValueError, match="carries LoRA weights: use spkv.checkpoint.save_adapter"):
        spkv.save(with_lora(attached), tmp_path)


def test_the_threshold_in_force_is_the_one_saved(attached, tmp_path):
    spkv.attachment(attached).threshold = 0.7
    spkv.save(attached, tmp_path / "whole")
    assert spkv.attachment(spkv.load(tmp_path / "whole")).threshold == 0.7


def test_what_is_known_of_the_training_stays_with_the_model(attached, base, tmp_path):
    def stored(path):
        return json.loads((path / "spkv_config.json").read_text())["training"]

    save_adapter(attached, tmp_path / "adapter", training={"steps": 7, "density": 0.3, "densities": {"0": [0.3]}})
    loaded = spkv.load(base, adapter=tmp_path / "adapter")
    spkv.save(loaded, tmp_path / "whole")
    assert stored(tmp_path / "whole") == stored(tmp_path / "adapter")
    again = spkv.load(tmp_path / "whole", threshold=0.7)
    spkv.save(again, tmp_path / "moved")
    assert stored(tmp_path / "moved") == {"steps": 7}  # the densities were those of another threshold
    spkv.save(again, tmp_path / "told", training={"density": 0.1})
    assert stored(tmp_path / "told") == {"density": 0.1}
