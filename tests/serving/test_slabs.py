"""The worker's cache in slabs gives what a dense, masked cache gives, whatever runs together with what.

With TRITON_INTERPRET=1 the kernels do, in fewer steps.
"""

import itertools
import os
import random

import pytest
import torch

from spkv.cache.dense import DenseCache
from spkv.serving.chunks import groups
from spkv.serving.ledger import Ledger, Orders, SlabSizes
from spkv.serving.slabs import SlabCache, UseReader

LAYERS, HEADS, KV_HEADS, D, P = 2, 4, 2, 16, 4
STEPS = 12 if os.environ.get("TRITON_INTERPRET") == "1" else 60


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
    freed = side_by_side = 0
    for _ in range(STEPS):
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
        step = cache.begin(first_slabs)
        starts = [0, *itertools.accumulate(batch.values())]
        together = list(groups(starts, 0, torch.device("cpu")))
        side_by_side += sum(group.lengths is not None for group in together)
        for layer in range(LAYERS):
            query = torch.randn(starts[-1], HEADS, D)
            key, value = torch.randn(2, starts[-1], KV_HEADS, D)
            keep = torch.rand(starts[-1], KV_HEADS) < rng.choice([0.1, 0.5, 1.0])
            out = torch.empty_like(query)
            for group in together:
                new = [group.side_by_side(tensor) for tensor in (query, key, value, keep)]
                padding = dict(lengths=group.lengths, valid=group.valid)
                attended = step.attend(layer, group.requests, *new, **padding, scale=D**-0.5)
                out[group.tokens] = group.one_after_another(attended)
            for name, start, end in zip(batch, starts, starts[1:], strict=False):
                one = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value, keep))
                expected = oracles[name].attend(layer, *one, scale=D**-0.5)
                torch.testing.assert_close(out[start:end], expected[0].transpose(0, 1))
        step.end()
        report = uses.after(orders)
        if report is not None:
            for name, count in ledger.report(*report).items():
                free += [held[name].pop() for _ in range(count)]
                freed += count
        rng.shuffle(free)
    assert freed >= STEPS // 12
    assert side_by_side >= STEPS // 12
    assert ledger.totals()["slabs_returned"] == freed


def test_a_padded_step_is_as_one_that_is_not():
    outs, taken = [], []
    for padding in (0, 2):
        torch.manual_seed(0)
        cache, ledger = make(8, rows=2)
        for tokens in [20, *range(21, 80)]:
            held = 1 + ledger.totals()["slabs_held"]
            ledger.grant("a", tokens, list(range(held, held + ledger.missing("a", tokens))))
            cache.apply(ledger.orders())
            T = 20 if tokens == 20 else 1
            first_slabs = torch.tensor([1] + [0] * (padding if T == 1 else 0))
            step, B = cache.begin(first_slabs), len(first_slabs)
            for layer in range(LAYERS):
                own = torch.randn(1, HEADS + 2 * KV_HEADS, T, D)
                query, key, value = own.expand(B, -1, -1, -1).split([HEADS, KV_HEADS, KV_HEADS], 1)
                keep = (torch.rand(1, KV_HEADS, T) < 0.5).expand(B, -1, -1)
                outs.append(step.attend(layer, slice(0, B), query, key, value, keep, scale=1.0)[:1])
            step.end()
            assert not cache.seen[:, cache.padding_row].any()
            assert not cache.taken[cache.padding_row]
        taken.append(cache.taken[0].item())
    half = len(outs) // 2
    assert all(map(torch.equal, outs[:half], outs[half:]))
    assert taken[0] == taken[1] > 0


@pytest.mark.gpu
def test_a_step_replayed_from_a_graph_is_as_one_run_eagerly():
    """Requests come and go, are padded to one size, and read their prompts between replays."""
    size, P, D, kv_heads, most = 4, 16, 64, 2, 300
    caches, ledger = [], Ledger(SlabSizes(24, P, P, 0.5, 64))
    for _ in range(2):
        pool = torch.full((400 * LAYERS * kv_heads, 2, P, D), float("nan"), dtype=torch.bfloat16, device="cuda")
        caches.append(SlabCache(pool, LAYERS, kv_heads, 24, P, size, most))
    first_slabs = torch.zeros(size, 3, dtype=torch.int32, device="cuda")  # as vLLM's table of blocks
    new = torch.zeros(LAYERS, size, 2 * HEADS, 1, D, dtype=torch.bfloat16, device="cuda")
    keep = torch.zeros(LAYERS, size, kv_heads, 1, dtype=torch.bool, device="cuda")

    def run(cache, slabs, new, keep):
        step, outs = cache.begin(slabs), []
        for layer in range(LAYERS):
            query, key, value = new[layer].split([HEADS, kv_heads, kv_heads], 1)
            outs.append(step.attend(layer, slice(0, len(slabs)), query, key, value, keep[layer], scale=D**-0.5))
        step.end()
        return torch.stack(outs)

    run(caches[0], first_slabs[:, 0], new, keep)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(caches[0], first_slabs[:, 0], new, keep)
    rng, free, held, seen = random.Random(0), list(range(1, 400)), {}, {}
    for _ in range(60):
        for name in [name for name in held if rng.random() < 0.05 or seen[name] > most - 30]:
            free += held.pop(name)
            del seen[name]
            ledger.release(name)
        coming = [name for name in "abcd" if name not in held and rng.random() < 0.3]
        running = [name for name in held if rng.random() < 0.9]
        for names, tokens in ((coming, rng.randint(2, 60)), (running, 1)):
            for name in names:
                seen[name] = seen.get(name, 0) + tokens
                slabs = [free.pop() for _ in range(ledger.missing(name, seen[name]))]
                ledger.grant(name, seen[name], slabs)
                held[name] = held.get(name, []) + slabs
            orders = ledger.orders()
            firsts = torch.tensor([held[name][0] for name in names] + [0] * (size - len(names)), dtype=torch.int32)
            first_slabs[:, 0] = firsts.to("cuda")
            made = torch.randn(LAYERS, len(names), 2 * HEADS, tokens, D, device="cuda").bfloat16()
            kept = torch.rand(LAYERS, len(names), kv_heads, tokens, device="cuda") < 0.4
            outs = []
            for number, cache in enumerate(caches):
                cache.apply(orders)
                if names and tokens == 1:
                    new[:, : len(names)], keep[:, : len(names)] = made, kept
                    if number == 0:
                        graph.replay()
                    out = replayed if number == 0 else run(cache, first_slabs[:, 0], new, keep)
                    outs.append(out[:, : len(names)].clone())
                elif names:
                    outs.append(run(cache, first_slabs[: len(names), 0], made, kept))
            assert not names or torch.equal(*outs)
            used = {name: caches[1].slabs_of(int(caches[1].taken[row])) for name, row in orders.rows.items()}
            for name, count in ledger.report(orders.step, used).items():
                free += [held[name].pop() for _ in range(count)]
    assert torch.equal(caches[0].taken, caches[1].taken)


def test_uses_are_told_once_and_at_most_a_step_late():
    cache, _ = make(8)
    for late in (False, True):
        uses, told = UseReader(cache, late), []
        for step, rows in enumerate([{"a": 0}, {"a": 0, "b": 2}, {}, {}]):
            cache.taken[:3] = torch.tensor([step * cache.per_slab, 0, 1])
            told.append(uses.after(Orders(step, rows=rows)))
        expected = [(0, {"a": 0}), (1, {"a": 1, "b": 1}), None, None]
        assert told == ([None, *expected[:3]] if late else expected)
