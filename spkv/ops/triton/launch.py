"""What the kernels' host sides share."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, which multiplies bfloat16 wrongly."""


def padded(size: int) -> int:
    """The power of two that holds a head or a group; 16 is the least that a product takes."""
    return max(16, triton.next_power_of_2(size))


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# From here on, drivers capture such launches in CUDA graphs.
_DRIVER_WITH_EARLY_GRAPHS = 12_030


@functools.cache
def launches_early(device: torch.device) -> bool:
    """Whether kernels can be launched while the one before them still runs: programmatic dependent launch, on Hopper
    and later. It hides the launch of each in a chain of short kernels.

    A kernel launched with `early_options` must call `tl.extra.cuda.gdc_wait` before it touches memory; the one before
    it says with `tl.extra.cuda.gdc_launch_dependents` from when on the next may be there.
    """
    if INTERPRETED or device.type != "cuda" or torch.version.hip is not None or not hasattr(tl.extra.cuda, "gdc_wait"):
        return False
    version = ctypes.c_int()
    try:  # torch tells the version of its CUDA, not the driver's
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0) and version.value >= _DRIVER_WITH_EARLY_GRAPHS


def early_options(early: bool) -> dict[str, Any]:
    """Options of a launch that need not wait for the kernel before it, as `launches_early` says."""
    return {"launch_pdl": True} if early else {}
