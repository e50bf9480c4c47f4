"""Adapters merged while a base model's weights pass by; without vLLM."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import spkv
from spkv.checkpoint import save_adapter
from spkv.serving.adapter import Adapter


def save_lora(model, directory):
    """Attach a model, train nothing, and save LoRA weights that are drawn at random."""
    spkv.attach(model, spkv.SPKVConfig(window=8))
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(lora, directory)


def weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items() if "predictor" not in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_passes_by_is_what_peft_merges(tiny_llama, tmp_path, dtype):
    base = tiny_llama.to(dtype)
    save_lora(copy.deepcopy(base), tmp_path)
    before = weights(base)
    merged = dict(Adapter(tmp_path).merge(before.items()))
    expected = weights(spkv.checkpoint.load_adapter(base, tmp_path))
    changed = {name for name in before if not torch.equal(before[name], expected[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj"}
    assert merged.keys() == expected.keys()
    for name, weight in expected.items():
        assert merged[name].dtype == (torch.float32 if name in changed else dtype)
        torch.testing.assert_close(merged[name].to(dtype), weight)


def test_predictors_alone_change_no_weights(tiny_llama, tmp_path):
    save_adapter(spkv.attach(tiny_llama, spkv.SPKVConfig(window=8)), tmp_path)
    before = weights(tiny_llama)
    merged = dict(Adapter(tmp_path).merge(before.items()))
    assert all(merged[name] is weight for name, weight in before.items())
    assert merged.keys() == before.keys()


def test_another_base_is_refused(tiny_llama, tmp_path):
    save_lora(copy.deepcopy(tiny_llama), tmp_path)
    before = weights(tiny_llama)
    other = {name: 2 * weight for name, weight in before.items()}
    with pytest.raises(ValueError, match="for another model of the same sizes: the mean magnitude of embed_tokens"):
        dict(Adapter(tmp_path).merge(other.items()))
    missing = {name: weight for name, weight in before.items() if "embed_tokens" not in name}
    with pytest.raises(ValueError, match="the mean magnitude of embed_tokens.weight is None"):
        dict(Adapter(tmp_path).merge(missing.items()))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.1", "layers.9"): w for name, w in stored.items()}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="no weights for the adapter's base_model.model.model.layers.9.mlp.down_proj"):
        dict(Adapter(tmp_path).merge(before.items()))


def test_more_than_plain_lora_is_refused(tiny_llama, tmp_path):
    save_lora(tiny_llama, tmp_path)
    file = tmp_path / "adapter_config.json"
    plain = json.loads(file.read_text())
    for change in ({"use_dora": True}, {"bias": "all"}, {"init_lora_weights": "pissa"}, {"peft_type": "LOHA"}):
        file.write_text(json.dumps(plain | change))
        with pytest.raises(ValueError, match=rf"more than plain LoRA \({next(iter(change))}\); make a whole model"):
            Adapter(tmp_path)
    file.write_text(json.dumps(plain))
    weights = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(weights), "embed.lora_embedding_A": torch.ones(1)}, weights)
    with pytest.raises(ValueError, match=r"more than plain LoRA \(embed.lora_embedding_A\)"):
        Adapter(tmp_path)
