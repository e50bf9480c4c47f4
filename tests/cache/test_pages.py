"""Page bookkeeping."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spkv.cache.pages import PageList, PoolFullError


def test_pages_are_handed_out_once_lowest_first():
    pages = PageList()
    pages.grow(4)
    assert pages.take(3) == [0, 1, 2]
    pages.grow(2)
    assert pages.in_use == 3
    assert sorted(pages.take(3)) == [3, 4, 5]
    assert pages.in_use == pages.capacity == 6


def test_shortfall_says_how_much_to_grow_and_the_limit_is_enforced():
    pages = PageList(limit=5)
    assert pages.shortfall(3) == 3
    pages.grow(100)
    assert pages.capacity == 5
    pages.take(3)
    assert pages.shortfall(2) == 0
    with pytest.raises(PoolFullError, match="3 pages are needed and 2 of 5 are free, but the pool may hold 5 at most"):
        pages.shortfall(3)
    with pytest.raises(PoolFullError, match="3 pages were asked for and 2 are free"):
        pages.take(3)
    with pytest.raises(ValueError, match="at least 1 or None, not 0"):
        PageList(limit=0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=40))
def test_no_page_is_ever_held_twice_or_lost(steps):
    pages, held = PageList(), []
    for take, count in steps:
        if take:
            pages.grow(pages.shortfall(count))
            taken = pages.take(count)
            assert not set(taken) & set(held)
            held += taken
        else:
            pages.give(held[:count])
            del held[:count]
        assert pages.in_use == len(held)
        assert all(0 <= page < pages.capacity for page in held)
