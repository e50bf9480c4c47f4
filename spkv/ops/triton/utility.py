"""The end of a utility predictor in Triton, for the few tokens of a decode step: one launch where torch takes five.

Legend: B sequences, T tokens, W width of the predictor's last hidden layer, Hkv KV heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spkv.ops.triton.launch import on_device_of
from spkv.ops.triton.primitives import LOG2_E

_MOST_READ = 4096  # elements of a row at a time: 32 a thread


def decide(hidden: Tensor, weight: Tensor, bias: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Map the last hidden layer to utilities and to what is kept: SiLU, a logit a head, the sigmoid, the threshold.

    Rounds where `UtilityPredictor` rounds; only the order of the projection's sum is another.

    Args:
        hidden: [B, T, W], which SiLU has not seen yet.
        weight, bias: [Hkv, W] and [Hkv], of the projection, in the dtype of `hidden`.
        threshold: the utility from which a pair is kept.

    Returns:
        [B, Hkv, T] float32, in (0, 1), and [B, Hkv, T] bool.

    Raises:
        TypeError: for several dtypes.
    """
    if not hidden.dtype == weight.dtype == bias.dtype:
        raise TypeError(f"hidden, weight and bias must share a dtype, not {hidden.dtype}, {weight.dtype}, {bias.dtype}")
    (B, T, W), Hkv = hidden.shape, weight.shape[0]
    hidden, weight = hidden.contiguous(), weight.contiguous()
    utility = torch.empty(B, Hkv, T, dtype=torch.float32, device=hidden.device)
    keep = torch.empty_like(utility, dtype=torch.bool)
    N = min(_MOST_READ, triton.next_power_of_2(W))
    with on_device_of(hidden):
        _decide[(B * T, Hkv)](hidden, weight, bias, utility, keep, threshold, T, W, Hkv=Hkv, N=N, num_warps=4)
    return utility, keep


@triton.jit(do_not_specialize=["threshold", "T"])
def _decide(hidden, weight, bias, utility, keep, threshold, T, W, Hkv: tl.constexpr, N: tl.constexpr):
    """One token and head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    total = tl.zeros([N], tl.float32)
    for start in range(0, W, N):
        column = start + tl.arange(0, N)
        inside = column < W
        x = tl.load(hidden + row * W + column, mask=inside, other=0.0)
        exact = x.to(tl.float32)
        active = (exact / (1.0 + tl.exp2(-exact * LOG2_E))).to(x.dtype)
        total += active.to(tl.float32) * tl.load(weight + head * W + column, mask=inside, other=0.0).to(tl.float32)
    logit = (tl.sum(total, 0) + tl.load(bias + head).to(tl.float32)).to(hidden.dtype.element_ty).to(tl.float32)
    at = (row // T * Hkv + head) * T + row % T
    share = 1.0 / (1.0 + tl.exp2(-logit * LOG2_E))
    tl.store(utility + at, share)
    tl.store(keep + at, share >= threshold)
