"""pruned_prefill in Triton against the reference in float64: in the interpreter at small sizes, on a GPU at real ones.

    TRITON_INTERPRET=1 python -m pytest tests/ops/test_triton_prefill.py

All memory that holds nothing is NaN: unused slots of the pool, and the buffers that the kernels allocate.
"""

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spkv.cache.packed import PackedCache
from spkv.ops import reference

triton = pytest.importorskip("triton")
INTERPRETED = triton.knobs.runtime.interpret
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from triton.errors import TritonError  # noqa: E402

from spkv.ops.triton import prefill  # noqa: E402
from spkv.ops.triton.prefill import Tile, pruned_prefill  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
# Triton's interpreter multiplies bfloat16 wrongly, so half precision there is float16.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
SMALL = Tile(16, 16, 4, 1)
# Uneven on purpose: more queries than keys, then more keys than queries.
TILES = [SMALL, Tile(32, 16, 4, 2), Tile(16, 32, 4, 2)]
DENSITIES = {"none": 0.0, "sparse": 0.1, "skewed": None, "all": 1.0}


def draw_keep(B, Hkv, T, density):
    share = DENSITIES[density]
    # Skewed: each head has a density of its own, some 0 and some 1.
    shares = torch.rand(B, Hkv, 1) * 1.6 - 0.3 if share is None else torch.full((B, Hkv, 1), share)
    return (torch.rand(B, Hkv, T) < shares).to(DEVICE)


def draw_pairs(B, heads, T, D, dtype):
    return torch.randn(B, heads, T, D).to(DEVICE, dtype)


def fill(chunks, *, B, Hkv, D, window, P, density, dtype=torch.float32, layers=2):
    """What a cache holds for its last layer after chunks of the given lengths, one list [B] each; the rest is NaN."""
    cache = PackedCache(layers, Hkv, window, P)
    for lengths in chunks:
        width = max(max(lengths), 2)  # a chunk of one token is one that is decoded
        valid = torch.tensor([[column >= width - n for column in range(width)] for n in lengths], device=DEVICE)
        for layer in range(layers):
            key, value = (draw_pairs(B, Hkv, width, D, dtype) for _ in range(2))
            keep = draw_keep(B, Hkv, width, density)
            # The reference writes; what it attends to does not matter here.
            cache.attend(layer, key, key, value, keep, valid, implementation="reference")
    return poisoned_past(cache.layer(layers - 1))


def poisoned_past(past):
    """The same pairs in a pool whose other slots are NaN, a table whose other entries point far out of it, and a ring
    whose other slots claim to be kept."""
    P, table = past.page_size, past.table.clone()
    slot = torch.arange(table.shape[1] * P, device=DEVICE)
    held = slot < past.seen.clamp_max(past.window).repeat_interleave(past.kv_heads)[:, None]
    held |= (slot >= past.ring_pages * P) & (slot < past.ring_pages * P + past.kept[:, None])
    chain, slot = held.nonzero(as_tuple=True)
    pool = torch.full_like(past.pool, float("nan"))
    page = table[chain, slot // P].long()
    pool[page, :, slot % P] = past.pool[page, :, slot % P]
    table[~held.view(*table.shape, P).any(-1)] = 2**30
    unused = torch.arange(past.window, device=DEVICE) >= past.seen.repeat_interleave(past.kv_heads)[:, None]
    return dataclasses.replace(past, pool=pool, table=table, ring_keep=past.ring_keep | unused)


@contextlib.contextmanager
def poisoned_memory():
    """What torch.empty and torch.empty_like return inside is NaN."""

    def poisoned(function):
        def allocate(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)

        return allocate

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
    ):
        yield


