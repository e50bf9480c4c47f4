"""Gates: soft, annealed, hard, and those of other policies."""

import math

import pytest
import torch

from spkv.gates import (
    AnnealedGate,
    HeadGate,
    LayoutGate,
    NoisyGate,
    OpenGate,
    RandomGate,
    SinkGate,
    SoftGate,
    ThresholdGate,
    open_sinks,
    sink_mask,
)
from spkv.predictor import UtilityPredictor

UTILITY = torch.tensor([[[0.1, 0.5, 0.9, 1e-38]]])
POSITION = torch.arange(4)[None]
WHERE = dict(layer=0, position=POSITION)


def test_soft_is_the_logarithm_and_stays_finite():
    utility = UTILITY.clone().requires_grad_()
    gate = SoftGate().log_gate(utility, **WHERE)
    torch.testing.assert_close(gate[..., :3], UTILITY[..., :3].log())
    gate.sum().backward()
    assert gate.isfinite().all()
    assert utility.grad.isfinite().all()


def test_noise_moves_logits_by_logistic_draws():
    utility = torch.tensor([0.1, 0.5, 0.97])[None, :, None].expand(1, 3, 20_000)
    z, where = utility.logit(), dict(layer=0, position=torch.arange(20_000)[None])
    torch.testing.assert_close(NoisyGate(0.0).log_gate(utility, **where), utility.log())
    noise = (NoisyGate(0.5).log_gate(utility, **where).exp().double().logit() - z) / 0.5
    for share in (0.05, 0.5, 0.9):  # quantiles of the logistic distribution, whose density there is p (1 - p)
        deviation = 1 / math.sqrt(noise.numel() * share * (1 - share))
        assert noise.quantile(share).item() == pytest.approx(math.log(share / (1 - share)), abs=4 * deviation)
    # At amplitude 1, a gate falls on the open side with probability u.
    falls_open = (NoisyGate(1.0).log_gate(utility, **where) > math.log(0.5)).double().mean(-1)[0]
    for share, u in zip(falls_open.tolist(), utility[0, :, 0].tolist(), strict=True):
        assert share == pytest.approx(u, abs=4 * math.sqrt(u * (1 - u) / 20_000))


def test_noise_stays_finite_at_the_ends_and_comes_from_the_seed():
    utility = torch.tensor([0.0, 1e-38, 0.5, 1.0]).expand(1, 1, 500, 4).flatten(2).clone().requires_grad_()
    where = dict(layer=0, position=torch.arange(2000)[None])
    torch.manual_seed(5)
    gate = NoisyGate(6.0).log_gate(utility, **where)
    gate.sum().backward()
    assert gate.isfinite().all()
    assert (gate <= 0).all()
    assert utility.grad.isfinite().all()
    torch.manual_seed(5)
    assert torch.equal(NoisyGate(6.0).log_gate(utility, **where), gate)
    for amplitude in (-1.0, 7.0, math.nan):
        with pytest.raises(ValueError, match=r"amplitude of noise must lie in \[0, 6\]"):
            NoisyGate(amplitude)


def test_annealing_runs_from_soft_to_hard():
    soft, hard = SoftGate(), ThresholdGate(0.5)
    torch.testing.assert_close(
        AnnealedGate(0.5, 0.0).log_gate(UTILITY, **WHERE)[..., :3], soft.log_gate(UTILITY, **WHERE)[..., :3]
    )
    assert torch.equal(AnnealedGate(0.5, 1.0).log_gate(UTILITY, **WHERE), hard.log_gate(UTILITY, **WHERE))
    half = AnnealedGate(0.5, 0.5).log_gate(UTILITY, **WHERE).exp()
    torch.testing.assert_close(half[0, 0, :3], torch.tensor([0.05, 0.75, 0.95]))
    assert not AnnealedGate(0.5, 0.5).log_gate(UTILITY.clone().requires_grad_(), **WHERE).requires_grad


def test_the_power_form_closes_what_will_be_dropped_as_evenly_as_it_opens_the_rest():
    def gate(alpha):
        return AnnealedGate(0.5, alpha, "power").log_gate(UTILITY, **WHERE)[0, 0, :3]

    torch.testing.assert_close(gate(0.0), UTILITY[0, 0, :3].log())
    torch.testing.assert_close(gate(0.75), UTILITY[0, 0, :3].log() * torch.tensor([4.0, 0.25, 0.25]))
    assert gate(1.0).tolist() == [float("-inf"), 0, 0]
    with pytest.raises(ValueError, match="one of linear, power, not 'cubic'"):
        AnnealedGate(0.5, 0.5, "cubic")


def test_hard_keeps_from_the_threshold_on():
    assert ThresholdGate(0.5).keep(UTILITY, **WHERE).tolist() == [[[False, True, True, False]]]
    assert ThresholdGate(0.5).log_gate(UTILITY, **WHERE)[0, 0].tolist() == [float("-inf"), 0, 0, float("-inf")]


