"""What the kernels' host sides share."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, which multiplies bfloat16 wrongly."""


def padded(size: int) -> int:
    """The power of two that holds a head or a group; 16 is the least that a product takes."""
    return max(16, triton.next_power_of_2(size))


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
