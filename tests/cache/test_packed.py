"""The packed cache against the dense oracle, and its memory."""

import copy
import gc
import os
import pickle
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spkv.cache.dense import DenseCache
from spkv.cache.packed import PackedCache
from spkv.cache.pages import PoolFullError
from spkv.ops.codec import codec

D = 4
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="Triton needs a GPU, or TRITON_INTERPRET=1"
)


class Text:
    """Random pairs of `layers` layers for B sequences of T tokens; a share of them kept."""

    def __init__(self, layers, B, Hkv, group, T, density, dtype=torch.float64, device="cpu", D=D):
        def draw(*shape):
            return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

        self.query = draw(layers, B, Hkv * group, T, D)
        self.key, self.value = draw(layers, B, Hkv, T, D), draw(layers, B, Hkv, T, D)
        self.keep = torch.rand(layers, B, Hkv, T, device=device) < density

    def chunk(self, layer, b, tokens):
        return tuple(t[layer, b, :, tokens] for t in (self.query, self.key, self.value, self.keep))


def oracle(text, layer, b, window, **options):
    cache = DenseCache(1, window)
    chunk = (t.unsqueeze(0) for t in text.chunk(layer, b, slice(None)))
    return cache.attend(0, *chunk, scale=0.5, **options)[0]


def coded_oracle(text, layer, b, window, page_dtype):
    """Attention in which queries past the window meet what the codes say."""
    query, key, value, keep = text.chunk(layer, b, slice(None))
    group = query.shape[0] // key.shape[0]
    key, value, keep = (t.repeat_interleave(group, 0) for t in (key, value, keep))
    index = torch.arange(query.shape[1])
    distance = index[:, None] - index
    near, far = (distance >= 0) & (distance < window), (distance >= window) & keep[:, None]
    far_key, far_value = codec(page_dtype).round(key), codec(page_dtype).round(value)
    scores = torch.where(near, query @ key.mT, query @ far_key.mT) * 0.5
    weights = scores.masked_fill(~(near | far), float("-inf")).softmax(-1)
    return (weights * near) @ value + (weights * far) @ far_value


def poison(cache):
    """Fill every slot that holds nothing with NaN."""
    P = cache.page_size
    slot = torch.arange(cache.table.shape[2] * P)
    ring = slot < cache.seen.clamp_max(cache.window).repeat_interleave(cache.kv_heads, 1)[..., None]
    kept = (slot >= cache.ring_pages * P) & (slot < cache.ring_pages * P + cache.kept[..., None])
    layer, chain, slot = (ring | kept).nonzero(as_tuple=True)
    times_held = torch.zeros(cache.pool.budget.capacity, P, dtype=torch.long)
    times_held.index_put_((cache.table[layer, chain, slot // P].long(), slot % P), torch.tensor(1), accumulate=True)
    assert times_held.max() <= 1, "two pairs share a slot"
    cache.pool.pages.transpose(1, 2)[times_held == 0] = float("nan")


def pages_held(cache):
    """Pages that chains need, and no two share."""
    ids = cache.table[cache._columns_in_use(list(range(cache.sequences)))]
    assert ids.unique().numel() == ids.numel()
    return ids.numel()


def run(cache, text, schedule, *, poisoned=True, ahead=False, **options):
    """Feed sequences by a schedule of [tokens of each sequence per step]; returns outputs [layers][B][H, T, D]."""
    layers, B = text.key.shape[:2]
    outputs = [[[] for _ in range(B)] for _ in range(layers)]
    done = [0] * B
    for counts in schedule:
        width = max(counts)
        valid = torch.tensor(
            [[column >= width - n for column in range(width)] for n in counts], device=text.query.device
        )
        padding = None if bool(valid.all()) else valid
        for layer in range(layers):
            chunks = []
            for b, n in enumerate(counts):
                tensors = text.chunk(layer, b, slice(done[b], done[b] + n))
                chunks.append([torch.cat([t.new_zeros(t.shape[0], width - n, *t.shape[2:]), t], 1) for t in tensors])
            query, key, value, keep = (torch.stack(parts) for parts in zip(*chunks, strict=True))
            if ahead and cache.sequences:
                cache.expect(layer, keep, padding)
            out = cache.attend(layer, query, key, value, keep, padding, scale=0.5, **options)
            for b, n in enumerate(counts):
                outputs[layer][b].append(out[b, :, width - n :])
        done = [d + n for d, n in zip(done, counts, strict=True)]
        if poisoned:
            poison(cache)
    return [[torch.cat(o, 1) for o in by_layer] for by_layer in outputs]


@st.composite
def schedules(draw, B):
    """Steps of equal chunks, single tokens, and chunks of different lengths with padding in front."""
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["even", "token", "ragged"]))
        if kind == "token":
            steps += [[1] * B] * draw(st.integers(1, 9))
        elif kind == "even":
            steps.append([draw(st.integers(1, 24))] * B)
        else:
            counts = [draw(st.integers(0, 24)) for _ in range(B)]
            steps.append(counts if max(counts) else [1] * B)
    return steps


@settings(max_examples=30)
@given(data=st.data())
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_any_schedule_gives_what_the_oracle_gives(data, implementation):
    B, Hkv, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    window, page_size = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 4, 16]))
    density = data.draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    options = {"softcap": data.draw(st.sampled_from([None, 2.0]))}
    if data.draw(st.booleans()):
        options["sinks"] = torch.randn(Hkv * group, dtype=torch.float64)
    schedule = data.draw(schedules(B))
    totals = [sum(step[b] for step in schedule) for b in range(B)]
    text = Text(2, B, Hkv, group, max(totals), density)
    cache = PackedCache(2, Hkv, window, page_size)
    outputs = run(cache, text, schedule, implementation=implementation, **options)
    for layer in range(2):
        for b, total in enumerate(totals):
            expected = oracle(text, layer, b, window, **options)[:, :total]
            torch.testing.assert_close(outputs[layer][b], expected, rtol=1e-9, atol=1e-10)
            kept = text.keep[layer, b, :, : max(0, total - window)].sum(-1)
            assert cache.kept_pairs()[layer, b].tolist() == kept.tolist()
    assert cache.pages_in_use() == pages_held(cache)


