"""The invariant, for every model family, on tiny random models: one text, several ways to compute it."""

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import spkv
import spkv.gates
from spkv.gates import OpenGate
from spkv.hf import forward
from spkv.hf.families import FAMILIES
from spkv.ops.attention import gated_attention

VOCABULARY = 97
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MIXED = dict(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=12)
EXPERTS = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, num_local_experts=4)

CONFIGS = {
    "cohere2": ("Cohere2Config", MIXED),
    "gemma2": ("Gemma2Config", MIXED | dict(head_dim=8, attn_logit_softcapping=3.0)),
    "gemma3_text": ("Gemma3TextConfig", MIXED | dict(head_dim=16)),
    "glm4": ("Glm4Config", dict(head_dim=8)),
    "gpt_oss": ("GptOssConfig", MIXED | EXPERTS | dict(head_dim=8)),
    "granite": ("GraniteConfig", dict(attention_multiplier=0.3)),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", dict(sliding_window=None)),
    "mixtral": ("MixtralConfig", EXPERTS | dict(sliding_window=None)),
    "olmo2": ("Olmo2Config", {}),
    "phi3": ("Phi3Config", dict(sliding_window=None)),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", dict(head_dim=16)),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS | dict(head_dim=8)),
    "smollm3": ("SmolLM3Config", dict(use_sliding_window=False)),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", dict(sliding_window=None)),
}


def family_model(model_type):
    name, options = CONFIGS[model_type]
    config = getattr(transformers, name)(**(COMMON | options))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request):
    return family_model(request.param)


def test_every_family_is_tested():
    assert set(CONFIGS) == set(FAMILIES)


@torch.no_grad()
def cached_logits(model, ids, cuts):
    cache, parts = None, []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, dim=1), cache


@settings(max_examples=6)
@given(data=st.data())
def test_decode_chunks_and_the_masked_forward_agree(model, scatter_utilities, relative_error, data):
    window = data.draw(st.one_of(st.integers(1, 24), st.just(200)))
    threshold = data.draw(st.floats(0.1, 0.9))
    sinks = data.draw(st.integers(0, 5))
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 60))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
    tail = data.draw(st.integers(0, min(8, length - 1)))
    ids = torch.randint(3, VOCABULARY, (batch, length))
    spkv.attach(model, spkv.SPKVConfig(window=window, threshold=threshold, sinks=sinks))
    try:
        scatter_utilities(model)
        attachment = spkv.attachment(model)
        attachment.oracle = True
        with attachment.record() as record, torch.no_grad():
            expected = model(ids, use_cache=False).logits
        attachment.oracle = False
        assert all((u[..., :sinks] == 1).all() for u in record.utilities.values())
        # A utility within rounding of the threshold may fall on either side of it.
        assume(all((u - threshold).abs().min() > 1e-5 for u in record.utilities.values()))
        with torch.no_grad():
            assert relative_error(model(ids, use_cache=False).logits, expected) < 1e-5
        chunked, cache = cached_logits(model, ids, cuts)
        assert relative_error(chunked, expected) < 1e-5
        decoded, decoded_cache = cached_logits(model, ids, range(length - tail, length))
        assert relative_error(decoded, expected) < 1e-5

        # What is kept is what the utilities say, whichever way it was computed.
        kept = [(u >= threshold)[..., : max(0, length - window)].sum(-1) for u in record.utilities.values()]
        for held in (cache, decoded_cache):
            assert torch.equal(held.packed.kept_pairs(), torch.stack(kept))

        # Left padding changes nothing for the tokens behind it.
        padding = data.draw(st.integers(1, 5))
        padded = torch.cat([torch.zeros(batch, padding, dtype=torch.long), ids], dim=1)
        mask = torch.cat([torch.zeros(batch, padding), torch.ones(batch, length)], dim=1).long()
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            out = model(padded, attention_mask=mask, position_ids=positions, use_cache=True)
        assert relative_error(out.logits[:, padding:], expected) < 1e-5
        assert torch.equal(out.past_key_values.packed.kept_pairs(), torch.stack(kept))
    finally:
        spkv.detach(model)


