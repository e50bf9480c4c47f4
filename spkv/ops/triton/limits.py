"""What the Triton kernels cannot run, and why. Importing this does not import Triton.

The functions take an operator's arguments by name and return a reason, or None.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from spkv.ops.packed import PackedLayer

MAX_HEAD_SIZE = 256
# Tiles of `gated_attention` and `pruned_prefill` were chosen on GPUs of this compute capability, H100 and H200. Others
# get portable ones, which fit, as those of `packed_decode` do, into what A100, RTX 30 and all since give a program.
_TUNED_FOR = 9
_SHARED_MEMORY = 99 * 1024
_MOST_QUERIES_OF_A_CHAIN = 32


def attention(arguments: dict[str, Any]) -> str | None:
    query = arguments["query"]
    return _needs_triton(query, _SHARED_MEMORY) or (None if query.numel() else "it needs a token")


def model(head_size: int, group: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels cannot run a model with `group` queries a KV head, or None."""
    if group > _MOST_QUERIES_OF_A_CHAIN:
        return f"they take groups of up to {_MOST_QUERIES_OF_A_CHAIN} queries, not {group}"
    return _needs_triton(torch.empty(1, 1, 1, head_size, dtype=dtype, device=device), _SHARED_MEMORY)


def codec(page_dtype: str | None, head_size: int, device: torch.device) -> str | None:
    """Why the kernels cannot read or write pages of this kind, or None."""
    if page_dtype == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return f"they take fp8 from compute capability 8.9 on, and {device} has less"
    if page_dtype == "int4" and head_size & (head_size - 1):
        return f"they take int4 at head sizes that are powers of two, not {head_size}"
    return None


def prefill(arguments: dict[str, Any]) -> str | None:
    past = arguments["past"]
    return attention(arguments) or _wants_gradients(arguments) or (None if past is None else _other_layout(past))


def decode(arguments: dict[str, Any]) -> str | None:
    query, packed = arguments["query"], arguments["packed"]
    group = query.shape[1] // packed.kv_heads
    if group > _MOST_QUERIES_OF_A_CHAIN:
        return f"it takes groups of up to {_MOST_QUERIES_OF_A_CHAIN} queries, not {group}"
    return _needs_triton(query, _SHARED_MEMORY) or _wants_gradients(arguments) or _other_layout(packed)


def write(arguments: dict[str, Any]) -> str | None:
    return _needs_triton(arguments["key"]) or _other_layout(arguments["packed"])


def count_pages(arguments: dict[str, Any]) -> str | None:
    return _needs_triton(arguments["packed"].pool) or _other_layout(arguments["packed"])


def _wants_gradients(arguments: dict[str, Any]) -> str | None:
    wanted = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments.values())
    return "it has no backward pass, and a gradient is asked for; call it under torch.no_grad()" if wanted else None


def _other_layout(packed: PackedLayer) -> str | None:
    if packed.coded is not None and (
        reason := codec(packed.coded.codec.name, packed.pool.shape[-1], packed.pool.device)
    ):
        return reason
    lengths = packed.seen, packed.kept
    if packed.pool.stride(-1) != 1 or packed.table.stride(-1) != 1 or packed.ring_keep.stride(-1) != 1:
        return "it wants pool, table and ring_keep with a last stride of 1"
    if not all(tensor.is_contiguous() for tensor in lengths):
        return "it wants contiguous seen and kept"
    if any(tensor.dtype != torch.int32 for tensor in (packed.table, *lengths)):
        return "it wants table, seen and kept in int32"
    return None


@functools.cache
def is_tuned_for(device: torch.device) -> bool:
    """Whether a device takes the tiles that were chosen on an H100, as the interpreter does, or portable ones."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == _TUNED_FOR


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _shared_memory(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def _needs_triton(tensor: Tensor, shared_memory: int = 0) -> str | None:
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
    if tensor.shape[-1] > MAX_HEAD_SIZE:
        return f"it takes head sizes up to {MAX_HEAD_SIZE}, not {tensor.shape[-1]}"
    if tensor.is_cuda and _shared_memory(tensor.device) < shared_memory:
        return (
            f"its tiles take up to {shared_memory} bytes of shared memory, and {tensor.device} gives a program "
            f"{_shared_memory(tensor.device)}"
        )
    return None