@settings(max_examples=20)
@given(data=st.data(), page_dtype=st.sampled_from([None, (None, "int8")]))
def test_asking_ahead_changes_nothing(data, page_dtype):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    B = data.draw(st.integers(1, 3))
    schedule = data.draw(schedules(B))
    text = Text(2, B, 2, 1, max(sum(counts) for counts in zip(*schedule, strict=True)), 0.4)
    caches = [PackedCache(2, 2, window=5, page_size=4, page_dtype=page_dtype) for _ in range(2)]
    first, second = (
        run(c, text, schedule, poisoned=False, ahead=a) for c, a in zip(caches, (True, False), strict=True)
    )
    assert all(torch.equal(a, b) for layers in zip(first, second, strict=True) for a, b in zip(*layers, strict=True))
    assert caches[0].nbytes == caches[1].nbytes
    assert caches[0].pages_in_use() == caches[1].pages_in_use()


@pytest.mark.parametrize("counts", [(40, 40), (40, 23)])
def test_pairs_made_elsewhere_are_held_as_if_attended(counts):
    text = Text(layers=2, B=2, Hkv=2, group=3, T=50, density=0.4)
    attended, appended = (PackedCache(2, 2, window=5, page_size=4) for _ in range(2))
    run(attended, text, [counts])
    valid = torch.arange(40) >= 40 - torch.tensor(counts)[:, None]
    padded = [torch.zeros_like(t[:, :, :, :40]) for t in (text.key, text.value, text.keep)]
    for b, n in enumerate(counts):
        for to, source in zip(padded, (text.key, text.value, text.keep), strict=True):
            to[:, b, :, 40 - n :] = source[:, b, :, :n]
    for layer in range(2):
        appended.append(layer, *(t[layer] for t in padded), valid, group=3)
    assert torch.equal(appended.kept, attended.kept)
    assert torch.equal(appended.seen, attended.seen)
    poison(appended)
    for b, n in enumerate(counts):
        following = (t.unsqueeze(0) for t in text.chunk(1, b, slice(n, n + 3)))
        out = appended.attend(1, *following, sequences=slice(b, b + 1), scale=0.5)
        torch.testing.assert_close(out[0], oracle(text, 1, b, 5)[:, n : n + 3])
    with pytest.raises(ValueError, match="holds 2 sequences of 2 KV heads, but was given 1 of 2"):
        appended.append(0, *(t[0, :1] for t in padded), group=3)


@pytest.mark.parametrize("other", ["keep", "layer", "later"])
def test_an_answer_to_another_question_is_not_used(other):
    text = Text(2, 1, 2, 1, 60, 0.5)
    cache = PackedCache(2, 2, window=4, page_size=4)

    def attend(layer, start, stop):
        query, key, value, keep = (t[None] for t in text.chunk(layer, 0, slice(start, stop)))
        return cache.attend(layer, query, key, value, keep, scale=0.5)

    attend(0, 0, 20)
    attend(1, 0, 20)
    cache.expect(1 if other == "layer" else 0, torch.zeros(1, 2, 20, dtype=torch.bool))
    if other == "later":
        attend(0, 20, 30)
        attend(0, 30, 60)
    else:
        attend(0, 20, 60)
    torch.testing.assert_close(cache.kept[0], text.keep[0, 0, :, :56].sum(1).int())
    assert cache.pool.free_count() >= 0


