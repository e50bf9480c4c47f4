"""Static layouts: chosen as told, equal to the masked oracle, loadable elsewhere, and as small as they claim."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import spkv
from spkv.inspect import Document, Inspection, TextDensities, hybrid_layout, inspect_texts, make_hybrid
from spkv.inspect.hybrid import heads_in_budget, write_hybrid

WINDOW, T = 8, 60


def measured(utility, window=WINDOW):
    """An inspection whose heads [L, Hkv] have constant utilities."""
    utilities = torch.tensor(utility)[..., None].expand(-1, -1, 100)
    keep = utilities >= 0.5
    layers = tuple(range(len(utility)))
    return Inspection("m", 0.5, [Document("d", ["x"] * 100, TextDensities(layers, utilities, keep, window))])


FOUR = [[0.1, 0.9], [0.2, 0.3], [0.6, 0.5], [0.0, 0.8]]


@pytest.mark.parametrize(
    ("strategy", "count", "layout", "covered"),
    [
        ("densest-heads", 3, ((1,), (), (0,), (1,)), (0.9 + 0.6 + 0.8) / 3.4),
        ("densest-layers", 2, ((), (), (0, 1), ()), 1.1 / 3.4),
        ("densest-layers", 4, ((0, 1), (), (0, 1), ()), 2.1 / 3.4),
        ("interleave", 2, ((), (), (), (0, 1)), 0.8 / 3.4),
        ("interleave", 4, ((), (0, 1), (), (0, 1)), 1.3 / 3.4),
        ("interleave", 0, ((), (), (), ()), 0),
        ("random", 8, ((0, 1),) * 4, 1),
    ],
)
def test_strategies(strategy, count, layout, covered):
    chosen = hybrid_layout(measured(FOUR), count, strategy)
    assert chosen.for_model(4) == layout
    assert chosen.utility_covered == pytest.approx(covered)
    assert chosen.global_heads == count
    json.dumps(chosen.to_dict(), allow_nan=False)


def test_random_layouts_follow_the_seed():
    inspection = measured(FOUR)
    layouts = [hybrid_layout(inspection, 4, "random", seed=seed).for_model(4) for seed in (0, 0, 1)]
    assert layouts[0] == layouts[1] != layouts[2]


def test_kept_pairs_covered():
    assert hybrid_layout(measured(FOUR), 1, "densest-heads").kept_covered == pytest.approx(1 / 4)
    assert hybrid_layout(measured([[0.1, 0.2]]), 1, "densest-heads").kept_covered is None


def test_budgets_become_heads():
    inspection = measured(FOUR)
    for count in range(9):
        budget = (count * 1000 + (8 - count) * WINDOW) / 8000
        assert heads_in_budget(inspection, budget, 1000, "densest-heads", sinks=0) == count
        assert heads_in_budget(inspection, budget, 1000, "interleave", sinks=0) == count // 2 * 2
        chosen = hybrid_layout(inspection, count, "densest-heads", sinks=0)
        assert chosen.kept_fraction(1000) == pytest.approx(budget)
    with pytest.raises(ValueError, match="the windows alone hold 0.008 of 1,000 tokens; kv_budget 0.001 is below that"):
        heads_in_budget(inspection, 0.001, 1000, "random", sinks=0)
    with pytest.raises(ValueError, match="kv_budget must be above 0 and at most 1, not 1.5"):
        heads_in_budget(inspection, 1.5, 1000, "random")
    with pytest.raises(ValueError, match="length must be at least 1, not 0"):
        heads_in_budget(inspection, 0.5, 0, "random")
    budget = (2 * 1000 + 6 * (WINDOW + 4)) / 8000
    assert heads_in_budget(inspection, budget, 1000, "random", sinks=4) == 2
    assert hybrid_layout(inspection, 2, "random", sinks=4).kept_fraction(1000) == pytest.approx(budget)
    with pytest.raises(ValueError, match="the windows and sinks alone hold 0.012 of 1,000 tokens"):
        heads_in_budget(inspection, 0.01, 1000, "random", sinks=4)


def test_bad_choices_are_named():
    with pytest.raises(
        ValueError, match="unknown strategy 'best'; known are densest-heads, densest-layers, interleave"
    ):
        hybrid_layout(measured(FOUR), 1, "best")
    with pytest.raises(ValueError, match="interleave takes whole layers: global_heads must be a multiple of 2, not 3"):
        hybrid_layout(measured(FOUR), 3, "interleave")
    with pytest.raises(ValueError, match="global_heads must be 0 to 8, not 9"):
        hybrid_layout(measured(FOUR), 9, "random")
    with pytest.raises(ValueError, match="no token has left the window of 100"):
        hybrid_layout(measured(FOUR, window=100), 1, "random")


@pytest.fixture(params=[0, 3])
def hybrid(request, known_gates, tokenizer):
    """Layer 1's head 0 keeps everything, and so does the head of layer 0 that keeps what is no digit."""
    inspection = inspect_texts(known_gates, tokenizer, [("a", "Room 12 has 345 chairs, and many words.")], strongest=0)
    layout = hybrid_layout(inspection, 2, "densest-heads", sinks=request.param)
    assert layout.for_model(2) == ((1,), (0,))
    return make_hybrid(known_gates, layout), layout, inspection


