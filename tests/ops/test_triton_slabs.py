"""Pages of slabs, handed out by a kernel: what the serving cache's own way hands out."""

import copy
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spkv.serving.slabs import SlabCache

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from spkv.ops.triton.slabs import take_pages  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"


@settings(max_examples=30)
@given(data=st.data())
def test_tokens_take_the_pages_that_the_cache_would_take(data):
    layers, heads, P = (
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(1, 5)),
        data.draw(st.sampled_from([1, 4, 16])),
    )
    window, slab_tokens = data.draw(st.sampled_from([1, 7, 40, 257, 300])), P * data.draw(st.integers(1, 3))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    per_slab, rows = layers * heads * (slab_tokens // P), 3
    pool = torch.zeros(2800 * per_slab, 2, P, 4, device=DEVICE)
    cache = SlabCache(pool, layers, heads, window, slab_tokens, rows, max_tokens=600)
    slabs = 1 + torch.randperm(2799)[: rows * cache.slabs.shape[1]]  # the first is the null slab
    cache.slabs[:rows] = slabs.view(rows, -1).to(cache.slabs)
    cache.row_of_slab[cache.slabs[:rows, 0].long()] = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    cache.seen[:, :rows] = torch.tensor([data.draw(st.sampled_from([0, 1, 16, 40, 257, 299])) for _ in range(rows)])
    cache.kept[:] = torch.randint(0, 20, cache.kept.shape)
    cache.taken[:rows] = torch.randint(0, 2 * per_slab, (rows,))
    cache.ring_keep[:] = torch.rand(cache.ring_keep.shape) < 0.5
    order = torch.randperm(rows).to(DEVICE)
    twin = copy.deepcopy(cache)
    steps = [one.begin(cache.slabs[order, 0]) for one in (cache, twin)]
    tokens = data.draw(st.sampled_from([1, 2, 40, 41, 300]))
    keep = (torch.rand(rows, tokens, heads, device=DEVICE) < 0.5).transpose(1, 2)
    requests, layer = slice(0, rows), layers - 1
    packed = [step.layer(layer, requests) for step in steps]
    lengths = valid = None
    if data.draw(st.booleans()):
        lengths = torch.randint(1, tokens + 1, (rows,), dtype=torch.int32, device=DEVICE)
        valid = torch.arange(tokens, device=DEVICE) < lengths[:, None]
    take_pages(packed[0], keep, steps[0].slabs, steps[0].taken, cache.per_slab, lengths)
    steps[1]._take_pages(requests, packed[1], keep, valid)
    assert torch.equal(steps[0].taken, steps[1].taken)
    # The last column belongs to nobody.
    assert torch.equal(cache.table[..., :-1], twin.table[..., :-1])