@pytest.mark.gpu
@pytest.mark.parametrize("page_dtype", [None, "int8"])
def test_asked_ahead_a_chunk_does_not_wait_for_the_device(page_dtype):
    text = Text(1, 2, 2, 1, 3000, 0.5, torch.bfloat16, "cuda", 64)
    cache = PackedCache(1, 2, window=16, page_dtype=page_dtype)
    with torch.no_grad():
        for start in range(0, 3000, 1000):
            query, key, value, keep = (
                t[0, :, :, start : start + 1000] for t in (text.query, text.key, text.value, text.keep)
            )
            if start:
                cache.expect(0, keep)
                torch.cuda.set_sync_debug_mode("error")
            try:
                cache.attend(0, query, key, value, keep, scale=0.125)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(cache.kept[0].view(2, 2), text.keep[0, :, :, : 3000 - 16].sum(-1).int())


@settings(max_examples=15)
@given(data=st.data())
@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("page_dtype", ["int8", "fp8", "int4", (None, "int4"), ("int4", "fp8")])
def test_any_schedule_over_coded_pages_gives_one_answer(data, implementation, page_dtype):
    B, Hkv, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    window, page_size = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([4, 16]))
    schedule = data.draw(schedules(B))
    totals = [sum(step[b] for step in schedule) for b in range(B)]
    text = Text(2, B, Hkv, group, max(totals), data.draw(st.sampled_from([0.0, 0.5, 1.0])), D=64)
    cache = PackedCache(2, Hkv, window, page_size, page_dtype=page_dtype)
    outputs = run(cache, text, schedule, poisoned=False, implementation=implementation)
    for layer in range(2):
        for b, total in enumerate(totals):
            own = page_dtype if isinstance(page_dtype, str) else page_dtype[layer]
            expected = (oracle if own is None else partial(coded_oracle, page_dtype=own))(text, layer, b, window)
            torch.testing.assert_close(outputs[layer][b], expected[:, :total], rtol=1e-9, atol=1e-10)
    assert cache.pages_in_use() == int(cache._columns_in_use(list(range(B))).sum())
    other = copy.deepcopy(cache)
    other.select(torch.tensor([0] * B + [0]))
    other.drop([0])
    assert other.pages_in_use() == int(other._columns_in_use(list(range(B + 1))).sum())
    token = [t[0, :1, :, :1] for t in (text.query, text.key, text.value, text.keep)]
    answer = cache.attend(0, *(t.expand(B, *t.shape[1:]) for t in token), scale=0.5)[0]
    copied = other.attend(0, *(t.expand(B + 1, *t.shape[1:]) for t in token), scale=0.5)[B]
    torch.testing.assert_close(copied, answer, rtol=1e-12, atol=1e-12)


def test_coded_pages_shrink_memory_and_wrong_ones_are_refused():
    T, D = 4096, 128
    text = Text(1, 1, 2, 1, T, 0.25, torch.bfloat16, D=D)
    dense_bytes = 2 * text.key.numel() * 2
    for page_dtype, factor in ((None, 3.4), ("int8", 6.0), ("int4", 8.8)):
        cache = PackedCache(1, 2, 128, page_dtype=page_dtype)
        run(cache, text, [[1024]] * 4, poisoned=False)
        assert dense_bytes / cache.nbytes >= factor
        assert cache.nbytes == sum(
            t.untyped_storage().nbytes()
            for owner in (cache, *cache.pools.values())
            for t in vars(owner).values()
            if isinstance(t, torch.Tensor)
        )
    with pytest.raises(ValueError, match=r"have page_dtypes \('int4',\), and those of this cache \('int8',\)"):
        PackedCache(1, 2, 128, page_dtype="int8").load_state(cache.state())
    with pytest.raises(ValueError, match="one of int8, fp8, int4, .* not 'int3'"):
        PackedCache(1, 2, 128, page_dtype="int3")
    with pytest.raises(ValueError, match="page_dtype has 2 entries, and the cache has 3 layers"):
        PackedCache(3, 2, 128, page_dtype=(None, "int8"))
    with pytest.raises(ValueError, match="multiples of 64, not 4"):
        run(PackedCache(1, 1, 4, page_dtype="int4"), Text(1, 1, 1, 1, 4, 1.0), [[4]], poisoned=False)
    bounded = PackedCache(1, 2, 128, page_dtype="int4", max_memory=2 * 8 * 2 * 16 * D * 2 + 100 * 2560)
    with pytest.raises(PoolFullError, match="bytes are left; raise max_memory"):
        run(bounded, text, [[1024]] * 4, poisoned=False)
    with pytest.raises(ValueError, match="max_memory is 1000 bytes, and a page takes 2560 beside the windows'"):
        run(PackedCache(1, 2, 128, page_dtype="int4", max_memory=1000), text, [[8]], poisoned=False)
    other = PackedCache(1, 2, 128, page_dtype="fp8")
    run(other, text, [[200]], poisoned=False)
    with pytest.raises(ValueError, match=r"have page_dtypes \('fp8',\), and those of this cache \('int8',\)"):
        PackedCache(1, 2, 128, page_dtype="int8").load_state(other.state())
    more = PackedCache(1, 2, 128, page_dtype="int8", max_memory=3 * 2 * 8 * 2 * 16 * D * 2 + 60 * 4160)
    run(more, text, [[300]], poisoned=False)
    more.select(torch.tensor([0, 0, 0]))
    assert more.pages_in_use() == int(more._columns_in_use([0, 1, 2]).sum())