def masked_logits(model, ids):
    """The definition: one dense forward pass with a mask."""
    found = spkv.attachment(model)
    found.oracle = True
    try:
        return model(ids, use_cache=False).logits
    finally:
        found.oracle = False


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, T])
def test_a_hybrid_equals_the_masked_oracle(hybrid, chunk):
    model, ids, cache, parts = hybrid[0], torch.randint(1, 257, (2, T)), None, []
    for start in range(0, T, chunk):
        output = model(ids[:, start : start + chunk], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), masked_logits(model, ids), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_oracle_of_a_hybrid_sees_less_than_dense_attention(hybrid):
    ids = torch.randint(1, 257, (1, T))
    with spkv.dense(hybrid[0]):
        expected = hybrid[0](ids).logits
    masked = masked_logits(hybrid[0], ids)
    torch.testing.assert_close(masked[:, :WINDOW], expected[:, :WINDOW], rtol=1e-4, atol=1e-5)
    assert (masked - expected)[:, WINDOW:].abs().max() > 1e-3


@torch.no_grad()
def test_a_hybrid_holds_the_memory_it_claims(hybrid, tmp_path):
    model, layout, inspection = hybrid
    cache = model(torch.randint(1, 257, (1, T)), use_cache=True).past_key_values
    assert cache.packed.kept_pairs()[:, 0].tolist() == [[layout.sinks, T - WINDOW], [T - WINDOW, layout.sinks]]
    assert cache.kept_fraction() == pytest.approx(layout.kept_fraction(T))
    report = write_hybrid(model, layout, inspection, tmp_path, length=T)
    assert report["kv_bytes"] == cache.packed.pages_in_use() * cache.packed.pool.page_bytes
    assert report["dense_kv_bytes"] == cache.dense_nbytes


@torch.no_grad()
def test_a_hybrid_loads_in_a_fresh_process(hybrid, tmp_path):
    model, layout, inspection = hybrid
    report = write_hybrid(model, layout, inspection, tmp_path, length=1000)
    assert json.loads((tmp_path / "hybrid.json").read_text()) == report
    assert not (tmp_path / "predictor.safetensors").exists()
    ids = torch.arange(1, T + 1)[None]
    torch.save({"ids": ids, "logits": masked_logits(model, ids)}, tmp_path / "expected.pt")
    code = (
        "import sys, torch, spkv; expected = torch.load(sys.argv[1] + '/expected.pt'); model = spkv.load(sys.argv[1]);"
        "torch.testing.assert_close(model(expected['ids']).logits, expected['logits'], rtol=1e-4, atol=1e-5);"
        "print(spkv.attachment(model).config.layout,"
        " model.generate(expected['ids'], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "((1,), (0,)) torch.Size([1, 64])\n", done.stderr


def test_a_hybrid_can_be_inspected(hybrid, tokenizer):
    inspection = inspect_texts(hybrid[0], tokenizer, [("a", "Some words and 3 numbers, 4 and 5.")])
    sinks = hybrid[1].sinks / inspection.left
    torch.testing.assert_close(inspection.density_by_head(), torch.tensor([[sinks, 1], [1, sinks]], dtype=torch.double))
    for row in inspection.memory:
        assert row["kept_fraction"] == pytest.approx(hybrid[1].kept_fraction(row["tokens"]))
    assert inspection.threshold is None
    assert inspection.documents[0].later is not None


def test_a_hybrid_has_no_threshold_and_no_second_layout(hybrid):
    with pytest.raises(ValueError, match="this model has a static layout and no utilities"):
        spkv.attachment(hybrid[0]).threshold = 0.7
    with pytest.raises(ValueError, match="the model has a static layout already"):
        make_hybrid(hybrid[0], hybrid[1])


@torch.no_grad()
def test_layers_that_are_local_by_design_stay_so():
    config = Gemma3TextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = spkv.attach(Gemma3ForCausalLM(config).eval(), spkv.SPKVConfig(window=WINDOW, layout=((), (0,), ())))
    ids = torch.randint(1, 97, (1, T))
    torch.testing.assert_close(model(ids).logits, masked_logits(model, ids), rtol=1e-4, atol=1e-5)
    spkv.detach(model)
    with pytest.raises(ValueError, match=r"KV heads \[1\] of layer 0, which has a sliding window by design"):
        spkv.attach(model, spkv.SPKVConfig(layout=((1,), (), ())))
    with pytest.raises(ValueError, match=r"KV heads \[2\] of layer 1, which has 2"):
        spkv.attach(model, spkv.SPKVConfig(layout=((), (2,), ())))
    with pytest.raises(ValueError, match="the layout has 1 layers, and the model 3"):
        spkv.attach(model, spkv.SPKVConfig(layout=((),)))
