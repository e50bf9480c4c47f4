"""Memory for pages: one tensor, or slabs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spkv.cache.pool import PagePool


def pool(slabs, pairs=4, head_size=8, dtype=torch.float32):
    return PagePool((2, pairs, head_size), dtype, torch.device("cpu"), slabs)


@settings(max_examples=30)
@given(
    slabs=st.booleans(),
    steps=st.lists(st.tuples(st.sampled_from(["grow", "take", "give"]), st.integers(1, 9)), max_size=20),
)
def test_no_page_is_handed_out_twice_or_lost_and_each_keeps_its_content(slabs, steps):
    # Slabs of a megabyte: the CPU's allocator puts small ones too far apart for 32-bit ids.
    pages, held, size = pool(slabs, pairs=256, head_size=512), {}, 0
    for step, count in steps:
        if step == "grow":
            pages.grow(count)
            size += count
        elif step == "take":
            ids = pages.take(min(count, pages.free_count()))
            values = torch.rand(ids.numel()).view(-1, 1, 1, 1).expand(-1, *pages.pages.shape[1:])
            pages.scatter(ids, values)
            assert not held.keys() & set(ids.tolist())
            held |= {i: v for i, v in zip(ids.tolist(), values[:, 0, 0, 0].tolist(), strict=True)}
        else:
            ids = list(held)[:count]
            pages.give(torch.tensor(ids, dtype=torch.int32))
            for i in ids:
                del held[i]
        assert pages.free_count() + len(held) == size
        content = pages.gather(torch.tensor(list(held), dtype=torch.int32))
        assert content.amin((1, 2, 3)).tolist() == content.amax((1, 2, 3)).tolist() == list(held.values())


def test_slabs_stay_where_they_are_and_ids_are_distances():
    # A page of no power of two; float64 holds every id.
    pages = pool(True, pairs=16, head_size=96 * 64, dtype=torch.float64)
    pages.grow(3)
    start, moves = pages.pages.data_ptr(), pages.moves
    address = {}
    for count in (1, 2):
        pages.grow(count)
    ids = pages.take(6)
    pages.scatter(ids, ids.double().view(-1, 1, 1, 1).expand(-1, *pages.pages.shape[1:]).contiguous())
    for _, slab in pages._slabs:
        for page in slab:
            address[page.data_ptr()] = float(page[0, 0, 0])
    assert {at: (at - start) / pages.page_bytes for at in address} == address
    assert pages.pages.data_ptr() == start
    assert pages.moves == moves


@pytest.mark.parametrize("slabs", [False, True])
def test_bytes_are_those_of_its_tensors(slabs):
    pages = pool(slabs, pairs=256, head_size=512)
    pages.grow(3)
    pages.grow(2)
    spare = pages.page_bytes if slabs else 0
    assert pages.nbytes == 5 * pages.page_bytes + spare + 4 * pages.free.numel() + 4
