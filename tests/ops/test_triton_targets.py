"""Kernels compiled for GPUs that are not here: they must compile, and fit into what a program gets there."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from spkv.cache.packed import PackedCache  # noqa: E402
from spkv.ops.triton import decode, prefill, train, write  # noqa: E402
from spkv.ops.triton.launch import INTERPRETED  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

# Shared memory of a program in bytes, by compute capability: A100; RTX 4090, L4 and L40S; B200; RTX 5090.
GPUS = {80: 163 * 1024, 89: 99 * 1024, 100: 227 * 1024, 120: 99 * 1024}
T = 256


class _Driver:
    """Stands in for the driver of a GPU that is not there."""

    def __init__(self, capability):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture(params=GPUS, ids=lambda capability: f"sm{capability}")
def gpu(request, monkeypatch):
    """Kernels that are launched on CPU tensors are compiled for it instead: name -> most shared memory so far."""
    found, run = {}, JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        found[kernel.__name__] = max(found.get(kernel.__name__, 0), compiled.metadata.shared)
        return compiled

    monkeypatch.setattr(JITFunction, "run", compile_only)
    for module in (prefill, train):
        monkeypatch.setattr(module, "is_tuned_for", lambda device: False)
    monkeypatch.setattr(driver, "_active", _Driver(request.param))
    yield found
    assert max(found.values()) <= GPUS[request.param], found


def _half(*shape, grad=False):
    return torch.zeros(*shape, dtype=torch.bfloat16, requires_grad=grad)


@pytest.mark.parametrize("head_size", [128, 256])
def test_training(gpu, head_size):
    query, key, value = (_half(1, heads, T, head_size, grad=True) for heads in (8, 2, 2))
    log_gate = torch.zeros(1, 2, T, requires_grad=True)
    segments = torch.zeros(1, T, dtype=torch.long)
    out = train.gated_attention(query, key, value, log_gate, window=64, scale=1.0, segment_ids=segments, softcap=30.0)
    out.backward(torch.zeros_like(out))
    assert {"_forward", "_backward_dq", "_backward_dkdv"} <= set(gpu)


@pytest.mark.parametrize(("head_size", "page_dtype"), [(128, None), (256, None), (256, "int8")])
def test_reading_and_decoding(gpu, head_size, page_dtype):
    query, key = _half(1, 8, T, head_size), _half(1, 2, T, head_size)
    keep = torch.ones(1, 2, T, dtype=torch.bool)
    cache = PackedCache(1, 2, window=64, page_dtype=page_dtype)
    cache.append(0, key, key, keep, group=4)
    past = cache.layer(0)
    prefill.pruned_prefill(query, key, key, keep, window=64, scale=1.0, past=past)
    decode.packed_decode(query[:, :, :1], past, scale=1.0)
    write.write(past, key[:, :, :1], key[:, :, :1], keep[:, :, :1])
    assert {"_collect", "_attend", "_merge"} <= set(gpu)