@settings(max_examples=25)
@given(
    window=st.integers(1, 20),
    before=st.integers(1, 60),
    indices=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    seed=st.integers(0, 999),
)
def test_selected_sequences_continue_as_their_sources_and_no_page_leaks(window, before, indices, seed):
    torch.manual_seed(seed)
    text = Text(2, 3, 2, 1, before + 30, 0.4)
    cache = PackedCache(2, 2, window, 4)
    run(cache, text, [[before] * 3])
    cache.select(torch.tensor(indices))
    poison(cache)
    continued = Text(2, len(indices), 2, 1, 1, 0.4)
    for name in ("query", "key", "value", "keep"):
        setattr(continued, name, getattr(text, name)[:, indices])
    outputs = [
        [cache.attend(layer, *(t[:, :, before + i, None] for t in parts), scale=0.5) for i in range(30)]
        for layer, parts in enumerate(zip(continued.query, continued.key, continued.value, continued.keep, strict=True))
    ]
    for layer in range(2):
        for b, source in enumerate(indices):
            expected = oracle(text, layer, source, window)[:, before:]
            actual = torch.cat([out[b] for out in outputs[layer]], dim=1)
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    assert cache.pages_in_use() == pages_held(cache)


def test_a_cache_is_freed_with_its_last_reference():
    gc.disable()
    try:
        cache = PackedCache(2, 2, 8, 4)
        run(cache, Text(2, 2, 2, 2, 50, 0.3), [[40, 40]])
        pages = weakref.ref(cache.pool.pages)
        del cache
        assert pages() is None
    finally:
        gc.enable()


