"""Projections on streams of their own: the same results, every branch joined, nothing left behind."""

import contextlib

import pytest
import torch
from torch import nn

import spkv
from spkv.hf import concurrent
from spkv.hf.concurrent import concurrent_projections


@pytest.fixture
def events(monkeypatch):
    """Stands in for CUDA's streams on a CPU: the list of what was begun, recorded and waited for."""
    log = []

    class Stream:
        def __init__(self, device=None):
            self.name = f"side {len([entry for entry in log if entry[0] == 'made'])}"
            log.append(("made", self.name))

        def wait_stream(self, other):
            log.append(("fork", self.name))

        def record_event(self):
            log.append(("recorded", self.name))
            return self.name

        def wait_event(self, event):
            log.append(("joined", event))

    main = Stream()
    log.clear()

    monkeypatch.setattr(concurrent, "_side_streams", lambda device: [Stream(), Stream(), Stream()])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: main)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    return log


def test_results_are_the_same_and_every_branch_is_joined(events, tiny_llama):
    spkv.attach(tiny_llama, spkv.SPKVConfig(window=4))
    ids = torch.randint(1, 97, (2, 9))
    with torch.no_grad():
        expected = tiny_llama(ids).logits
        with concurrent_projections(tiny_llama):
            assert torch.equal(tiny_llama(ids).logits, expected)
            begun, joined = ([name for kind, name in events if kind == wanted] for wanted in ("recorded", "joined"))
            assert len(begun) == 2 * (3 + 1)  # in each layer keys, values and predictor, one half of the MLP
            assert sorted(begun) == sorted(joined)
        events.clear()
        assert torch.equal(tiny_llama(ids).logits, expected)
    assert not events
    assert not any("forward" in vars(module) for module in tiny_llama.modules())


@pytest.mark.parametrize("place", ["utility_predictor", "k_proj", "o_proj"])
def test_a_predictors_branch_is_joined_whatever_fails(events, tiny_llama, place):
    spkv.attach(tiny_llama, spkv.SPKVConfig(window=4))

    def fail(*_):
        raise RuntimeError("no more")

    getattr(tiny_llama.model.layers[0].self_attn, place).register_forward_pre_hook(fail)
    with torch.no_grad(), concurrent_projections(tiny_llama), pytest.raises(RuntimeError, match="no more"):
        tiny_llama(torch.randint(1, 97, (2, 9)))
    recorded, joined = ([name for kind, name in events if kind == wanted] for wanted in ("recorded", "joined"))
    assert sorted(recorded) == sorted(joined)
    assert spkv.attachment(tiny_llama).predictor_stream is None


class Layer(nn.Module):
    """Calls its projections with inputs of its own, and one of them not at all."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, hidden_states):
        if hidden_states.sum() > 100:
            raise RuntimeError("no more")
        return self.q_proj(hidden_states) + self.k_proj(hidden_states + 1)


def test_other_inputs_are_computed_and_unused_branches_joined_also_after_a_failure(events):
    layer = Layer()
    layer.device = torch.device("cpu")
    given = torch.ones(2, 3)
    expected = layer(given)
    with concurrent_projections(layer):
        assert torch.equal(layer(hidden_states=given), expected)
        with pytest.raises(RuntimeError, match="no more"):
            layer(given * 1000)
        recorded, joined = ([name for kind, name in events if kind == wanted] for wanted in ("recorded", "joined"))
        assert sorted(recorded) == sorted(joined)
        assert len(recorded) == 4


def test_a_forward_that_stood_on_the_module_stays_there(events):
    layer = Layer()
    layer.device = torch.device("cpu")
    own = layer.k_proj.forward = lambda hidden_states: hidden_states
    with pytest.raises(RuntimeError, match="no more"), concurrent_projections(layer):
        layer(torch.full((2, 3), 1000.0))
    assert layer.k_proj.forward is own
    assert "forward" not in vars(layer.q_proj)
