"""The packed cache against the dense oracle, and its memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spkv.cache.dense import DenseCache
from spkv.cache.packed import PackedCache
from spkv.cache.pages import PoolFullError

D = 4


class Text:
    """Random pairs of `layers` layers for B sequences of T tokens; a share of them kept."""

    def __init__(self, layers, B, Hkv, group, T, density, dtype=torch.float64, device="cpu"):
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


def poison(cache):
    """Fill every slot that holds nothing with NaN."""
    P = cache.page_size
    slot = torch.arange(cache.table.shape[2] * P)
    ring = slot < cache.seen.clamp_max(cache.window).repeat_interleave(cache.kv_heads, 1)[..., None]
    kept = (slot >= cache.ring_pages * P) & (slot < cache.ring_pages * P + cache.kept[..., None])
    layer, chain, slot = (ring | kept).nonzero(as_tuple=True)
    times_held = torch.zeros(cache.pool.shape[0], P, dtype=torch.long)
    times_held.index_put_((cache.table[layer, chain, slot // P].long(), slot % P), torch.tensor(1), accumulate=True)
    assert times_held.max() <= 1, "two pairs share a slot"
    cache.pool.transpose(1, 2)[times_held == 0] = float("nan")


def run(cache, text, schedule, *, poisoned=True, **options):
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
    pages_needed = sum(len(columns) for b in range(B) for columns in cache._pages_of(b).values())
    assert cache.pages.in_use == pages_needed


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
    assert cache.pages.in_use == sum(len(c) for b in range(len(indices)) for c in cache._pages_of(b).values())


def test_a_state_round_trip_continues_alike_and_is_compact():
    text = Text(2, 2, 2, 2, 50, 0.3)
    cache, copy = PackedCache(2, 2, 8, 4), PackedCache(2, 2, 8, 4)
    run(cache, text, [[40, 40]])
    copy.load_state(cache.state())
    assert copy.pool.shape[0] == cache.pages.in_use == copy.pages.in_use
    for i in range(40, 50):
        chunk = [t[0, :, :, i : i + 1] for t in (text.query, text.key, text.value, text.keep)]
        assert torch.equal(cache.attend(0, *chunk, scale=0.5), copy.attend(0, *chunk, scale=0.5))
    assert PackedCache(2, 2, 8, 4).state() == {}
    with pytest.raises(
        ValueError,
        match="the state has 2 layers, 2 KV heads, window 8 .* this cache has .* window 9",
    ):
        PackedCache(2, 2, 9, 4).load_state(cache.state())


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
    tensors = [v for v in vars(cache).values() if isinstance(v, torch.Tensor)]
    assert cache.nbytes == sum(t.untyped_storage().nbytes() for t in tensors)
    pages_bytes = cache.pool.numel() * cache.pool.element_size()
    assert pages_bytes / (held * 2 * 64 * 4) <= 1.05


def test_a_full_pool_says_so_and_leaves_the_layer_as_it_was():
    text = Text(1, 1, 1, 1, 64, 1.0, dtype=torch.float32)
    cache = PackedCache(1, 1, 16, 4, max_memory=10 * 2 * 4 * D * 4)
    run(cache, text, [[36]], poisoned=False)
    before = cache.state()
    with pytest.raises(PoolFullError, match="the pool may hold 10 at most; raise max_memory"):
        cache.attend(0, *(t[0, :, :, 36:60] for t in (text.query, text.key, text.value, text.keep)), scale=0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cache.state().items())
    with pytest.raises(ValueError, match="max_memory=10 bytes do not hold one page"):
        run(PackedCache(1, 1, 16, 4, max_memory=10), text, [[1]], poisoned=False)


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


def test_reset_frees_everything():
    text = Text(1, 1, 1, 1, 40, 0.5)
    cache = PackedCache(1, 1, 4)
    run(cache, text, [[40]], poisoned=False)
    assert cache.nbytes > 0
    cache.reset()
    assert cache.nbytes == 0
    assert cache.sequences == 0


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
    cache = PackedCache(2, 2, window, page_size)
    outputs = run(cache, text, schedule, poisoned=False)
    for layer in range(2):
        for b in range(2):
            error = (outputs[layer][b].cpu() - expected[layer][b]).norm() / expected[layer][b].norm()
            assert error < 2e-3  # tf32 products
