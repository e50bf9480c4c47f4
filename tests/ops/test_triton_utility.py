"""The end of a predictor as one kernel: what the predictor itself computes."""

import copy
import os

import pytest
import torch

from spkv.predictor import UtilityPredictor

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from spkv.ops.triton import utility  # noqa: E402
from spkv.ops.triton.utility import decide  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"


# The interpreter cuts float32 off to make bfloat16 of it, where a GPU rounds.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])])
@pytest.mark.parametrize(("B", "T", "Hkv", "width"), [(1, 1, 8, 64), (3, 1, 3, 576), (2, 5, 1, 17), (2, 1, 2, 300)])
def test_utilities_err_no_more_than_those_of_the_predictor_and_decide(B, T, Hkv, width, dtype, monkeypatch):
    monkeypatch.setattr(utility, "_MOST_READ", 256)
    torch.manual_seed(0)
    predictor = UtilityPredictor(32, Hkv, width, initial_bias=0.5).to(DEVICE, dtype)
    torch.nn.init.normal_(predictor.down.weight, std=width**-0.5)
    x = 3 * torch.randn(B, T, 32, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        eager = predictor(x)
        actual, keep = decide(predictor.up(x), predictor.down.weight, predictor.down.bias, 0.6)
        exact = copy.deepcopy(predictor).double()(x.double()).double()
    assert actual.shape == eager.shape == (B, Hkv, T)
    assert actual.dtype == torch.float32
    assert torch.equal(keep, actual >= 0.6)
    assert (actual - exact).norm() <= 2 * (eager - exact).norm() + 1e-7 * exact.norm()


def test_several_dtypes_are_refused():
    hidden, weight = torch.zeros(1, 1, 4, device=DEVICE), torch.zeros(2, 4, device=DEVICE).half()
    with pytest.raises(TypeError, match="must share a dtype, not torch.float32, torch.float16, torch.float16"):
        decide(hidden, weight, torch.zeros(2, device=DEVICE).half(), 0.5)


def test_large_values_saturate_and_do_not_overflow():
    hidden = torch.tensor([[[1e4, -1e4]]], device=DEVICE)
    weight = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], device=DEVICE)
    utility, keep = decide(hidden, weight, torch.zeros(2, device=DEVICE), 1.0)
    assert utility.flatten().tolist() == [1.0, 0.0]
    assert keep.flatten().tolist() == [True, False]  # at the threshold, too
