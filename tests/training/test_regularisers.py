import math

import pytest
import torch

from spkv.training.regularisers import FORMS


@pytest.mark.parametrize("form", FORMS)
def test_closed_gates_cost_nothing_and_more_open_ones_more(form) -> None:
    utility = torch.linspace(0.0, 1.0, 50)
    penalty = FORMS[form](utility)
    assert penalty[0] == 0
    assert (penalty.diff() > 0).all()
    assert penalty.isfinite().all()


def test_their_gradients_in_logits() -> None:
    logit = torch.tensor([-4.0, 0.0, 4.0], dtype=torch.float64, requires_grad=True)
    gradients = {}
    for form, penalty in FORMS.items():
        (gradients[form],) = torch.autograd.grad(penalty(logit.sigmoid()).sum(), logit)
    u = logit.detach().sigmoid()
    assert torch.allclose(gradients["linear"], u * (1 - u))
    assert torch.allclose(gradients["square"], 2 * u * u * (1 - u))
    assert torch.allclose(gradients["log"], u)
    assert torch.allclose(gradients["binary"], 2 * u * (1 - u) ** 2)
    assert torch.allclose(gradients["concave"], u * (1 - u) / (u + 0.02) / math.log(51))
