"""Dense attention by others, for comparison: SDPA (flash and cuDNN), FA3 and FlashInfer. None of them knows gates.

Each baseline gets its inputs in the layout it likes best, copied beforehand; results come back as [B, H, T, D].
One that does not load or cannot run raises, and its row says so. Legend as in `spkv.ops.attention`; L keys.

FlashInfer compiles its kernels at first use, for a minute or more each. `compile_flashinfer` does that in processes of
their own, side by side and with a time limit; `python -m benchmarks.baselines KERNEL HEADS KV_HEADS HEAD_DIM` is one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

PAGE = 16  # tokens in a page of FlashInfer's caches, as in ours
SDPA = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
_WORKSPACE_BYTES = 256 * 2**20
_ROOT = Path(__file__).parents[1]

Inputs = tuple[Tensor, Tensor, Tensor]  # query [B, H, T, D], key and value [B, Hkv, L, D]
FlashInferState = dict[tuple[str, int, int, int], str]


class UnavailableError(RuntimeError):
    """A baseline cannot run here, and why."""


@dataclass(frozen=True)
class Prepared:
    """A baseline ready to run: a call for every set of inputs, each returning [B, H, T, D]."""

    calls: Sequence[Callable[[], Tensor]]
    note: str | None = None


Prepare = Callable[[Sequence[Inputs]], Prepared]


def forward_baselines(flashinfer: FlashInferState | None) -> dict[str, Prepare]:
    """Causal attention of the last T of L positions, by name."""
    return {
        **{name: lambda inputs, backend=backend: _sdpa_forward(backend, inputs) for name, backend in SDPA.items()},
        "fa3": _fa3_forward,
        "flashinfer single prefill": lambda inputs: _flashinfer_prefill(inputs, flashinfer),
    }


def decode_baselines(flashinfer: FlashInferState | None) -> dict[str, Prepare]:
    """Attention of one token a sequence against all L pairs of a dense cache, by name."""
    prepare: dict[str, Prepare] = {}
    for name, backend in SDPA.items():
        prepare[name] = lambda inputs, backend=backend: _sdpa_decode(backend, inputs, grouped=False)
        prepare[f"{name}, grouped"] = lambda inputs, backend=backend: _sdpa_decode(backend, inputs, grouped=True)
    prepare["fa3"] = lambda inputs: _fa3_decode(inputs, lengths=True)
    prepare["fa3, full"] = lambda inputs: _fa3_decode(inputs, lengths=False)
    prepare["flashinfer batch"] = lambda inputs: _flashinfer_batch(inputs, flashinfer)
    prepare["flashinfer xqa"] = lambda inputs: _flashinfer_xqa(inputs, flashinfer)
    return prepare


def sdpa(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend, *, causal: bool) -> Tensor:
    """SDPA with one backend and no other; `causal` means that the last query sees all keys."""
    T, L = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    with sdpa_kernel(backend):
        if not causal or T == L:
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)
        if backend is not SDPBackend.FLASH_ATTENTION:
            raise UnavailableError(f"SDPA's {backend.name} has no causal mask for {T} queries and {L} keys")
        return F.scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(T, L), enable_gqa=grouped)


def sdpa_inputs(backend: SDPBackend, inputs: Inputs, *, causal: bool) -> tuple[Inputs, str]:
    """The inputs as this backend takes them, with a note: as they are, or with K/V heads expanded.

    Whether it takes fewer KV heads than query heads is tried, with a backward pass if an input asks for gradients.
    """
    query, key, value = inputs
    try:
        out = sdpa(query, key, value, backend, causal=causal)
        if out.requires_grad:
            torch.autograd.grad(out.sum(), inputs)
    except UnavailableError:
        raise
    except RuntimeError:
        group = query.shape[1] // key.shape[1]
        if group == 1:
            raise
        key, value = (t.detach().repeat_interleave(group, dim=1).requires_grad_(t.requires_grad) for t in (key, value))
        note = "no enable_gqa: K/V heads were expanded beforehand, untimed"
        if query.requires_grad:
            note += "; dK and dV are those of the expanded heads"
        return (query, key, value), note
    return inputs, "enable_gqa" if query.shape[1] != key.shape[1] else ""


def _sdpa_forward(backend: SDPBackend, inputs: Sequence[Inputs]) -> Prepared:
    calls, note = [], ""
    for one in inputs:
        taken, note = sdpa_inputs(backend, one, causal=True)
        calls.append(lambda taken=taken: sdpa(*taken, backend, causal=True))
    return Prepared(calls, note or None)


def _sdpa_decode(backend: SDPBackend, inputs: Sequence[Inputs], *, grouped: bool) -> Prepared:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not grouped:
            return sdpa(query, key, value, backend, causal=False)
        B, H, _, D = query.shape
        return sdpa(query.view(B, key.shape[1], -1, D), key, value, backend, causal=False).reshape(B, H, 1, D)

    note = "a group's queries as rows of one head" if grouped else "enable_gqa"
    return Prepared([lambda one=one: run(*one) for one in inputs], note)


def _fa3_forward(inputs: Sequence[Inputs]) -> Prepared:
    from fa3_fwd_interface import flash_attn_func

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flash_attn_func(query, key, value, causal=True).transpose(1, 2)

    swapped = [tuple(t.transpose(1, 2).contiguous() for t in one) for one in inputs]
    return Prepared([lambda one=one: run(*one) for one in swapped])


def _fa3_decode(inputs: Sequence[Inputs], *, lengths: bool) -> Prepared:
    from fa3_fwd_interface import flash_attn_with_kvcache

    def run(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
        return flash_attn_with_kvcache(query, key, value, cache_seqlens=seen).transpose(1, 2)

    calls = []
    for one in inputs:
        query, key, value = (t.transpose(1, 2).contiguous() for t in one)
        seen = torch.full((key.shape[0],), key.shape[1], dtype=torch.int32, device=key.device) if lengths else None
        calls.append(lambda query=query, key=key, value=value, seen=seen: run(query, key, value, seen))
    how = "lengths on the device" if lengths else "no lengths: all caches full"
    return Prepared(calls, f"contiguous cache (this build has no paged one), {how}")


def _flashinfer_prefill(inputs: Sequence[Inputs], state: FlashInferState | None) -> Prepared:
    _need_flashinfer("prefill", inputs, state)
    import flashinfer

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flashinfer.single_prefill_with_kv_cache(query, key, value, causal=True).transpose(0, 1).unsqueeze(0)

    if inputs[0][0].shape[0] != 1:
        raise UnavailableError("the single prefill takes one sequence")
    swapped = [tuple(t[0].transpose(0, 1).contiguous() for t in one) for one in inputs]
    return Prepared([lambda one=one: run(*one) for one in swapped])


def _flashinfer_batch(inputs: Sequence[Inputs], state: FlashInferState | None) -> Prepared:
    _need_flashinfer("batch", inputs, state)
    import flashinfer

    query, key, _ = inputs[0]
    (B, H, _, D), (Hkv, L), device = query.shape, key.shape[1:3], query.device
    table = _page_table(B, L, device)
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(B + 1, dtype=torch.int32, device=device) * table.shape[1],
        table.flatten(),
        torch.full((B,), PAGE, dtype=torch.int32, device=device),
        H,
        Hkv,
        D,
        PAGE,
        q_data_type=query.dtype,
        kv_data_type=key.dtype,
    )

    def run(query: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        return wrapper.run(query.squeeze(2), pages).unsqueeze(2)

    paged = [(q, (_paged(k, table), _paged(v, table))) for q, k, v in inputs]
    note = f"pages of {PAGE}, tensor cores, plan() on the host untimed"
    return Prepared([lambda one=one: run(*one) for one in paged], note)


def _flashinfer_xqa(inputs: Sequence[Inputs], state: FlashInferState | None) -> Prepared:
    _need_flashinfer("xqa", inputs, state)
    from flashinfer.decode import trtllm_batch_decode_with_kv_cache

    query, key, _ = inputs[0]
    (B, _, _, D), L, device = query.shape, key.shape[2], query.device
    table = _page_table(B, L, device)
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    lengths = torch.full((B,), L, dtype=torch.int32, device=device)

    def run(query: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        return trtllm_batch_decode_with_kv_cache(
            query.squeeze(2),
            pages,
            workspace,
            table,
            lengths,
            L,
            bmm1_scale=D**-0.5,
            bmm2_scale=1.0,
            kv_layout="HND",
            backend="xqa",
        ).unsqueeze(2)

    paged = [(q, (_paged(k, table), _paged(v, table))) for q, k, v in inputs]
    return Prepared([lambda one=one: run(*one) for one in paged], f"pages of {PAGE}, table and lengths on the device")


def _page_table(sequences: int, length: int, device: torch.device) -> Tensor:
    """[sequences, pages] int32: all pages of a pool, in random order."""
    if length % PAGE:
        raise UnavailableError(f"the length must be a multiple of {PAGE} here, not {length}")
    order = torch.randperm(sequences * length // PAGE, device=device)
    return order.view(sequences, -1).to(torch.int32)


def _paged(cache: Tensor, table: Tensor) -> Tensor:
    """[B, Hkv, L, D] as a pool [pages, Hkv, PAGE, D] in the order of the table."""
    _, Hkv, L, D = cache.shape
    pool = torch.empty(table.numel(), Hkv, PAGE, D, dtype=cache.dtype, device=cache.device)
    for sequence, pages in zip(cache, table.long(), strict=True):
        pool[pages] = sequence.view(Hkv, L // PAGE, PAGE, D).transpose(0, 1)
    return pool


_FLASHINFER_KERNELS: dict[str, Prepare] = {
    "prefill": lambda inputs: _flashinfer_prefill(inputs, {}),
    "batch": lambda inputs: _flashinfer_batch(inputs, {}),
    "xqa": lambda inputs: _flashinfer_xqa(inputs, {}),
}


def _need_flashinfer(kernel: str, inputs: Sequence[Inputs], state: FlashInferState | None) -> None:
    if state is None:
        raise UnavailableError("not asked for (--flashinfer)")
    query, key, _ = inputs[0]
    reason = state.get((kernel, query.shape[1], key.shape[1], query.shape[3]))
    if reason is not None:
        raise UnavailableError(reason)


def compile_flashinfer(wanted: Iterable[tuple[str, int, int, int]], seconds: float) -> FlashInferState:
    """Compile kernels (name, heads, KV heads, head size), all at once; returns why those that failed did.

    One process each, which also runs its kernel on a small input: a crash there is none here.
    """
    deadline = time.monotonic() + seconds
    failed: FlashInferState = {}
    with contextlib.ExitStack() as stack:
        running: list[tuple[tuple[str, int, int, int], subprocess.Popen[Any], Any]] = []
        for kernel in wanted:
            log = stack.enter_context(tempfile.TemporaryFile(mode="w+"))
            command = [sys.executable, "-m", "benchmarks.baselines", *map(str, kernel)]
            # A session of its own, so that its compilers can be ended with it.
            process = subprocess.Popen(command, cwd=_ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            stack.callback(_end, process)
            running.append((kernel, process, log))
        for kernel, process, log in running:
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _end(process)
                failed[kernel] = f"not compiled within {seconds:g} s"
                continue
            if code:
                log.seek(0)
                lines = log.read().strip().splitlines() or [""]
                failed[kernel] = f"exit code {code}: {lines[-1][-300:]}"
    return failed


def _end(process: subprocess.Popen[Any]) -> None:
    """End a process that runs still, and all that it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    """Run one of FlashInfer's kernels once on a small input."""
    kernel, heads, kv_heads, head_dim = sys.argv[1], *map(int, sys.argv[2:5])
    queries = 256 if kernel == "prefill" else 1
    query = torch.randn(1, heads, queries, head_dim, dtype=torch.bfloat16, device="cuda")
    key, value = (torch.randn(1, kv_heads, 256, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    _FLASHINFER_KERNELS[kernel]([(query, key, value)]).calls[0]()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
