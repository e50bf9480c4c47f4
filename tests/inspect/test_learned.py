"""Learned layouts: the gates find the heads that the model's predictions need."""

from __future__ import annotations

import pytest
import torch

import spkv
from spkv.gates import HeadGate
from spkv.inspect import hybrid_layout, inspect_texts
from spkv.inspect.learned import LearningOptions, _open_probability, _sample, learn_heads

OPTIONS = LearningOptions(steps=60, sequence_length=40, batch_size=2, learning_rate=0.2)


@pytest.fixture
def needs_two_heads(known_gates):
    """Only layer 0's head 1 and layer 1's head 1, which its gate would drop, reach the output."""
    with torch.no_grad():
        for layer, strength in zip(known_gates.model.layers, (20, 200), strict=True):
            layer.self_attn.o_proj.weight[:, :16] = 0
            layer.self_attn.o_proj.weight.mul_(strength)
            layer.self_attn.v_proj.weight.mul_(20)
        known_gates.lm_head.weight[:, 0] = 0  # the feature that says whether a token is a digit would drown all else
        known_gates.lm_head.weight.mul_(30)
    return known_gates


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 257, (1, 130), generator=generator) for _ in range(2)]


def test_the_heads_that_matter_are_found(needs_two_heads, texts, tokenizer):
    weights = {name: value.clone() for name, value in needs_two_heads.state_dict().items()}
    seen = []
    scores = learn_heads(needs_two_heads, texts, 2, OPTIONS, progress=seen.append)
    assert scores[:, 1].min() > scores[:, 0].max()
    assert _open_probability(scores).mean() == pytest.approx(0.5, abs=0.15)
    assert seen == list(range(1, 61))
    assert all(torch.equal(value, weights[name]) for name, value in needs_two_heads.state_dict().items())
    assert all(parameter.requires_grad for parameter in needs_two_heads.parameters())
    inspection = inspect_texts(needs_two_heads, tokenizer, [("a", "Room 12 has 345 chairs.")], strongest=0)
    layout = hybrid_layout(inspection, 2, "learned", scores=scores)
    assert layout.for_model(2) == ((1,), (1,))
    assert layout.utility_covered < hybrid_layout(inspection, 2, "densest-heads").utility_covered


def test_the_same_seed_learns_the_same(needs_two_heads, texts):
    few = LearningOptions(steps=3, sequence_length=40)
    assert torch.equal(learn_heads(needs_two_heads, texts, 1, few), learn_heads(needs_two_heads, texts, 1, few))


def test_gates_are_open_as_often_as_they_say():
    logits = torch.tensor([-3.0, 0.0, 2.0])
    drawn = torch.stack(
        [_sample(logits, generator) for generator in [torch.Generator().manual_seed(0)] for _ in range(4000)]
    )
    assert ((drawn > 0).float().mean(0) - _open_probability(logits)).abs().max() < 0.03
    assert drawn.min() == 0
    assert drawn.max() == 1


def test_a_head_gate_between_open_and_closed(needs_two_heads):
    ids = torch.arange(1, 41)[None]
    found = spkv.attachment(needs_two_heads)

    def logits(z):
        with torch.no_grad(), found.using(HeadGate({0: torch.full((2,), z), 1: torch.full((2,), z)})):
            return needs_two_heads(ids, use_cache=False).logits

    with spkv.dense(needs_two_heads), torch.no_grad():
        dense = needs_two_heads(ids).logits
    torch.testing.assert_close(logits(1.0), dense, rtol=1e-4, atol=1e-5)
    assert 0 < (logits(0.9) - dense).abs().max() < (logits(0.0) - dense).abs().max()


def test_bad_arguments_are_named(known_gates, texts, tokenizer):
    with pytest.raises(ValueError, match="sequence_length must exceed the window of 8 tokens, not be 8"):
        learn_heads(known_gates, texts, 1, LearningOptions(sequence_length=8))
    with pytest.raises(ValueError, match=r"no document has 500 tokens \(sequence_length\); the longest has 130"):
        learn_heads(known_gates, texts, 1, LearningOptions(sequence_length=500))
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        LearningOptions(steps=0)
    inspection = inspect_texts(known_gates, tokenizer, [("a", "Room 12 has 345 chairs.")], strongest=0)
    with pytest.raises(ValueError, match="strategy learned, and no other, takes scores"):
        hybrid_layout(inspection, 1, "learned")
