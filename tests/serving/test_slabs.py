"""The worker's cache in slabs gives what a dense, masked cache gives, whatever runs together with what."""

import random

import pytest
import torch

from spkv.cache.dense import DenseCache
from spkv.serving.ledger import Ledger, Orders, SlabSizes
from spkv.serving.slabs import SlabCache, UseReader

LAYERS, HEADS, KV_HEADS, D, P = 2, 4, 2, 8, 4


def make(window, slab_tokens=8, rows=3, max_tokens=200, slabs=200):
    pages = slabs * LAYERS * KV_HEADS * (slab_tokens // P)
    pool = torch.full((pages, 2, P, D), float("nan"))
    ledger = Ledger(SlabSizes(window, P, slab_tokens, 0.5, 50))
    return SlabCache(pool, LAYERS, KV_HEADS, window, slab_tokens, rows, max_tokens), ledger


@pytest.mark.parametrize("window", [1, 8, 10])
@pytest.mark.parametrize("slab_tokens", [4, 8])
@pytest.mark.parametrize("late", [False, True])
def test_random_schedules_equal_the_dense_cache(window, slab_tokens, late):
    rng = random.Random(window)
    cache, ledger = make(window, slab_tokens)
    uses = UseReader(cache, late)
    free, held, oracles, seen = list(range(1, 200)), {}, {}, {}
    rng.shuffle(free)
    freed = 0
    for _ in range(60):
        for name in list(oracles):
            if seen[name] > 140:
                free += held.pop(name)
                del oracles[name], seen[name]
                ledger.release(name)
        batch = {name: rng.choice([1, 1, 1, rng.randint(2, 40)]) for name in "abc" if rng.random() < 0.8}
        for name, tokens in batch.items():
            oracles.setdefault(name, DenseCache(LAYERS, window))
            start = seen.get(name, 0)
            slabs = [free.pop() for _ in range(ledger.missing(name, start + tokens))]
            ledger.grant(name, start + tokens, slabs)
            held.setdefault(name, []).extend(slabs)
            seen[name] = start + tokens
        orders = ledger.orders()
        cache.apply(orders)
        batch = dict(sorted(batch.items(), key=lambda item: item[1]))
        first_slabs = torch.tensor([held[name][0] for name in batch], dtype=torch.int32)
        step = cache.begin(first_slabs, max((seen[name] for name in batch), default=0) + rng.choice([0, 1, 300]))
        for layer in range(LAYERS):
            for tokens in {*batch.values()}:
                names = [name for name in batch if batch[name] == tokens]
                B, first = len(names), [*batch].index(names[0])
                query = torch.randn(B, HEADS, tokens, D)
                key, value = torch.randn(2, B, KV_HEADS, tokens, D)
                keep = torch.rand(B, KV_HEADS, tokens) < rng.choice([0.1, 0.5, 1.0])
                out = step.attend(layer, slice(first, first + B), query, key, value, keep, scale=D**-0.5)
                for b, name in enumerate(names):
                    one = (tensor[b : b + 1] for tensor in (query, key, value, keep))
                    expected = oracles[name].attend(layer, *one, scale=D**-0.5)
                    torch.testing.assert_close(out[b : b + 1], expected)
        step.end()
        report = uses.after(orders)
        if report is not None:
            for name, count in ledger.report(*report).items():
                free += [held[name].pop() for _ in range(count)]
                freed += count
        rng.shuffle(free)
    assert freed > 10
    assert ledger.totals()["slabs_returned"] == freed


def test_a_step_filled_up_with_nobodys_requests_is_as_without():
    outs, taken = [], []
    for filled in (0, 2):
        torch.manual_seed(0)
        cache, ledger = make(8, rows=2)
        for tokens in [20, *range(21, 80)]:
            held = 1 + ledger.totals()["slabs_held"]
            ledger.grant("a", tokens, list(range(held, held + ledger.missing("a", tokens))))
            cache.apply(ledger.orders())
            T = 20 if tokens == 20 else 1
            first_slabs = torch.tensor([1] + [SlabCache.NOBODYS] * (filled if T == 1 else 0))
            step, B = cache.begin(first_slabs, 200), len(first_slabs)
            for layer in range(LAYERS):
                own = torch.randn(1, HEADS + 2 * KV_HEADS, T, D)
                query, key, value = own.expand(B, -1, -1, -1).split([HEADS, KV_HEADS, KV_HEADS], 1)
                keep = (torch.rand(1, KV_HEADS, T) < 0.5).expand(B, -1, -1)
                outs.append(step.attend(layer, slice(0, B), query, key, value, keep, scale=1.0)[:1])
            step.end()
            assert not cache.seen[:, cache.nobody].any()
            assert not cache.taken[cache.nobody]
        taken.append(cache.taken[0].item())
    half = len(outs) // 2
    assert all(map(torch.equal, outs[:half], outs[half:]))
    assert taken[0] == taken[1] > 0


def test_uses_are_told_once_and_at_most_a_step_late():
    cache, _ = make(8)
    for late in (False, True):
        uses, told = UseReader(cache, late), []
        for step, rows in enumerate([{"a": 0}, {"a": 0, "b": 2}, {}, {}]):
            cache.taken[:3] = torch.tensor([step * cache.per_slab, 0, 1])
            told.append(uses.after(Orders(step, rows=rows)))
        expected = [(0, {"a": 0}), (1, {"a": 1, "b": 1}), None, None]
        assert told == ([None, *expected[:3]] if late else expected)
