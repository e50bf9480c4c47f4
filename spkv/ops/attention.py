"""The operators. Each checks its arguments, then runs the implementation asked for, or the first that can.

Legend: B sequences, H query heads, Hkv KV heads, T tokens, D head size (at least 1, equal for keys and values),
w window. Heads h of the group h // (H / Hkv) share a KV head, and so a gate.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spkv.ops.dispatch import Implementation, choose
from spkv.ops.packed import PackedLayer
from spkv.ops.triton import limits


def _function(module: str, name: str) -> Callable[[], Callable[..., Any]]:
    return lambda: getattr(importlib.import_module(f"spkv.ops.{module}"), name)


def _needs_cuda(arguments: dict[str, Any]) -> str | None:
    device = arguments["query"].device
    if device.type != "cuda":
        return f"it runs on CUDA only, and the query is on {device}"
    if arguments["query"].dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float16, bfloat16 and float32, not {arguments['query'].dtype}"
    return None


def _needs_cpu(arguments: dict[str, Any]) -> str | None:
    # It reads lengths on the host, chain by chain, which would stall a GPU.
    device = arguments["query"].device
    return None if device.type == "cpu" else f"it runs on CPU only, and the query is on {device}"


def _needs_one_tensor(arguments: dict[str, Any]) -> str | None:
    packed = arguments.get("packed") or arguments.get("past")
    if packed is not None and packed.scattered:
        return "it finds pages by index in one tensor, and this cache's lie in slabs"
    return None


def _needs_plain_pages(arguments: dict[str, Any]) -> str | None:
    packed = arguments.get("packed") or arguments.get("past")
    return None if packed is None or packed.coded is None else "it does not read coded pages"


def _has_no_sliding_window(arguments: dict[str, Any]) -> str | None:
    return "it has no sliding window" if arguments["sliding"] else None


def _all_of(*obstacles: Callable[[dict[str, Any]], str | None]) -> Callable[[dict[str, Any]], str | None]:
    return lambda arguments: next((reason for obstacle in obstacles if (reason := obstacle(arguments))), None)


_GATED_ATTENTION = (
    Implementation("triton", _function("triton.train", "gated_attention"), limits.attention),
    Implementation("flex", _function("flex", "gated_attention"), _all_of(_needs_cuda, _has_no_sliding_window)),
    Implementation("sdpa", _function("sdpa", "gated_attention")),
    Implementation("reference", _function("reference", "gated_attention")),
)
_PRUNED_PREFILL = (
    Implementation("triton", _function("triton.prefill", "pruned_prefill"), limits.prefill),
    Implementation(
        "flex", _function("flex", "pruned_prefill"), _all_of(_needs_cuda, _needs_one_tensor, _needs_plain_pages)
    ),
    Implementation("sdpa", _function("sdpa", "pruned_prefill"), _needs_one_tensor),
    Implementation("reference", _function("reference", "pruned_prefill"), _needs_one_tensor),
)
_PACKED_DECODE = (
    Implementation("triton", _function("triton.decode", "packed_decode"), limits.decode),
    Implementation("sdpa", _function("sdpa", "packed_decode"), _all_of(_needs_cpu, _needs_one_tensor)),
    Implementation("reference", _function("reference", "packed_decode"), _needs_one_tensor),
)


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gate: Tensor | None = None,
    *,
    window: int,
    scale: float | None = None,
    segment_ids: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    sliding: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Causal attention whose keys carry a gate once they have left the window (SP-KV, arXiv 2605.14037).

    Differentiable in every tensor argument, `log_gate` included.

    Args:
        query: [B, H, T, D].
        key, value: [B, Hkv, T, D], of the query's dtype.
        log_gate: [B, Hkv, T] float, the logarithm of each key's gate, added to the scores of queries w or more
            positions later; minus infinity drops the pair. None leaves all gates open.
        window: w >= 1; a query sees itself and the w - 1 positions before it ungated.
        scale: factor on the scores; None takes D ** -0.5.
        segment_ids: [B, T] integers; a query sees its own segment only (packed documents, padding).
        softcap: scores become softcap * tanh(score / softcap) before the gate is added (Gemma 2).
        sinks: [H], a logit per head that takes probability and adds no value (GPT-OSS).
        sliding: drop all pairs that have left the window, whatever they are: ordinary sliding-window attention, at the
            cost of a window.
        implementation: "triton" (CUDA), "flex" (CUDA; not sliding), "sdpa", "reference"; None takes the first that
            can run.

    Returns:
        [B, H, T, D].

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit, naming what was given and what is allowed.
    """
    _check_attention(query, key, value, window, softcap, sinks)
    B, Hkv, T, _ = key.shape
    if query.shape[2] != T:
        raise ValueError(f"query and key must have the same number of tokens, not {query.shape[2]} and {T}")
    if log_gate is not None and sliding:
        raise ValueError("a sliding window has no gates: leave out log_gate, or sliding")
    if log_gate is not None:
        _check_shape("log_gate", log_gate, (B, Hkv, T))
        if not log_gate.is_floating_point():
            raise TypeError(f"log_gate must be floating point, not {log_gate.dtype}")
    if segment_ids is not None:
        _check_shape("segment_ids", segment_ids, (B, T))
    _check_devices(query.device, key=key, value=value, log_gate=log_gate, segment_ids=segment_ids, sinks=sinks)
    arguments = dict(
        query=query, key=key, value=value, log_gate=log_gate, segment_ids=segment_ids, softcap=softcap, sinks=sinks
    )
    arguments |= dict(window=window, scale=query.shape[-1] ** -0.5 if scale is None else scale, sliding=sliding)
    return choose("gated_attention", _GATED_ATTENTION, implementation, arguments)(**arguments)