def test_what_fails_in_the_middle_leaves_no_page_that_is_not_there(monkeypatch):
    """Memory that runs out where a pool grows, where a state is loaded, and where pairs are written."""
    text = Text(1, 2, 2, 1, 100, 1.0, D=64)
    cache = PackedCache(1, 2, 8, 4, page_dtype="int8")
    run(cache, text, [[20, 20]], poisoned=False)

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no more")

    chunk = [t[0, :1, :, 20:60] for t in (text.query, text.key, text.value, text.keep)]
    for place in ("pool.PagePool._allocate", "packed.write"):
        with monkeypatch.context() as patched:
            patched.setattr(f"spkv.cache.{place}", out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                cache.attend(0, *chunk, sequences=slice(0, 1))
        assert all(pool.budget.free <= pool.free_count() for pool in cache.pools.values())
        with pytest.raises(PoolFullError, match=r"left sequences \[0\] incomplete"):
            cache.attend(0, *chunk, sequences=slice(0, 1))
        cache.drop([0])
        rest = [t[0, 1:, :, 20:21] for t in (text.query, text.key, text.value, text.keep)]
        cache.attend(0, *rest, sequences=slice(1, 2))
        assert cache.pages_in_use() == int(cache._columns_in_use([0, 1]).sum())
    other = PackedCache(1, 2, 8, 4, page_dtype="int8")
    with monkeypatch.context() as patched:
        patched.setattr("spkv.cache.pool.PagePool.scatter", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            other.load_state(cache.state())
    assert other.sequences == 0


def test_a_dropped_sequence_makes_room_for_another_of_the_same_kind_of_pages():
    text = Text(1, 2, 1, 1, 400, 1.0, torch.float32, D=64)
    cache = PackedCache(1, 1, 8, 4, page_dtype="int8", max_memory=20_000)
    cache.allocate(text.key[0])
    parts = (text.query, text.key, text.value, text.keep)
    for start in range(0, 80, 20):
        cache.attend(0, *(t[0, :1, :, start : start + 20] for t in parts), sequences=slice(0, 1))
    with pytest.raises(PoolFullError):
        cache.attend(0, *(t[0, :1, :, 80:] for t in parts), sequences=slice(0, 1))
    cache.drop([0])
    for b in range(2):
        cache.attend(0, *(t[0, b : b + 1, :, :20] for t in parts), sequences=slice(b, b + 1))
    assert cache.seen.tolist() == [[20, 20]]
    with pytest.raises(ValueError, match="max_memory is 5000 bytes, and a page takes .* beside the windows' .* bytes"):
        PackedCache(1, 1, 8, 4, page_dtype="int8", max_memory=5000).allocate(text.key[0])


def test_a_state_round_trip_continues_alike_and_is_compact():
    text = Text(2, 2, 2, 2, 50, 0.3)
    cache, other = PackedCache(2, 2, 8, 4), PackedCache(2, 2, 8, 4)
    run(cache, text, [[40, 40]])
    other.load_state(cache.state())
    assert other.pool.budget.capacity == cache.pages_in_use() == other.pages_in_use()
    for i in range(40, 50):
        chunk = [t[0, :, :, i : i + 1] for t in (text.query, text.key, text.value, text.keep)]
        assert torch.equal(cache.attend(0, *chunk, scale=0.5), other.attend(0, *chunk, scale=0.5))
    assert PackedCache(2, 2, 8, 4).state() == {}
    with pytest.raises(
        ValueError,
        match="the state has 2 layers, 2 KV heads, window 8 .* this cache has .* window 9",
    ):
        PackedCache(2, 2, 9, 4).load_state(cache.state())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_continue_alike_and_share_nothing(duplicate):
    text = Text(2, 2, 2, 2, 50, 0.3)
    cache = PackedCache(2, 2, 8, 4)
    assert duplicate(cache).sequences == 0
    run(cache, text, [[40, 40]])
    other = duplicate(cache)
    for i in range(40, 50):
        chunk = [t[0, :, :, i : i + 1] for t in (text.query, text.key, text.value, text.keep)]
        assert torch.equal(cache.attend(0, *chunk, scale=0.5), other.attend(0, *chunk, scale=0.5))
    cache.reset()
    assert other.pages_in_use() == pages_held(other)


def test_a_state_beyond_the_limit_leaves_an_empty_cache():
    text = Text(1, 1, 1, 1, 40, 1.0)
    cache = PackedCache(1, 1, 8, 4)
    run(cache, text, [[40]], poisoned=False)
    small = PackedCache(1, 1, 8, 4, max_memory=5 * 2 * 4 * D * 8)
    with pytest.raises(PoolFullError, match="10 more pages .* 1280 of max_memory's 1280 bytes"):
        small.load_state(cache.state())
    assert small.sequences == 0
    run(small, text, [[8]], poisoned=False)


def test_moves_never_come_back_to_a_number_and_dropping_twice_is_dropping_once():
    text = Text(1, 3, 1, 1, 40, 1.0)
    cache, seen = PackedCache(1, 1, 8, 4), set()
    for _ in range(3):
        assert cache.moves not in seen
        seen.add(cache.moves)
        run(cache, text, [[40] * 3], poisoned=False)
        cache.drop([1, 1, 2])
        assert cache.pages_in_use() == pages_held(cache)
        assert cache.pool.budget.free <= cache.pool.free_count()
        assert cache.moves not in seen
        seen.add(cache.moves)
        cache.reset()


def test_a_chunk_after_single_tokens_gets_the_pages_set_aside_for_more_of_them():
    text = Text(2, 1, 2, 1, 60, 1.0)
    # Per layer and head: 4 pages for the ring, 10 for the 40 pairs that have left it in the end.
    cache = PackedCache(2, 2, 16, 4, max_memory=2 * 2 * 14 * 2 * 4 * D * 8)
    run(cache, text, [[20]] + [[1]] * 5 + [[31]], poisoned=False)
    assert cache.pages_in_use() == cache.pool.budget.capacity == 2 * 2 * 14


def test_memory_follows_density_and_is_what_the_tensors_hold():
    T, density = 8192, 0.25
    text = Text(2, 1, 4, 1, T, density, dtype=torch.float32)
    text.query, text.key, text.value = (t.repeat(1, 1, 1, 1, 16) for t in (text.query, text.key, text.value))
    cache = PackedCache(2, 4, 128)
    for layer in range(2):
        for start in range(0, T, 2048):
            chunk = [t[layer, :, :, start : start + 2048] for t in (text.query, text.key, text.value, text.keep)]
            cache.attend(layer, *chunk, scale=0.5)
    dense_bytes = 2 * text.key.numel() * text.key.element_size()
    held = int(cache.kept_pairs().sum()) + 2 * 4 * 128
    assert held / (2 * 4 * T) <= 0.27
    assert cache.nbytes <= 0.27 * dense_bytes
    tensors = [v for owner in (cache, cache.pool) for v in vars(owner).values() if isinstance(v, torch.Tensor)]
    assert cache.nbytes == sum(t.untyped_storage().nbytes() for t in tensors)
    pages_bytes = cache.pool.budget.capacity * cache.pool.page_bytes
    assert pages_bytes / (held * 2 * 64 * 4) <= 1.05


def test_a_full_pool_says_so_and_leaves_the_layer_as_it_was():
    text = Text(1, 1, 1, 1, 64, 1.0, dtype=torch.float32)
    cache = PackedCache(1, 1, 16, 4, max_memory=10 * 2 * 4 * D * 4)
    run(cache, text, [[36]], poisoned=False)
    before = cache.state()
    with pytest.raises(PoolFullError, match="6 more pages .* bytes are left; raise max_memory"):
        cache.attend(0, *(t[0, :, :, 36:60] for t in (text.query, text.key, text.value, text.keep)), scale=0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cache.state().items())
    with pytest.raises(ValueError, match="max_memory is 10 bytes, and a page takes"):
        run(PackedCache(1, 1, 16, 4, max_memory=10), text, [[1]], poisoned=False)


def test_a_sequence_dropped_from_a_full_pool_leaves_the_others_as_they_were():
    text = Text(2, 2, 1, 1, 64, 1.0)
    # Both sequences: 4 pages for the ring, 5 for the 20 kept pairs of each layer; 3 pages are left.
    cache = PackedCache(2, 1, 16, 4, max_memory=(2 * 2 * 9 + 3) * 2 * 4 * D * 8)
    run(cache, text, [[36, 36]], poisoned=False)
    chunk = [t[:, :1, :, 36:48] for t in (text.query, text.key, text.value, text.keep)]
    cache.attend(0, *(t[0] for t in chunk), scale=0.5, sequences=slice(0, 1))
    with pytest.raises(PoolFullError, match="3 more pages .* 0 of max_memory's 9984"):
        cache.attend(1, *(t[1] for t in chunk), scale=0.5, sequences=slice(0, 1))
    token = [t[0, :, :, 36:37] for t in (text.query, text.key, text.value, text.keep)]
    with pytest.raises(PoolFullError, match=r"left sequences \[0\] incomplete: drop them"):
        cache.attend(0, *token, scale=0.5)
    with pytest.raises(PoolFullError, match=r"left sequences \[0\] incomplete: drop them"):
        cache.prepare(1)
    cache.drop([0])
    assert cache.pages_in_use() == pages_held(cache) == 2 * 9
    chunk = [t[:, 1:, :, 36:48] for t in (text.query, text.key, text.value, text.keep)]
    for layer in range(2):
        actual = cache.attend(layer, *(t[layer] for t in chunk), scale=0.5, sequences=slice(1, 2))
        torch.testing.assert_close(actual[0], oracle(text, layer, 1, 16)[:, 36:48], rtol=1e-9, atol=1e-10)


def prepare_or_none(cache, tokens):
    try:
        return cache.prepare(tokens)
    except PoolFullError:
        return None


def test_after_prepare_single_tokens_always_fit_and_a_pool_too_full_says_so_before_anything_changes():
    T, layers = 200, 3
    text = Text(layers, 2, 2, 1, T, 0.5)
    cache = PackedCache(layers, 2, 16, 4, max_memory=170 * 2 * 4 * D * 8)
    run(cache, text, [[30, 30]], poisoned=False)
    done = 30
    while steps := prepare_or_none(cache, 7):
        assert steps <= 7
        for t in range(done, done + steps):
            for layer in range(layers):
                chunk = [x[layer, :, :, t : t + 1] for x in (text.query, text.key, text.value, text.keep)]
                out = cache.attend(layer, *chunk, scale=0.5)
                expected = torch.stack([oracle(text, layer, b, 16)[:, t : t + 1] for b in range(2)])
                torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
        done += steps
    with pytest.raises(PoolFullError, match="1 more pages .* 0 of max_memory's"):
        cache.prepare(1)
    # A step of two sequences takes 12 pages at most.
    assert cache.pool.budget.capacity == 170
    assert cache.pool.free_count() < 12
    assert cache.seen.tolist() == [[done, done]] * layers
    cache.drop([0])
    assert cache.prepare(1) == 1


@settings(max_examples=20)
@given(data=st.data())
def test_sequences_come_continue_and_go_at_any_time_and_no_page_leaks(data):
    layers, places, window = 2, 3, data.draw(st.integers(1, 12))
    texts = [Text(layers, 1, 2, 1, 120, 0.4) for _ in range(8)]
    cache = PackedCache(layers, 2, window, 4, max_memory=400 * 2 * 4 * D * 8)
    cache.allocate(texts[0].key[0].expand(places, -1, -1, -1))
    running = [None] * places  # (number of the text, tokens done)
    arrived = 0
    for _ in range(data.draw(st.integers(1, 12))):
        b = data.draw(st.integers(0, places - 1))
        if running[b] is None and arrived < len(texts):
            running[b], arrived = (arrived, 0), arrived + 1
        elif running[b] is not None and (data.draw(st.booleans()) or running[b][1] > 60):
            cache.drop([b])
            running[b] = None
        # One sequence reads a chunk; then all that run take a token each.
        count = data.draw(st.integers(1, 20))
        for rows, tokens in (([b], count), (list(range(places)), 1)):
            valid = torch.tensor([[running[r] is not None] for r in rows])
            for layer in range(layers):
                parts = []
                for r in rows:
                    n, done = running[r] or (0, 0)
                    parts.append(texts[n].chunk(layer, slice(0, 1), slice(done, done + tokens)))
                query, key, value, keep = (torch.cat(p) for p in zip(*parts, strict=True))
                padding = None if bool(valid.all()) else valid.expand(-1, tokens)
                out = cache.attend(
                    layer, query, key, value, keep, padding, scale=0.5, sequences=slice(rows[0], rows[-1] + 1)
                )
                for i, r in enumerate(rows):
                    if running[r] is not None:
                        n, done = running[r]
                        expected = oracle(texts[n], layer, 0, window)[:, done : done + tokens]
                        torch.testing.assert_close(out[i], expected, rtol=1e-9, atol=1e-10)
            for r in rows:
                if running[r] is not None:
                    running[r] = (running[r][0], running[r][1] + tokens)
        assert cache.pages_in_use() == pages_held(cache)


def soak(steps, device, page_dtype=None):
    """Decode steps of sequences that come and go in eight places, each read in a chunk when it comes."""
    layers, places, Hkv, T = 2, 8, 2, 40
    text = Text(layers, places, Hkv, 1, T, 0.4, torch.float32, device, D=64)
    cache = PackedCache(layers, Hkv, 16, 4, page_dtype=page_dtype)
    cache.allocate(text.key[0])
    lengths = [0] * places
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for step in range(steps):
            b = int(torch.randint(places, (), generator=generator))
            fate = float(torch.rand((), generator=generator))
            if fate < 0.1 or lengths[b] > 300:
                cache.drop([b])
                lengths[b] = 0
            elif fate < 0.2 and not lengths[b]:
                lengths[b] = T
                for layer in range(layers):
                    chunk = [t[layer, b : b + 1] for t in (text.query, text.key, text.value, text.keep)]
                    cache.attend(layer, *chunk, sequences=slice(b, b + 1))
            cache.prepare(1)
            running = torch.tensor([[n > 0] for n in lengths], device=device)
            for layer in range(layers):
                parts = (text.query, text.key, text.value, text.keep)
                cache.attend(layer, *(t[layer, :, :, step % T, None] for t in parts), running)
            lengths = [n + (n > 0) for n in lengths]
            if step % 100 == 0 or step == steps - 1:
                assert cache.seen.tolist() == [lengths] * layers
                assert cache.pages_in_use() == int(cache._columns_in_use(list(range(places))).sum())
                assert all(pool.budget.free <= pool.free_count() for pool in cache.pools.values())
    cache.drop(list(range(places)))
    assert cache.pages_in_use() == 0


@pytest.mark.parametrize("page_dtype", [None, "int8", (None, "int4")])
def test_sequences_that_come_and_go_leak_no_page(page_dtype):
    soak(300, "cpu", page_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("page_dtype", [None, "int8", ("int4", None)])
def test_sequences_that_come_and_go_for_30_thousand_steps_leak_no_page(page_dtype):
    soak(30_000, "cuda", page_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("page_dtype", [None, "int8", "fp8", "int4"])
def test_the_allocator_agrees_with_nbytes(page_dtype):
    T, D = 8192, 128
    text = Text(1, 1, 4, 1, T, 0.25, torch.bfloat16, "cuda", D=D)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache = PackedCache(1, 4, 128, page_dtype=page_dtype)
    with torch.no_grad():
        for start in range(0, T, 1024):
            chunk = [t[0, :, :, start : start + 1024] for t in (text.query, text.key, text.value, text.keep)]
            cache.attend(0, *chunk)
    tensors = sum(len(pool._slabs) + 2 for pool in cache.pools.values()) + 4
    # The allocator rounds each tensor up to 512 bytes.
    assert 0 <= torch.cuda.memory_allocated() - before - cache.nbytes <= 512 * tensors


def test_pairs_that_do_not_fit_are_refused():
    text = Text(1, 2, 2, 1, 8, 0.5)
    cache = PackedCache(1, 2, 4)
    run(cache, text, [[4, 4]], poisoned=False)
    query, key, value, keep = (t[0, :, :, 4:] for t in (text.query, text.key, text.value, text.keep))
    with pytest.raises(ValueError, match="holds 2 sequences of 2 KV heads, but was given 1 of 2"):
        cache.attend(0, query[:1], key[:1], value[:1], keep[:1])
    with pytest.raises(TypeError, match=r"key is torch.float32, but the cache holds torch.float64"):
        cache.attend(0, query.float(), key.float(), value.float(), keep)
    with pytest.raises(TypeError, match=r"keep must be bool, not torch.int64"):
        cache.attend(0, query, key, value, keep.long())
    with pytest.raises(ValueError, match="sequence indices must lie in 0 to 1"):
        cache.select(torch.tensor([0, 2]))


def test_a_layer_is_empty_until_anything_may_have_been_written():
    text = Text(2, 1, 2, 1, 9, 0.5)

    def empty(cache):
        return cache._reservation.empty

    cache, other, stepped = (PackedCache(2, 2, 4, 4) for _ in range(3))
    cache.allocate(text.key[0])
    assert empty(cache) == [True, True]
    cache.attend(0, *text.chunk(0, slice(0, 1), slice(0, 3)))
    assert empty(cache) == [False, True]
    other.load_state(cache.state())
    assert empty(other) == [False, False]
    stepped.allocate(text.key[0])
    stepped.prepare(1)
    with stepped.uncounted():
        stepped.attend(0, *text.chunk(0, slice(0, 1), slice(0, 1)))
    assert empty(stepped) == [True, True]
    stepped.spend(1)  # as if a graph had been replayed
    assert empty(stepped) == [False, False]
    cache.reset()
    cache.allocate(text.key[0])
    assert empty(cache) == [True, True]


def test_reset_frees_everything():
    text = Text(1, 1, 1, 1, 40, 0.5)
    cache = PackedCache(1, 1, 4)
    run(cache, text, [[40]], poisoned=False)
    assert cache.nbytes > 0
    cache.reset()
    assert cache.nbytes == 0
    assert cache.sequences == 0


class Arena:
    """Slabs from one tensor, the last ones first and off by some bytes.

    The CPU's own allocator may put slabs too far apart for 32-bit ids.
    """

    def __init__(self, pool):
        self.shape, self.memory = pool.pages.shape[1:], pool.pages.new_empty(2**22)
        self.end = self.memory.numel()

    def __call__(self, count):
        size = count * self.shape.numel()
        self.end -= size + 16
        assert self.end > 0
        return self.memory[self.end : self.end + size].view(count, *self.shape)


@needs_triton
@settings(max_examples=3 if INTERPRETED else 20)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float16]))
@pytest.mark.parametrize("page_dtype", [None, "int8"])
def test_slabs_hold_what_one_tensor_holds(data, dtype, page_dtype):
    B, Hkv, window = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 30))
    schedule = data.draw(schedules(B))
    totals = [sum(step[b] for step in schedule) for b in range(B)]
    text = Text(2, B, Hkv, 2, max(totals), 0.5, dtype, "cuda" if torch.cuda.is_available() else "cpu")
    caches = {slabs: PackedCache(2, Hkv, window, 16, page_dtype=page_dtype, slabs=slabs) for slabs in (True, False)}
    for cache in caches.values():
        cache.allocate(text.key[0])
    if INTERPRETED:
        for pool in caches[True].pools.values():
            pool._allocate = Arena(pool)
    in_slabs, in_one = (run(cache, text, schedule, poisoned=False) for cache in caches.values())
    for layer in range(2):
        for b in range(B):
            assert torch.equal(in_slabs[layer][b], in_one[layer][b])
    kept = caches[True].pools[page_dtype]
    assert len(kept._slabs) > 1 or kept.budget.capacity == kept.in_use()
    assert caches[True].pages_in_use() == caches[False].pages_in_use()
    assert caches[True].pages_in_use() == int(caches[True]._columns_in_use(list(range(B))).sum())
    for one, other in zip(caches[True].state().values(), caches[False].state().values(), strict=True):
        assert one.shape == other.shape
    other = PackedCache(2, Hkv, window, 16, page_dtype=page_dtype, slabs=False)
    other.load_state(caches[True].state())
    step = [t[:, :, :, :1] for t in (text.query, text.key, text.value, text.keep)]
    for layer in range(2):
        chunk = [t[layer] for t in step]
        assert torch.equal(caches[True].attend(layer, *chunk), other.attend(layer, *chunk))