def test_other_policies():
    assert OpenGate().keep(UTILITY, **WHERE).all()
    assert SinkGate(2).keep(UTILITY, **WHERE).tolist() == [[[True, True, False, False]]]
    assert SinkGate(2).keep(UTILITY, layer=0, position=POSITION + 2).sum() == 0


@pytest.mark.parametrize("density", [0.0, 0.13, 0.5, 1.0])
def test_random_has_its_density_and_depends_on_nothing_but_the_place(density):
    gate, utility = RandomGate(density), torch.zeros(1, 4, 5000)
    position = torch.arange(5000)[None]
    keep = gate.keep(utility, layer=3, position=position)
    assert keep.float().mean().item() == pytest.approx(density, abs=0.01)
    assert torch.equal(keep[..., 700:800], gate.keep(utility[..., :100], layer=3, position=position[:, 700:800]))
    if 0 < density < 1:
        others = [
            gate.keep(utility, layer=4, position=position),
            keep.roll(1, dims=1),
            RandomGate(density, seed=1).keep(utility, layer=3, position=position),
        ]
        for other in others:  # independent: they agree as often as chance has it
            agreement = (other == keep).float().mean().item()
            assert agreement == pytest.approx(density**2 + (1 - density) ** 2, abs=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ThresholdGate(1.0), "strictly between 0 and 1"),
        (lambda: AnnealedGate(0.5, 1.5), r"alpha must lie in \[0, 1\], not 1.5"),
        (lambda: SinkGate(-1), "sinks must be at least 0, not -1"),
        (lambda: RandomGate(2.0), r"density must lie in \[0, 1\], not 2.0"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_layout_decides_by_layer_and_head_alone():
    gate = LayoutGate(((0, 2), ()))
    utility, position = torch.rand(2, 3, 5), torch.arange(5)[None]
    keep = gate.keep(utility, layer=0, position=position)
    assert keep.shape == utility.shape
    assert keep.float().mean((0, 2)).tolist() == [1, 0, 1]
    assert not gate.keep(utility, layer=1, position=position).any()
    assert gate.log_gate(utility, layer=0, position=position)[1, :, 4].tolist() == [0, float("-inf"), 0]


def test_learned_heads_see_the_sinks():
    gate = HeadGate({0: torch.tensor([0.0, 1.0])}, sinks=2)
    bias = gate.log_gate(torch.rand(1, 2, 4), layer=0, position=torch.arange(4)[None])
    assert (bias[0] > -1).tolist() == [[True, True, False, False], [True] * 4]


def test_sinks_of_a_layout_are_kept_by_all_heads_of_all_sequences():
    gate = LayoutGate(((0,), ()), sinks=2)
    position = torch.tensor([[0, 1, 2, 3], [3, 0, 1, 2]])
    keep = gate.keep(torch.rand(2, 2, 4), layer=0, position=position)
    assert keep[:, 0].all()
    assert keep[:, 1].tolist() == [[True, True, False, False], [False, True, True, False]]


def test_sinks_are_open_under_every_gate_that_asks_for_utilities():
    position = torch.tensor([[0, 1, 2, 3], [3, 0, 1, 2]])
    utility = open_sinks(torch.full((2, 3, 4), 0.01), sink_mask(position, 2))
    first = (position < 2)[:, None].expand_as(utility)
    gates = (SoftGate(), NoisyGate(1.0), AnnealedGate(0.5, 0.3), AnnealedGate(0.5, 0.3, "power"), ThresholdGate(0.999))
    for gate in gates:
        bias = gate.log_gate(utility, layer=0, position=position)
        assert (bias[first] == 0).all()
        assert (bias[~first] < 0).all()
    assert sink_mask(position, 0) is None
    assert open_sinks(utility, None) is utility


def test_a_new_predictor_starts_at_its_bias():
    hidden = torch.randn(2, 9, 32)
    utility = UtilityPredictor(32, 3, initial_bias=5.0)(hidden)
    assert utility.shape == (2, 3, 9)
    assert utility.dtype == torch.float32
    assert (utility - torch.sigmoid(torch.tensor(5.0))).abs().max() < 0.01
    assert UtilityPredictor(32, 3, width=7).up.out_features == 7
    assert UtilityPredictor(32, 3).to(torch.bfloat16)(hidden.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("depth", "layers"), [(1, 1), (2, 2), (4, 4)])
def test_a_predictor_has_as_many_linear_layers_as_asked_for(depth, layers):
    predictor = UtilityPredictor(32, 3, width=7, initial_bias=1.0, depth=depth)
    assert sum(isinstance(module, torch.nn.Linear) for module in predictor.modules()) == layers
    utility = predictor(torch.randn(2, 9, 32))
    assert utility.shape == (2, 3, 9)
    assert (utility - torch.sigmoid(torch.tensor(1.0))).abs().max() < 0.1
