"""write of one token in Triton: bit for bit what the reference leaves behind."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spkv.ops import reference
from spkv.ops.packed import PackedLayer

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from spkv.ops.triton.write import write  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
TENSORS = ("pool", "table", "seen", "kept", "ring_keep")


def empty(B, Hkv, window, P, D, tokens, dtype=torch.float32):
    """A PackedLayer whose table already has pages for `tokens` kept pairs of each chain; NaN everywhere."""
    C, columns = B * Hkv, -(-window // P) + -(-tokens // P)
    return PackedLayer(
        pool=torch.full((C * columns, 2, P, D), float("nan"), dtype=dtype, device=DEVICE),
        table=torch.randperm(C * columns, device=DEVICE).int().view(C, columns),
        seen=torch.zeros(B, dtype=torch.int32, device=DEVICE),
        kept=torch.zeros(C, dtype=torch.int32, device=DEVICE),
        ring_keep=torch.zeros(C, window, dtype=torch.bool, device=DEVICE),
        window=window,
    )


def copy(packed):
    return PackedLayer(**{name: getattr(packed, name).clone() for name in TENSORS}, window=packed.window)


def assert_same(actual, expected):
    for name in TENSORS:
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=30)
@given(data=st.data())
def test_any_tokens_leave_what_the_reference_leaves(data):
    B, Hkv, D = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 4, 24]))
    window, P = data.draw(st.integers(1, 20)), data.draw(st.sampled_from([1, 4, 16]))
    density, masked = data.draw(st.sampled_from([0.0, 0.5, 1.0])), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    expected = empty(B, Hkv, window, P, D, 60, dtype)
    lengths = [data.draw(st.integers(0, 30)) for _ in range(B)]
    start = max(lengths)
    if start:  # sequences of different lengths, by the reference
        key, value = torch.randn(2, B, Hkv, start, D, device=DEVICE).to(dtype)
        keep = torch.rand(B, Hkv, start, device=DEVICE) < density
        valid = torch.arange(start, device=DEVICE) >= start - torch.tensor(lengths, device=DEVICE)[:, None]
        reference.write(expected, key, value, keep, valid)
    actual = copy(expected)
    for _ in range(data.draw(st.integers(1, 12))):
        key, value = torch.randn(2, B, 1, Hkv, D, device=DEVICE).to(dtype).transpose(2, 3)
        keep = torch.rand(B, Hkv, 1, device=DEVICE) < density
        valid = torch.rand(B, 1, device=DEVICE) < 0.6 if masked else None
        reference.write(expected, key, value, keep, valid)
        write(actual, key, value, keep, valid)
        assert_same(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a compiled kernel")
@pytest.mark.parametrize(("Hkv", "D"), [(8, 128), (3, 64), (1, 256), (32, 96)])
def test_a_captured_graph_writes_token_after_token(Hkv, D):
    B, window, steps = 5, 70, 300
    expected = empty(B, Hkv, window, 16, D, steps, torch.bfloat16)
    actual = copy(expected)
    key, value = torch.randn(2, B, Hkv, 1, D, device=DEVICE, dtype=torch.bfloat16)
    keep = torch.zeros(B, Hkv, 1, dtype=torch.bool, device=DEVICE)
    write(copy(expected), key, value, keep)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write(actual, key, value, keep)
    for _ in range(steps):
        key.normal_(), value.normal_(), keep.bernoulli_(0.4)
        reference.write(expected, key, value, keep)
        graph.replay()
    assert_same(actual, expected)