@needs_triton
def test_slabs_are_refused_where_pages_are_found_by_index():
    text = Text(1, 1, 1, 1, 8, 1.0, torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    cache = PackedCache(1, 1, 4, slabs=True)
    chunk = [t[0] for t in (text.query, text.key, text.value, text.keep)]
    cache.attend(0, *chunk)
    for implementation in ("reference", "sdpa"):
        with pytest.raises(ValueError, match="finds pages by index in one tensor, and this cache's lie in slabs"):
            cache.attend(0, *chunk, implementation=implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize(("window", "page_size"), [(1, 16), (17, 16), (128, 16), (300, 4)])
def test_the_same_on_a_gpu(window, page_size, implementation):
    schedule = [[200, 150], [1, 1], [1, 1], [37, 37], [1, 1], [130, 3], [1, 1]]
    totals = [sum(step[b] for step in schedule) for b in range(2)]
    text = Text(2, 2, 2, 2, max(totals), 0.3, dtype=torch.float32)
    expected = [[oracle(text, layer, b, window)[:, : totals[b]] for b in range(2)] for layer in range(2)]
    for name in ("query", "key", "value", "keep"):
        setattr(text, name, getattr(text, name).cuda())
    cache = PackedCache(2, 2, window, page_size, slabs=False if implementation else None)
    outputs = run(cache, text, schedule, poisoned=False, implementation=implementation)
    for layer in range(2):
        for b in range(2):
            error = (outputs[layer][b].cpu() - expected[layer][b]).norm() / expected[layer][b].norm()
            assert error < 2e-3  # tf32 products
