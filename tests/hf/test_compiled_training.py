"""Training with compiled parts: which they are, and that gradients are as good as those of the eager model."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

import spkv
from spkv.gates import NoisyGate, SoftGate
from spkv.hf import compiled
from spkv.training.parameters import enable_recomputation


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


@pytest.mark.parametrize("own_loss", [False, True])
def test_mlps_and_the_loss_are_compiled_too(attached, calls, own_loss):
    ids = torch.randint(1, 97, (2, 30))
    if own_loss:
        attached.loss_function = attached.loss_function
    expected, before = loss_of(attached, ids), vars(attached).copy()
    with compiled.compiled_parts(attached, training=True):
        assert torch.equal(loss_of(attached, ids), expected)
    compiled_ones = {"LlamaRMSNorm.forward", "UtilityPredictor.forward", "apply_rotary_pos_emb", "LlamaMLP.forward"}
    assert set(calls) == {*compiled_ones, "ForCausalLMLoss"}
    assert vars(attached) == before
    assert not any("forward" in vars(module) for module in attached.modules())


def test_mlps_with_lora_are_left_alone(attached, calls):
    model = get_peft_model(attached, LoraConfig(r=2, target_modules=["up_proj"]))
    with compiled.compiled_parts(model.get_base_model(), training=True):
        loss_of(model, torch.randint(1, 97, (2, 30)))
    assert "ForCausalLMLoss" in calls
    assert "LlamaMLP.forward" not in calls


@pytest.mark.parametrize(
    ("config", "lora", "checkpointing"),
    [(LlamaConfig, False, False), (LlamaConfig, False, True), (Gemma3TextConfig, True, False)],
)
def test_graphs_compute_what_the_model_does(monkeypatch, config, lora, checkpointing):
    """Without Inductor, which takes long: what dynamo and autograd make of the parts."""
    compile = functools.cache(lambda function, reproducible: torch.compile(function, backend="aot_eager"))
    monkeypatch.setattr(compiled, "_compile", compile)
    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    layers = dict(layer_types=["sliding_attention", "full_attention"]) if config is Gemma3TextConfig else {}
    model = AutoModelForCausalLM.from_config(config(vocab_size=97, num_hidden_layers=2, **sizes, **layers))
    spkv.attach(model, spkv.SPKVConfig(window=9))
    spkv.attachment(model).gate = NoisyGate(1.0)
    model.train()
    if checkpointing:
        enable_recomputation(model)
    trained = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")) if lora else model
    ids = torch.randint(1, 97, (2, 30))

    def gradient():
        trained.zero_grad()
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(trained, ids).backward()
        return torch.cat([p.grad.flatten() for p in trained.parameters() if p.grad is not None])

    expected = gradient()
    torch._dynamo.reset()
    with compiled.compiled_parts(model, training=True):
        torch.testing.assert_close(gradient(), expected)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch.testing.assert_close(gradient(), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


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
