"""Choosing an implementation: by name, or the first that can run; never a silent substitute for a forced one."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MAX_HEAD_SIZE = 256


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator.

    Attributes:
        name: what `implementation=` takes.
        load: returns the function; called when chosen, so that its imports stay lazy.
        obstacle: takes the operator's arguments by name and returns why it cannot run them, or None.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    obstacle: Callable[[dict[str, Any]], str | None] = lambda arguments: None


def choose(
    operator: str, implementations: tuple[Implementation, ...], name: str | None, arguments: dict[str, Any]
) -> Callable[..., Any]:
    """Return the function of the implementation called `name`, or of the first without an obstacle.

    Raises:
        ValueError: for an unknown name, or a named implementation that cannot run these arguments.
    """
    if name is None:
        for implementation in implementations:
            if implementation.obstacle(arguments) is None:
                _warn_of_reference(operator, implementations, implementation, arguments)
                return implementation.load()
        reasons = "; ".join(f"{i.name}: {i.obstacle(arguments)}" for i in implementations)
        raise ValueError(f"no implementation of {operator} can run these arguments: {reasons}")
    for implementation in implementations:
        if implementation.name == name:
            reason = implementation.obstacle(arguments)
            if reason is not None:
                raise ValueError(f"{operator}: implementation {name!r} was asked for and cannot run: {reason}")
            return implementation.load()
    known = ", ".join(i.name for i in implementations)
    raise ValueError(f"{operator}: unknown implementation {name!r}; known are {known}")


def _warn_of_reference(
    operator: str, implementations: tuple[Implementation, ...], chosen: Implementation, arguments: dict[str, Any]
) -> None:
    """Say what keeps a GPU from the faster implementations; Python shows the same warning once."""
    if chosen.name == "reference" and any(isinstance(a, Tensor) and a.is_cuda for a in arguments.values()):
        reasons = "; ".join(f"{i.name}: {i.obstacle(arguments)}" for i in implementations if i is not chosen)
        warnings.warn(f"{operator} runs as the eager reference, which is slow on a GPU. {reasons}", stacklevel=4)


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _shared_memory(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def needs_triton(tensor: Tensor, shared_memory: int = 0) -> str | None:
    """Why the Triton kernels cannot run a tensor [..., D], or None. TRITON_INTERPRET=1 lets them run on a CPU.

    Args:
        tensor: one of the operator's.
        shared_memory: bytes of it that a program may take at most.
    """
    if not _is_installed("triton"):
        return "the package triton is not installed"
    if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on CUDA, or with TRITON_INTERPRET=1, and the tensors are on {tensor.device}"
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float16, bfloat16 and float32, not {tensor.dtype}"
    if tensor.shape[-1] > _MAX_HEAD_SIZE:
        return f"it takes head sizes up to {_MAX_HEAD_SIZE}, not {tensor.shape[-1]}"
    if tensor.is_cuda and _shared_memory(tensor.device) < shared_memory:
        return (
            f"its tiles take up to {shared_memory} bytes of shared memory, and {tensor.device} gives a program "
            f"{_shared_memory(tensor.device)}"
        )
    return None
