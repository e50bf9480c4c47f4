"""packed_decode in Triton against the reference in float64, on ragged chains whose unused slots hold NaN."""

import dataclasses
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spkv.cache.packed import PackedCache
from spkv.ops import attention, reference
from spkv.ops.codec import codec
from spkv.ops.packed import CodedPages, PackedLayer

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from spkv.ops.triton.decode import Tile, decode_with, packed_decode  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
# Triton's interpreter rounds to bfloat16 by cutting off, so half precision there is float16.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


def fill(seen, kept, *, Hkv, D, window, P=16, dtype=torch.float32, spare_pages=3, table_pages=None):
    """A PackedLayer of given lengths, pages in random order; unused slots NaN, unused table entries far out.

    seen: tokens of each of B sequences; kept: pairs in the kept pages of each of B * Hkv chains.
    """
    C, ring_pages = len(kept), -(-window // P)
    seen = torch.tensor(seen, dtype=torch.int32, device=DEVICE)
    kept = torch.tensor(kept, dtype=torch.int32, device=DEVICE)
    columns = table_pages or ring_pages + -(-int(kept.max()) // P) + 2
    column = torch.arange(columns, device=DEVICE)
    ring_used = column < -(-seen.clamp_max(window).repeat_interleave(Hkv) // P)[:, None]
    kept_used = (column >= ring_pages) & (column < ring_pages + -(-kept // P)[:, None])
    used = ring_used | kept_used
    count = int(used.sum())
    table = torch.full((C, columns), 2**30, dtype=torch.int32, device=DEVICE)
    table[used] = torch.randperm(count + spare_pages, device=DEVICE)[:count].int()
    pool = torch.full((count + spare_pages, 2, P, D), float("nan"), dtype=dtype, device=DEVICE)
    slot = torch.arange(columns * P, device=DEVICE)
    held = slot < seen.clamp_max(window).repeat_interleave(Hkv)[:, None]
    held |= (slot >= ring_pages * P) & (slot < ring_pages * P + kept[:, None])
    chain, slot = held.nonzero(as_tuple=True)
    pool[table[chain, slot // P].long(), :, slot % P] = torch.randn(len(chain), 2, D, device=DEVICE).to(dtype)
    return PackedLayer(pool, table, seen, kept, torch.zeros(C, window, dtype=torch.bool, device=DEVICE), window)


def code(packed, name, spare_pages=3):
    """The same chains with their kept pairs coded, in pages of their own in random order; unused slots hold NaN."""
    P, D, ring_pages = packed.page_size, packed.pool.shape[-1], packed.ring_pages
    column = torch.arange(packed.table.shape[1], device=DEVICE)
    used = (column >= ring_pages) & (column < ring_pages + -(-packed.kept // P)[:, None])
    count = int(used.sum())
    ids = torch.randperm(count + spare_pages, device=DEVICE)[:count].int()
    pool = torch.full((count + spare_pages, codec(name).page_bytes(P, D)), 255, dtype=torch.uint8, device=DEVICE)
    coded = CodedPages(codec(name), pool)
    codes, scales = coded.rows(P, D)
    scales.fill_(float("nan"))
    slot = torch.arange(packed.table.shape[1] * P, device=DEVICE) - ring_pages * P
    chain, slot = ((slot >= 0) & (slot < packed.kept[:, None])).nonzero(as_tuple=True)
    pairs = packed.pool[packed.table[chain, slot // P].long(), :, slot % P]
    table = packed.table.clone()
    table[used] = ids
    page = table[chain, slot // P].long()
    codes[page, :, slot % P], scales[page, :, slot % P] = codec(name).encode(pairs)
    return dataclasses.replace(packed, table=table, coded=coded)


def expected_and_error(query, packed, relative_error, **options):
    """The reference in float64, and the error of the same-precision reference against it."""
    table = packed.table.where(packed.table < 2**30, 0)  # the reference looks at every page
    exact = dataclasses.replace(packed, table=table, pool=packed.pool.double())
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = reference.packed_decode(query.double(), exact, **wide)
    eager = reference.packed_decode(query, dataclasses.replace(packed, table=table), **options)
    return expected, relative_error(eager.double(), expected) if expected.any() else 0.0


def check(actual, query, packed, relative_error, **options):
    expected, eager_error = expected_and_error(query, packed, relative_error, **options)
    assert actual.shape == query.shape
    assert actual.dtype == query.dtype
    if not expected.any():
        assert torch.equal(actual, torch.zeros_like(actual))
        return
    # A handful of numbers can be lucky: no less is asked for than the rounding of the output, or in float32, where it
    # is not what errs the most, the error of a GPU's exp2 (PTX: ex2.approx, 2^-22).
    least = 2**-22 if query.dtype == torch.float32 else torch.finfo(query.dtype).eps / 2
    bound = 2 * max(eager_error, least)
    assert relative_error(actual.double(), expected) <= bound


@settings(max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_lengths_give_what_the_reference_gives(data, dtype, relative_error):
    B, Hkv, G = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 3, 17]))
    window, P = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 4, 16]))
    D = data.draw(st.sampled_from([4, 16, 24]))
    programs, slots = data.draw(st.sampled_from([1, 2, 3, 5, 16])), data.draw(st.sampled_from([16, 32]))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    seen = [data.draw(st.sampled_from([0, 1, 7, window, 90, 150])) for _ in range(B)]
    density = data.draw(st.sampled_from(["none", "skewed", "all"]))
    shares = {"none": torch.zeros(B * Hkv), "all": torch.ones(B * Hkv), "skewed": torch.rand(B * Hkv).round(decimals=1)}
    kept = [round(max(0, seen[c // Hkv] - window) * float(share)) for c, share in enumerate(shares[density])]
    packed = fill(seen, kept, Hkv=Hkv, D=D, window=window, P=P, dtype=dtype)
    query = torch.randn(B, Hkv * G, 1, D, device=DEVICE).to(dtype)
    options = {"scale": data.draw(st.sampled_from([D**-0.5, 1.0])), "softcap": data.draw(st.sampled_from([None, 2.0]))}
    if data.draw(st.booleans()):
        options["sinks"] = torch.randn(Hkv * G, device=DEVICE).to(dtype)
    actual = decode_with(query, packed, Tile(slots), programs, **options)
    check(actual, query, packed, relative_error, **options)
    for b in range(B):
        assert seen[b] > 0 or not actual[b].any()
    assert torch.equal(actual, decode_with(query, packed, Tile(slots), programs, **options))


def test_chains_may_stand_anywhere_in_a_table_of_more_sequences():
    packed = fill([90, 3, 40], [50, 0, 0, 0, 20, 20], Hkv=2, D=16, window=20, P=4)
    query = torch.randn(3, 4, 1, 16, device=DEVICE)
    elsewhere = torch.full((5, 2, packed.table.shape[1]), 2**30, dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([4, 0, 2], dtype=torch.int32, device=DEVICE)
    elsewhere[rows.long()] = packed.table.view(3, 2, -1)
    scattered = dataclasses.replace(packed, table=elsewhere.flatten(0, 1), rows=rows)
    assert torch.equal(scattered.in_order().table, packed.table)
    actual = decode_with(query, scattered, Tile(16), 3, scale=0.25)
    assert torch.equal(actual, decode_with(query, packed, Tile(16), 3, scale=0.25))


@settings(max_examples=12)
@given(data=st.data())
@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_coded_pages_give_what_the_reference_reads_from_them(data, name, relative_error):
    B, Hkv, G = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 3]))
    window, P = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([4, 16]))
    D = data.draw(st.sampled_from([64, 128] if name == "int4" else [4, 24, 64]))
    dtype, programs = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([1, 3, 5]))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    seen = [data.draw(st.sampled_from([0, 7, window, 150])) for _ in range(B)]
    kept = [round(max(0, seen[c // Hkv] - window) * float(torch.rand(()).round(decimals=1))) for c in range(B * Hkv)]
    packed = code(fill(seen, kept, Hkv=Hkv, D=D, window=window, P=P, dtype=dtype), name)
    query = torch.randn(B, Hkv * G, 1, D, device=DEVICE).to(dtype)
    options = {"scale": D**-0.5, "softcap": data.draw(st.sampled_from([None, 2.0]))}
    actual = decode_with(query, packed, Tile(32), programs, **options)
    check(actual, query, packed, relative_error, **options)


@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_head_sizes_with_the_tiles_of_the_table(D, dtype, relative_error):
    packed = fill([200, 30], [150, 3, 0, 0], Hkv=2, D=D, window=21, dtype=dtype)
    query = torch.randn(2, 8, 1, D, device=DEVICE).to(dtype)
    actual = packed_decode(query, packed, scale=D**-0.5)
    check(actual, query, packed, relative_error, scale=D**-0.5)


def test_what_a_cache_was_fed_is_what_is_attended_to(relative_error):
    window, Hkv, D = 9, 2, 8
    cache = PackedCache(2, Hkv, window, 4)
    for counts in ([30, 11], [0, 7], [1, 1], [1, 1]):
        width = max(counts)
        valid = torch.tensor([[column >= width - n for column in range(width)] for n in counts], device=DEVICE)
        for layer in range(2):
            query, key, value = (torch.randn(2, heads, width, D, device=DEVICE) for heads in (4, Hkv, Hkv))
            keep = torch.rand(2, Hkv, width, device=DEVICE) < (0.2, 0.9)[layer]
            cache.attend(layer, query, key, value, keep, None if bool(valid.all()) else valid)
    for layer in range(2):
        query = torch.randn(2, 4, 1, D, device=DEVICE)
        packed = cache.layer(layer)
        check(packed_decode(query, packed, scale=0.3), query, packed, relative_error, scale=0.3)


def test_nothing_held_gives_zeros_with_and_without_sinks():
    packed = fill([0, 0], [0, 0, 0, 0], Hkv=2, D=16, window=5)
    query = torch.randn(2, 4, 1, 16, device=DEVICE)
    for sinks in (None, torch.randn(4, device=DEVICE)):
        assert torch.equal(packed_decode(query, packed, scale=1.0, sinks=sinks), torch.zeros_like(query))


def test_many_chains_are_located_beyond_one_scan(monkeypatch, relative_error):
    monkeypatch.setattr("spkv.ops.triton.decode._SCANNED", 4)
    seen = [0, 40, 0, 0, 3, 60, 0, 0]
    packed = fill(seen, [0, 0, 30, 1, 0, 0, 0, 0, 0, 0, 50, 0, 0, 0, 0, 0], Hkv=2, D=8, window=10)
    query = torch.randn(8, 2, 1, 8, device=DEVICE)
    for programs in (1, 3, 7, 40):
        actual = decode_with(query, packed, Tile(16), programs, scale=0.5)
        check(actual, query, packed, relative_error, scale=0.5)


def test_large_scores_and_sinks_do_not_overflow(relative_error):
    packed = fill([70], [60], Hkv=1, D=16, window=10)
    query = 100 * torch.randn(1, 2, 1, 16, device=DEVICE)
    for options in ({}, {"softcap": 500.0}, {"sinks": torch.tensor([900.0, -900.0], device=DEVICE)}):
        actual = decode_with(query, packed, Tile(16), 3, scale=1.0, **options)
        check(actual, query, packed, relative_error, scale=1.0, **options)


def test_a_query_of_any_strides(relative_error):
    packed = fill([50, 20], [33, 0, 5, 11], Hkv=2, D=16, window=9)
    fused = torch.randn(2, 1, 3, 4, 16, device=DEVICE)  # q of a fused projection, heads after tokens
    query = fused[:, :, 1].transpose(1, 2)
    check(packed_decode(query, packed, scale=0.25), query, packed, relative_error, scale=0.25)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a compiled kernel")
@pytest.mark.parametrize(("heads", "Hkv", "D"), [(32, 8, 128), (9, 3, 64), (8, 4, 256), (32, 32, 96), (16, 1, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_larger_sizes_on_a_gpu(heads, Hkv, D, dtype, relative_error):
    B, window = 3, 128
    seen = [4000, 1, 2500]
    share = torch.rand(B * Hkv) ** 3
    share[0] = 1.0
    kept = [round(max(0, seen[c // Hkv] - window) * float(s)) for c, s in enumerate(share)]
    packed = fill(seen, kept, Hkv=Hkv, D=D, window=window, dtype=dtype)
    query = torch.randn(B, heads, 1, D, device=DEVICE).to(dtype)
    for options in ({}, {"softcap": 30.0}, {"sinks": torch.randn(heads, device=DEVICE)}):
        actual = packed_decode(query, packed, scale=D**-0.5, **options)
        check(actual, query, packed, relative_error, scale=D**-0.5, **options)
        assert all(torch.equal(actual, packed_decode(query, packed, scale=D**-0.5, **options)) for _ in range(5))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a compiled kernel")
def test_a_captured_graph_follows_the_lengths(relative_error):
    B, Hkv, D, window = 4, 8, 128, 100
    packed = fill([0] * B, [0] * (B * Hkv), Hkv=Hkv, D=D, window=window, dtype=torch.bfloat16, table_pages=200)
    # All that the graph reads stays in place; only the contents change.
    pages = B * Hkv * 200
    pool = torch.randn(pages, 2, 16, D, device=DEVICE, dtype=torch.bfloat16)
    table = torch.randperm(pages, device=DEVICE).int().view(B * Hkv, 200)
    packed = dataclasses.replace(packed, pool=pool, table=table)
    query = torch.randn(B, 32, 1, D, device=DEVICE, dtype=torch.bfloat16)
    packed_decode(query, packed, scale=0.1)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = packed_decode(query, packed, scale=0.1)
    for seen, densities in (([3000, 50, 0, 700], (0.0, 1.0)), ([1, 1, 1, 1], (0.0, 0.0)), ([3000] * 4, (0.5, 1.0))):
        packed.seen.copy_(torch.tensor(seen))
        low, high = densities
        share = low + (high - low) * torch.rand(B * Hkv)
        kept = (torch.tensor(seen).repeat_interleave(Hkv) - window).clamp_min(0) * share
        packed.kept.copy_(kept.int())
        query.normal_()
        graph.replay()
        check(out, query, packed, relative_error, scale=0.1)
        assert torch.equal(out, packed_decode(query, packed, scale=0.1))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a compiled kernel")
def test_a_pool_of_more_than_two_to_the_31_elements():
    D, P, window = 128, 16, 16
    pages = 2**31 // (2 * P * D) + 64
    if torch.cuda.mem_get_info()[0] < 2 * pages * 2 * P * D + 2**30:
        pytest.skip("needs 6 GB of GPU memory")
    pool = torch.zeros(pages, 2, P, D, device=DEVICE, dtype=torch.bfloat16)
    small = fill([200], [150], Hkv=1, D=D, window=window, dtype=torch.bfloat16)
    far = pages - small.pool.shape[0]
    pool[far:] = small.pool
    table = (small.table + far).where(small.table < small.pool.shape[0], 0)
    query = torch.randn(1, 4, 1, D, device=DEVICE, dtype=torch.bfloat16)
    actual = packed_decode(query, dataclasses.replace(small, pool=pool, table=table), scale=0.1)
    assert torch.equal(actual, packed_decode(query, small, scale=0.1))


def test_sinks_of_any_strides(relative_error):
    packed = fill([40], [25, 3], Hkv=2, D=16, window=9)
    query = torch.randn(1, 4, 1, 16, device=DEVICE)
    for sinks in (torch.randn(8, device=DEVICE)[::2], torch.full((1,), 1.5, device=DEVICE).expand(4)):
        check(
            packed_decode(query, packed, scale=0.5, sinks=sinks), query, packed, relative_error, scale=0.5, sinks=sinks
        )


def test_what_it_cannot_run_is_said():
    packed = fill([40], [25, 3], Hkv=2, D=16, window=9)
    query = torch.randn(1, 4, 1, 16, device=DEVICE)

    def run(query, packed):
        return attention.packed_decode(query, packed, implementation="triton")

    assert torch.equal(run(query, packed), packed_decode(query, packed, scale=0.25))
    with pytest.raises(ValueError, match="no backward pass, and a gradient is asked for"):
        run(query.requires_grad_(), packed)
    query = query.detach()
    with pytest.raises(ValueError, match="groups of up to 32 queries, not 40"):
        run(torch.randn(1, 80, 1, 16, device=DEVICE), packed)
    with pytest.raises(ValueError, match="table, seen and kept in int32"):
        run(query, dataclasses.replace(packed, kept=packed.kept.long()))
    with pytest.raises(ValueError, match="last stride of 1"):
        run(query, dataclasses.replace(packed, pool=packed.pool.transpose(2, 3).contiguous().transpose(2, 3)))
