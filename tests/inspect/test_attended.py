"""The strongest later queries, against attention weights computed at once."""

from __future__ import annotations

import pytest
import torch

from spkv.inspect.attended import LaterQueryFinder

W, T, H, HKV, D, K = 5, 60, 4, 2, 8, 3


def expected(query, key, keep, scale, softcap=None, sinks=None):
    """Weights past the window, [Hkv, T queries, T keys], of the strongest head of each group."""
    scores = query @ key.repeat_interleave(H // HKV, 0).transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    distance = torch.arange(T)[:, None] - torch.arange(T)
    open_ = keep.repeat_interleave(H // HKV, 0)[:, None] | (distance < W)
    scores = scores.masked_fill(~(open_ & (distance >= 0)), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, T, 1)], dim=-1)
    weights = scores.softmax(-1)[..., :T].masked_fill(distance < W, 0.0)
    return weights.view(HKV, H // HKV, T, T).amax(1)


@pytest.mark.parametrize(("chunk", "block_bytes"), [(60, 2**20), (7, 2**20), (60, 300), (13, 1)])
@pytest.mark.parametrize("extras", [{}, {"softcap": 2.0}, {"sinks": torch.tensor([1.0, -1.0, 2.0, 0.0])}])
def test_blocks_find_what_the_whole_shows(chunk, block_bytes, extras):
    query, key = torch.randn(H, T, D), torch.randn(HKV, T, D)
    keep = torch.rand(HKV, T) < 0.5
    finder = LaterQueryFinder(W, K, block_bytes)
    options = {"scale": 0.5, "softcap": None, "sinks": None, **extras}
    for layer in (3, 1):
        for start in range(0, T, chunk):
            part = slice(start, start + chunk)
            sign = 1 if layer == 1 else -1
            finder(layer, sign * query[None, :, part], key[None, :, part], keep[None, :, part], **options)
    found = finder.result()
    assert found.positions.shape == found.weights.shape == (2, HKV, T, K)
    for index, sign in enumerate((1, -1)):  # layers in order, whatever order they came in
        weights = expected(sign * query, key, keep, **options).transpose(1, 2)  # [Hkv, keys, queries]
        best, where = weights.topk(K, dim=-1)
        torch.testing.assert_close(found.weights[index], best, rtol=1e-5, atol=1e-7)
        assert torch.equal(found.positions[index], where.int().masked_fill(best == 0, -1))


def test_dropped_pairs_and_young_ones_have_no_later_query():
    finder = LaterQueryFinder(W, K)
    keep = torch.ones(1, HKV, T, dtype=torch.bool)
    keep[0, 1] = False
    finder(0, torch.randn(1, H, T, D), torch.randn(1, HKV, T, D), keep, scale=1.0, softcap=None, sinks=None)
    found = finder.result()
    assert (found.positions[0, 1] == -1).all()
    assert (found.positions[0, 0, T - W :] == -1).all()
    assert (found.positions[0, 0, : T - W - K, 0] >= W).all()


def test_a_batch_is_refused():
    with pytest.raises(ValueError, match="one text is followed at a time, not 2"):
        LaterQueryFinder(W)(0, torch.randn(2, H, 3, D), torch.randn(2, HKV, 3, D), torch.ones(2, HKV, 3).bool())