def pruned_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    *,
    window: int,
    scale: float | None = None,
    past: PackedLayer | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention of a chunk with hard gates against what the cache holds and itself; its cost follows density.

    Triton's has no backward pass, and is not chosen where a gradient is asked for.

    Args:
        query: [B, H, T, D], the chunk's queries.
        key, value: [B, Hkv, T, D], its pairs, not yet written.
        keep: [B, Hkv, T] bool, their gates.
        window: w, the cache's where `past` is given.
        past: the pairs of earlier tokens, or None.
        valid: [B, T] bool, False at padding; window distances count valid tokens only. None: all valid.
        scale, softcap, sinks, implementation: as in `gated_attention`.

    Returns:
        [B, H, T, D]; zeros at padding.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit.
    """
    _check_attention(query, key, value, window, softcap, sinks)
    B, Hkv, T, _ = key.shape
    if query.shape[2] != T:
        raise ValueError(f"query and key must have the same number of tokens, not {query.shape[2]} and {T}")
    _check_bool("keep", keep, (B, Hkv, T))
    if valid is not None:
        _check_bool("valid", valid, (B, T))
    if past is not None:
        _check_packed(past, key)
        if past.window != window:
            raise ValueError(f"window is {window}, but the cache was filled with window {past.window}")
        past = past.in_order()
    pool = None if past is None else past.pool
    _check_devices(query.device, key=key, value=value, keep=keep, valid=valid, sinks=sinks, pool=pool)
    arguments = dict(query=query, key=key, value=value, keep=keep, past=past, valid=valid, softcap=softcap, sinks=sinks)
    arguments |= dict(window=window, scale=query.shape[-1] ** -0.5 if scale is None else scale)
    return choose("pruned_prefill", _PRUNED_PREFILL, implementation, arguments)(**arguments)


def packed_decode(
    query: Tensor,
    packed: PackedLayer,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention of one token a sequence, already written, against all that its chains hold.

    Args:
        query: [B, H, 1, D].
        packed: the layer's rings and chains. A sequence that holds nothing gets zeros.
        scale, softcap, sinks: as in `gated_attention`.
        implementation: "triton" (CUDA), "sdpa" (CPU), "reference"; None takes the first that can run.

    Returns:
        [B, H, 1, D].

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit.
    """
    if query.dim() != 4 or query.shape[2] != 1:
        raise ValueError(f"query must have shape [B, H, 1, D], not {list(query.shape)}")
    B, H, _, D = query.shape
    if packed.seen.shape[0] != B or packed.pool.shape[-1] != D or H % packed.kv_heads:
        raise ValueError(
            f"query {list(query.shape)} does not fit a cache of {packed.seen.shape[0]} sequences, "
            f"{packed.kv_heads} KV heads and head size {packed.pool.shape[-1]}"
        )
    if packed.pool.dtype != query.dtype:
        raise TypeError(f"query is {query.dtype}, but the cache holds {packed.pool.dtype}")
    _check_options(H, softcap, sinks)
    _check_devices(query.device, pool=packed.pool, sinks=sinks)
    arguments = dict(query=query, packed=packed, softcap=softcap, sinks=sinks)
    arguments |= dict(scale=D**-0.5 if scale is None else scale)
    return choose("packed_decode", _PACKED_DECODE, implementation, arguments)(**arguments)