def check(query, key, value, keep, *, tile=SMALL, slack=1.0, **options):
    """Hold the kernels to twice the error of an eager reference of the same precision; returns what they made.

    `slack` times the dtype's rounding of the result comes on top: where few values are compared, luck counts.
    """
    past, sinks = options.get("past"), options.get("sinks")
    wide = {
        "past": None if past is None else dataclasses.replace(past, pool=past.pool.double()),
        "sinks": None if sinks is None else sinks.double(),
    }
    exact = reference.pruned_prefill(query.double(), key.double(), value.double(), keep, **(options | wide))
    eager = reference.pruned_prefill(query, key, value, keep, **options)
    with poisoned_memory():
        actual = pruned_prefill(query, key, value, keep, tile=tile, **options)
    assert actual.shape == query.shape
    assert actual.dtype == query.dtype
    error, eager_error = ((x.double() - exact).norm().item() for x in (actual, eager))
    assert error <= 2 * eager_error + slack * torch.finfo(query.dtype).eps * exact.norm().item(), (error, eager_error)
    if (valid := options.get("valid")) is not None:
        padding = actual.masked_select(~valid[:, None, :, None])
        assert torch.equal(padding, torch.zeros_like(padding))
    return actual


def draw_chunk(B, Hkv, group, T, D, density, dtype=torch.float32):
    return (
        draw_pairs(B, Hkv * group, T, D, dtype),
        draw_pairs(B, Hkv, T, D, dtype),
        draw_pairs(B, Hkv, T, D, dtype),
        draw_keep(B, Hkv, T, density),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", ["none", "skewed", "all"])
@pytest.mark.parametrize("window", [1, 7, 80])
def test_a_whole_text_errs_no_more_than_an_eager_reference(dtype, density, window):
    check(*draw_chunk(1, 2, 2, 53, 16, density, dtype), window=window, scale=0.25, slack=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", ["skewed", "all"])
@pytest.mark.parametrize("window", [1, 9, 60])
def test_a_chunk_after_others_errs_no_more_than_an_eager_reference(dtype, density, window):
    past = fill([[30, 11], [5, 0]], B=2, Hkv=2, D=16, window=window, P=4, density=density, dtype=dtype)
    chunk = draw_chunk(2, 2, 2, 25, 16, density, dtype)
    check(*chunk, window=window, scale=0.25, past=past, slack=0.0)


@settings(max_examples=25)
@given(data=st.data())
def test_any_shape(data):
    draw = data.draw
    B, Hkv = draw(st.integers(1, 2), "B"), draw(st.integers(1, 2), "Hkv")
    group, D = draw(st.sampled_from([1, 2, 3, 4, 17]), "group"), draw(st.sampled_from([1, 8, 16, 20, 32]), "D")
    window, P = draw(st.sampled_from([1, 2, 7, 16, 33, 70]), "window"), draw(st.sampled_from([1, 4, 16]), "P")
    T, density = draw(st.integers(1, 60), "T"), draw(st.sampled_from(list(DENSITIES)), "density")
    dtype, tile = draw(st.sampled_from(DTYPES), "dtype"), draw(st.sampled_from(TILES), "tile")
    lengths = st.lists(st.integers(0, 40), min_size=B, max_size=B)
    chunks = draw(st.none() | st.lists(lengths, max_size=3), "chunks")
    padding = draw(st.sampled_from(["none", "left", "any"]), "padding")
    torch.manual_seed(draw(st.integers(0, 999), "seed"))

    options = dict(window=window, scale=D**-0.5, softcap=draw(st.sampled_from([None, 1.5]), "softcap"))
    if draw(st.booleans(), "sinks"):
        options["sinks"] = torch.randn(Hkv * group).to(DEVICE, dtype)
    if chunks:
        options["past"] = fill(chunks, B=B, Hkv=Hkv, D=D, window=window, P=P, density=density, dtype=dtype)
    if padding == "left":
        options["valid"] = (torch.arange(T) >= torch.randint(0, T + 1, (B, 1))).to(DEVICE)
    elif padding == "any":
        options["valid"] = (torch.rand(B, T) < torch.rand(B, 1)).to(DEVICE)
    check(*draw_chunk(B, Hkv, group, T, D, density, dtype), tile=tile, **options)


@pytest.mark.parametrize("window", [1, 5, 64])
def test_all_kept_is_causal_attention(window):
    query, key, value, keep = draw_chunk(2, 1, 2, 50, 16, "all")
    actual = pruned_prefill(query, key, value, keep, window=window, scale=0.25, tile=SMALL)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("window", [1, 5, 64])
def test_none_kept_is_attention_to_the_window(window):
    query, key, value, keep = draw_chunk(2, 1, 2, 50, 16, "none")
    actual = pruned_prefill(query, key, value, keep, window=window, scale=0.25, tile=SMALL)
    distance = torch.arange(50, device=DEVICE)[:, None] - torch.arange(50, device=DEVICE)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=(distance >= 0) & (distance < window), scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(actual, expected)


def test_chunks_give_what_one_pass_gives():
    window, query, key, value, keep = 6, *draw_chunk(1, 2, 2, 48, 16, "skewed")
    whole = pruned_prefill(query, key, value, keep, window=window, scale=0.25, tile=SMALL)
    cache, parts = PackedCache(1, 2, window, 4), []
    for columns in (slice(0, 3), slice(3, 20), slice(20, 22), slice(22, 48)):
        chunk = [tensor[:, :, columns] for tensor in (query, key, value, keep)]
        # A cache that has met nothing has no pages at all.
        past = cache.layer(0) if cache.sequences else None
        parts.append(pruned_prefill(*chunk, window=window, scale=0.25, past=past, tile=SMALL))
        cache.attend(0, *chunk, scale=0.25, implementation="reference")
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)


@pytest.mark.parametrize("dtype", DTYPES)
# The interpreter forgets the carry where fp8 rounds up to a power of two.
@pytest.mark.parametrize("name", ["int8", "int4"] if INTERPRETED else ["int8", "fp8", "int4"])
@pytest.mark.parametrize("chunks", [[], [9], [40, 3, 60]])
def test_coded_pages_and_pairs_about_to_be_coded(name, dtype, chunks):
    D, window = 64, 7
    cache = PackedCache(1, 2, window, 4, page_dtype=name)
    cache.allocate(torch.empty(1, 2, 0, D, dtype=dtype, device=DEVICE))
    for T in chunks:
        query, *pairs = draw_chunk(1, 2, 2, T, D, "skewed", dtype)
        cache.attend(0, query, *pairs, implementation="reference")
    past = cache.layer(0)
    if past.coded.pool.shape[0]:
        _, scales = past.coded.rows(4, D)
        held = torch.zeros(scales.shape[0], 4, dtype=torch.bool, device=DEVICE)
        slot = torch.arange(past.table.shape[1] * 4, device=DEVICE) - past.ring_pages * 4
        chain, slot = ((slot >= 0) & (slot < past.kept[:, None])).nonzero(as_tuple=True)
        held[past.table[chain, slot // 4].long(), slot % 4] = True
        scales.transpose(1, 2)[~held] = float("nan")
    tile = Tile(16, 32, 4, 1)
    check(*draw_chunk(1, 2, 2, 50, D, "skewed", dtype), window=window, scale=D**-0.5, past=past, tile=tile)


def test_a_tile_too_small_for_int4_is_refused():
    cache = PackedCache(1, 1, 2, 4, page_dtype="int4")
    pairs = draw_chunk(1, 1, 1, 9, 64, "all", torch.float16)
    cache.attend(0, *pairs, implementation="reference")
    options = dict(window=2, scale=0.125, past=cache.layer(0))
    assert pruned_prefill(*pairs, tile=Tile(16, 32, 4, 1), **options).isfinite().all()
    with pytest.raises(TritonError) as refused:
        pruned_prefill(*pairs, tile=SMALL, **options)
    # One error for each function that was being compiled.
    error = refused.value
    while error.__cause__ is not None:
        error = error.__cause__
    assert "tiles of int4 take at least 32 rows" in str(error)


def test_a_cache_without_pages_is_no_past():
    chunk = draw_chunk(1, 2, 2, 20, 16, "skewed")
    past = fill([[0]], B=1, Hkv=2, D=16, window=5, P=4, density="all")
    assert past.pool.shape[0] == 0
    expected = pruned_prefill(*chunk, window=5, scale=0.25, tile=SMALL)
    assert torch.equal(pruned_prefill(*chunk, window=5, scale=0.25, past=past, tile=SMALL), expected)
    # Nor is one that says so, whatever its tensors hold.
    past = dataclasses.replace(fill([[9]], B=1, Hkv=2, D=16, window=5, P=4, density="all"), empty=True)
    assert torch.equal(pruned_prefill(*chunk, window=5, scale=0.25, past=past, tile=SMALL), expected)


def test_padding_changes_nothing():
    query, key, value, keep = draw_chunk(1, 2, 2, 40, 16, "skewed")
    valid = (torch.rand(1, 40) < 0.6).to(DEVICE)
    columns = valid[0].nonzero()[:, 0]
    past = fill([[23]], B=1, Hkv=2, D=16, window=6, P=4, density="skewed")
    for tensor in (query, key, value):  # padding may hold anything
        tensor.masked_fill_(~valid[:, None, :, None], float("nan"))
    for options in ({}, {"past": past}):
        options |= dict(window=6, scale=0.25, tile=SMALL)
        actual = pruned_prefill(query, key, value, keep, valid=valid, **options)
        squeezed = [tensor[:, :, columns] for tensor in (query, key, value, keep)]
        assert torch.equal(actual[:, :, columns], pruned_prefill(*squeezed, **options))
        assert not actual[:, :, ~valid[0]].any()


def test_nothing_valid_and_no_tokens():
    query, key, value, keep = draw_chunk(2, 1, 1, 20, 16, "all")
    nothing = torch.zeros(2, 20, dtype=torch.bool, device=DEVICE)
    out = pruned_prefill(query, key, value, keep, window=3, scale=0.25, valid=nothing, tile=SMALL)
    assert torch.equal(out, torch.zeros_like(query))
    empty = [tensor[:, :, :0] for tensor in (query, key, value, keep)]
    assert pruned_prefill(*empty, window=3, scale=0.25).shape == (2, 1, 0, 16)


@pytest.mark.parametrize("with_past", [False, True])
def test_strides_of_a_model(with_past):
    """Heads behind tokens, as a fused projection leaves them, in buffers of NaN; the output has the query's layout."""
    B = 1 + with_past
    query, key, value, keep = draw_chunk(B, 2, 2, 20, 16, "skewed")
    options = dict(window=5, scale=0.25, tile=SMALL)
    if with_past:
        options["past"] = fill([[9, 20]], B=B, Hkv=2, D=16, window=5, P=4, density="skewed")
    fused = torch.full((3, 21, 10, 16), float("nan"), device=DEVICE)
    views = [fused[:B, :20, heads].transpose(1, 2) for heads in (slice(0, 4), slice(4, 6), slice(6, 8))]
    for view, tensor in zip(views, (query, key, value), strict=True):
        view.copy_(tensor)
    strided_keep = keep.transpose(1, 2).contiguous().transpose(1, 2)
    expected = pruned_prefill(query, key, value, keep, **options)
    assert torch.equal(pruned_prefill(*views, strided_keep, **options), expected)
    turned = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert pruned_prefill(turned, key, value, keep, **options).stride() == turned.stride()
    columns_apart = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in (query, key, value)]
    assert torch.equal(pruned_prefill(*columns_apart, keep, **options), expected)


@pytest.mark.parametrize("scale", [-0.25, 0.0, 25.0])
def test_any_scale(scale):
    check(*draw_chunk(1, 2, 2, 40, 16, "skewed"), window=6, scale=scale)


def test_large_sinks_do_not_overflow():
    sinks = torch.tensor([900.0, -900.0], device=DEVICE)
    check(*draw_chunk(1, 1, 2, 30, 16, "skewed"), window=6, scale=0.25, sinks=sinks)


def test_results_are_the_same_from_run_to_run():
    past = fill([[30, 11]], B=2, Hkv=2, D=16, window=9, P=4, density="skewed")
    chunk = draw_chunk(2, 2, 2, 25, 16, "skewed")
    first, second = (pruned_prefill(*chunk, window=9, scale=0.25, past=past, tile=SMALL) for _ in range(2))
    assert torch.equal(first, second)


def test_only_pairs_that_leave_the_window_are_copied():
    _, key, value, keep = draw_chunk(1, 2, 1, 40, 16, "skewed")
    with poisoned_memory():
        recent = prefill.collect(key, value, keep, window=30, past=None, valid=None)
    assert recent.key is key
    for h in range(2):
        kept = keep[0, h, :10].nonzero()[:, 0]
        assert recent.far_key.shape[1] == 10
        assert torch.equal(recent.far_key[h, : len(kept)], key[0, h, kept])
        assert torch.equal(recent.far_value[h, : len(kept)], value[0, h, kept])
        assert recent.far_key[h, len(kept) :].isnan().all()


def test_a_head_too_large_is_named():
    tensor = torch.zeros(1, 1, 4, 320, device=DEVICE)
    keep = torch.zeros(1, 1, 4, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="head sizes up to 256, not 320"):
        pruned_prefill(tensor, tensor, tensor, keep, window=2, scale=1.0)


@pytest.mark.parametrize("D", [64, 128, 256])
def test_tiles_for_other_gpus(monkeypatch, D):
    monkeypatch.setattr(prefill, "is_tuned_for", lambda device: False)
    tile = prefill.choose_tile(torch.empty(1, D, dtype=torch.bfloat16))
    dtype = torch.float16
    past = fill([[60]], B=1, Hkv=1, D=D, window=9, P=16, density="skewed", dtype=dtype)
    check(*draw_chunk(1, 1, 4, 70, D, "skewed", dtype), tile=tile, window=9, scale=D**-0.5, past=past)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="at these sizes the interpreter takes hours")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "Hkv", "D", "T", "window"),
    [(8, 2, 128, 1500, 128), (9, 3, 64, 1300, 128), (4, 2, 256, 700, 100), (4, 4, 96, 900, 17), (14, 2, 64, 130, 1)],
)
@pytest.mark.parametrize("density", DENSITIES)
def test_the_tiles_of_the_table_on_a_gpu(dtype, heads, Hkv, D, T, window, density):
    B, group = 2, heads // Hkv
    past = fill([[1000, 333], [0, 70]], B=B, Hkv=Hkv, D=D, window=window, P=16, density=density, dtype=dtype)
    valid = (torch.arange(T) >= torch.tensor([[0], [T // 3]])).to(DEVICE)
    for options in (
        {},
        {"past": past},
        {"valid": valid},
        {"past": past, "valid": valid, "softcap": 30.0, "sinks": torch.randn(heads).to(DEVICE)},
    ):
        chunk = draw_chunk(B, Hkv, group, T, D, density, dtype)
        first = check(*chunk, tile=None, window=window, scale=D**-0.5, **options)
        for _ in range(2):
            assert torch.equal(first, pruned_prefill(*chunk, window=window, scale=D**-0.5, **options))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU that runs ahead of the host")
def test_nothing_waits_for_the_gpu():
    past = fill([[300, 100]], B=2, Hkv=2, D=64, window=33, P=16, density="skewed", dtype=torch.bfloat16)
    chunk = draw_chunk(2, 2, 2, 200, 64, "skewed", torch.bfloat16)
    valid = (torch.rand(2, 200) < 0.6).to(DEVICE)
    for options in ({}, {"past": past}, {"past": past, "valid": valid}):
        for mode in ("default", "error"):  # first compile, which may wait
            torch.cuda.set_sync_debug_mode(mode)
            try:
                pruned_prefill(*chunk, window=33, scale=0.125, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