@pytest.mark.parametrize("model_type", ["cohere2", "gemma2", "gemma3_text"])
def test_local_layers_compute_the_same_by_our_operator(model_type, relative_error, monkeypatch):
    model = family_model(model_type)
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs.get("sliding", False))
        return gated_attention(*args, **kwargs)

    monkeypatch.setattr(forward, "gated_attention", counted)
    ids = torch.randint(3, VOCABULARY, (2, 60))
    segment_ids = torch.tensor([[0] * 33 + [1] * 27, [4] * 5 + [5] * 55])
    with torch.no_grad():
        dense = model(ids[:1, :33], use_cache=False).logits
    spkv.attach(model, spkv.SPKVConfig(window=4))
    results = []
    for ours in (False, True):
        monkeypatch.setattr(forward, "_runs_kernels", lambda query, ours=ours: ours)
        calls.clear()
        with spkv.attachment(model).using(OpenGate()):
            out = model(ids, labels=ids, segment_ids=segment_ids, use_cache=False)
        model.zero_grad()
        out.loss.backward()
        # Soft-capped scores (Gemma 2) are left to the original.
        assert calls == ([True, False] * 2 if ours and model_type != "gemma2" else [False] * 2)
        results.append([out.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < 1e-5
    if model_type != "gemma2":  # whose SDPA leaves the cap out, in global layers, too
        assert relative_error(results[1][0][:1, :33], dense) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_local_layers_train_by_our_kernel_on_a_gpu(relative_error, monkeypatch):
    shape = dict(hidden_size=640, head_dim=256, num_attention_heads=4, num_key_value_heads=1, sliding_window=512)
    config = transformers.Gemma3TextConfig(**(COMMON | MIXED | shape | dict(max_position_embeddings=4096)))
    torch.manual_seed(0)
    model = spkv.attach(AutoModelForCausalLM.from_config(config, dtype=torch.float32).cuda().train())
    ids = torch.randint(3, VOCABULARY, (2, 2048), device="cuda")
    segment_ids = torch.stack([torch.arange(2048) // 1500, torch.arange(2048) // 400]).cuda()
    results = {}
    for name, ours, half in (("exact", False, False), ("masked", False, True), ("ours", True, True)):
        monkeypatch.setattr(forward, "_runs_kernels", lambda query, ours=ours: ours)
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            loss = model(ids, labels=ids, segment_ids=segment_ids, use_cache=False).loss
        loss.backward()
        results[name] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for exact, masked, ours in zip(*(results[name] for name in ("exact", "masked", "ours")), strict=True):
        assert relative_error(ours, exact) <= 2 * relative_error(masked, exact) + 1e-6


def test_open_gates_equal_the_original_and_detaching_restores_it(model, relative_error):
    ids = torch.randint(3, VOCABULARY, (2, 40))
    with torch.no_grad():
        original = model(ids, use_cache=False).logits
        state = {k: v.clone() for k, v in model.state_dict().items()}
        spkv.attach(model, spkv.SPKVConfig(window=4))
        try:
            assert relative_error(model(ids).logits, original) < 1e-5  # bias +5: all gates open
            with spkv.attachment(model).using(OpenGate()):
                assert relative_error(cached_logits(model, ids, [7, 8, 30])[0], original) < 1e-5
            with spkv.dense(model):
                assert torch.equal(model(ids, use_cache=False).logits, original)
            assert relative_error(model(ids).logits, original) < 1e-5
        finally:
            spkv.detach(model)
        assert torch.equal(model(ids, use_cache=False).logits, original)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_what_a_prefix_keeps_does_not_depend_on_what_follows(model, scatter_utilities):
    ids, other = torch.randint(3, VOCABULARY, (1, 50)), torch.randint(3, VOCABULARY, (1, 50))
    other[:, :30] = ids[:, :30]
    spkv.attach(model, spkv.SPKVConfig(window=4))
    try:
        scatter_utilities(model)
        kept = []
        for text in (ids[:, :30], ids, other):
            with spkv.attachment(model).record() as record, torch.no_grad():
                model(text, use_cache=False)
            kept.append([(u >= 0.5)[..., :30] for u in record.utilities.values()])
    finally:
        spkv.detach(model)
    for prefix, longer, changed in zip(*kept, strict=True):
        assert torch.equal(prefix, longer)
        assert torch.equal(prefix, changed)


def test_generate_uses_the_self_pruned_cache(model, scatter_utilities):
    ids = torch.randint(3, VOCABULARY, (2, 30))
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    spkv.attach(model, spkv.SPKVConfig(window=4))
    try:
        scatter_utilities(model)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert isinstance(out.past_key_values, spkv.SPKVCache)
        assert 0 < out.past_key_values.density() < 1
        # Greedy by the masked forward, token by token.
        expected = ids
        with torch.no_grad():
            for _ in range(8):
                logits = model(expected, use_cache=False).logits[:, -1]
                logits[:, 2] = float("-inf")  # min_new_tokens forbids the end
                expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(out.sequences, expected)
    finally:
        spkv.detach(model)


def test_gradients_reach_predictors_of_global_layers_only(model):
    ids = torch.randint(3, VOCABULARY, (1, 20))
    spkv.attach(model, spkv.SPKVConfig(window=2, initial_bias=0.0))
    try:
        attachment = spkv.attachment(model)
        attachment.gate = spkv.gates.SoftGate()
        model.train()
        model(ids, labels=ids).loss.backward()
        names = {n for n, p in model.named_parameters() if "utility_predictor" in n}
        assert names
        assert all(model.get_parameter(n).grad.abs().sum() > 0 for n in names if n.endswith("down.bias"))
        assert {int(n.split("layers.")[1].split(".")[0]) for n in names} == set(attachment.decoder.global_layers)
    finally:
        model.eval().zero_grad(set_to_none=True)
        spkv.detach(model)