_WRITE = (
    Implementation("triton", _function("triton.write", "write"), limits.write),
    Implementation("reference", _function("reference", "write"), _needs_one_tensor),
)
_COUNT_PAGES = (
    Implementation("triton", _function("triton.write", "count_pages"), limits.count_pages),
    Implementation("reference", _function("reference", "count_pages")),
)


def write(
    packed: PackedLayer,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    valid: Tensor | None = None,
    *,
    implementation: str | None = None,
) -> None:
    """Enter new pairs into the rings; append what leaves the window and is kept to the chains. In place.

    Args:
        packed: the layer's rings and chains. If it has a stack of free pages, chains get the pages that they newly
            need from it (which chain gets which may vary from run to run); if not, its table must already hold them.
            See `PackedLayer` for the columns that the table needs, and for what happens when the stack is exhausted.
        key, value: [B, Hkv, T, D].
        keep: [B, Hkv, T] bool.
        valid: [B, T] bool, False at padding, which is not written. None: all valid.
        implementation: "triton" (CUDA; one launch for T = 1, and never a word from the host), "reference"; None takes
            the first that can run.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit.
    """
    B, Hkv, T = key.shape[:3]
    _check_packed(packed, key)
    _check_shape("value", value, tuple(key.shape))
    _check_bool("keep", keep, (B, Hkv, T))
    if valid is not None:
        _check_bool("valid", valid, (B, T))
    _check_devices(key.device, value=value, keep=keep, valid=valid, pool=packed.pool)
    arguments = dict(packed=packed, key=key, value=value, keep=keep, valid=valid)
    choose("write", _WRITE, implementation, arguments)(**arguments)


def count_pages(
    packed: PackedLayer, keep: Tensor, valid: Tensor | None = None, *, implementation: str | None = None
) -> Tensor:
    """Count the pages that a `write` with these gates would newly take.

    Args:
        packed, keep, valid: as in `write`.
        implementation: "triton" (CUDA), "reference"; None takes the first that can run.

    Returns:
        [3] int32: pages for all rings, pages for all kept pairs, and the kept pages of the then longest chain.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit.
    """
    B, Hkv, T = packed.seen.shape[0], packed.kv_heads, keep.shape[-1]
    _check_bool("keep", keep, (B, Hkv, T))
    if valid is not None:
        _check_bool("valid", valid, (B, T))
    _check_devices(packed.pool.device, keep=keep, valid=valid)
    arguments = dict(packed=packed, keep=keep, valid=valid)
    function = choose("count_pages", _COUNT_PAGES, implementation, arguments)
    return function(**arguments)  # type: ignore[no-any-return]


def _check_attention(
    query: Tensor, key: Tensor, value: Tensor, window: int, softcap: float | None, sinks: Tensor | None
) -> None:
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"query and key must have shape [B, heads, T, D], not {list(query.shape)} and {list(key.shape)}"
        )
    if value.shape != key.shape:
        raise ValueError(f"key and value must have the same shape, not {list(key.shape)} and {list(value.shape)}")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)} must agree in batch (dim 0) and head size (dim 3)"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads are not a multiple of {key.shape[1]} KV heads")
    if not query.is_floating_point() or query.dtype != key.dtype or query.dtype != value.dtype:
        raise TypeError(
            f"query, key and value must share one floating dtype, not {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be a whole number of at least 1, not {window!r}")
    _check_options(query.shape[1], softcap, sinks)


def _check_devices(expected: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != expected:
            raise ValueError(f"{name} is on {tensor.device}, and the other tensors are on {expected}")


def _check_options(heads: int, softcap: float | None, sinks: Tensor | None) -> None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, not {softcap!r}")
    if sinks is not None:
        _check_shape("sinks", sinks, (heads,))


def _check_packed(packed: PackedLayer, key: Tensor) -> None:
    if (packed.seen.shape[0], packed.kv_heads, packed.pool.shape[-1]) != (key.shape[0], key.shape[1], key.shape[3]):
        raise ValueError(
            f"key {list(key.shape)} does not fit a cache of {packed.seen.shape[0]} sequences, "
            f"{packed.kv_heads} KV heads and head size {packed.pool.shape[-1]}"
        )
    if packed.pool.dtype != key.dtype:
        raise TypeError(f"key is {key.dtype}, but the cache holds {packed.pool.dtype}")


def _check_bool(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    _check_shape(name, tensor, shape)
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, not {tensor.dtype}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")
