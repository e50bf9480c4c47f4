"""Training with compiled parts: which they are, and that gradients are as good as those of the eager model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import spkv
from spkv.gates import SoftGate
from spkv.hf import compiled


@pytest.fixture
def calls(monkeypatch):
    """Names of the functions that were called compiled; nothing is compiled."""
    names = []

    def compile(function, reproducible):
        assert reproducible
        return lambda *args, **kwargs: names.append(function.__qualname__) or function(*args, **kwargs)

    monkeypatch.setattr(compiled, "_compile", compile)
    return names


@pytest.fixture
def attached(tiny_llama):
    return spkv.attach(tiny_llama, spkv.SPKVConfig(window=9)).train()


def loss_of(model, ids):
    return model(ids, labels=ids, use_cache=False).loss


def test_mlps_and_the_loss_are_compiled_too(attached, calls):
    ids = torch.randint(1, 97, (2, 30))
    expected, loss = loss_of(attached, ids), attached.loss_function
    with compiled.compiled_parts(attached, training=True):
        assert torch.equal(loss_of(attached, ids), expected)
    compiled_ones = {"LlamaRMSNorm.forward", "UtilityPredictor.forward", "apply_rotary_pos_emb", "LlamaMLP.forward"}
    assert set(calls) == {*compiled_ones, "ForCausalLMLoss"}
    assert attached.loss_function is loss
    assert not any("forward" in vars(module) for module in attached.modules())


def test_mlps_with_lora_are_left_alone(attached, calls):
    model = get_peft_model(attached, LoraConfig(r=2, target_modules=["up_proj"]))
    with compiled.compiled_parts(model.get_base_model(), training=True):
        loss_of(model, torch.randint(1, 97, (2, 30)))
    assert "ForCausalLMLoss" in calls
    assert "LlamaMLP.forward" not in calls


@pytest.mark.gpu
def test_gradients_are_as_good_as_those_of_the_eager_model(scatter_utilities):
    """Of bfloat16 autocast beside float32."""
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=512, num_hidden_layers=3, **sizes))
    spkv.attach(model, spkv.SPKVConfig(window=16))
    scatter_utilities(model)
    model.train().cuda()
    spkv.attachment(model).gate = SoftGate()
    ids = torch.randint(0, 512, (2, 256), device="cuda")

    def gradient(dtype):
        model.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss_of(model, ids).backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    exact, eager = gradient(torch.float32), gradient(torch.bfloat16)
    with compiled.compiled_parts(model, training=True):
        actual, again = gradient(torch.bfloat16), gradient(torch.bfloat16)
    assert torch.equal(actual, again)
    assert (actual - exact).norm() <= 2 * (eager - exact).norm()
