"""Page bookkeeping on the host."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spkv.cache.pages import MemoryBound, PageBudget, PoolFullError, plan_growth


def test_growth_covers_what_is_missing_and_more_where_it_is_wanted():
    budget = PageBudget(page_bytes=10)
    assert plan_growth([(budget, 3, 0)]) == [3]
    budget.grow(3)
    budget.spend(2)
    assert plan_growth([(budget, 1, 10)]) == [0]
    assert plan_growth([(budget, 2, 10)]) == [10]
    assert plan_growth([(budget, 2, 0)]) == [1]
    budget.learn(2)
    assert plan_growth([(budget, 2, 9)]) == [0]


def test_pools_share_a_bound():
    bound = MemoryBound(100)
    rings, kept = PageBudget(20, bound), PageBudget(5, bound)
    assert plan_growth([(rings, 2, 100), (kept, 4, 100)]) == [4, 4]  # what is needed comes before what is wanted
    rings.grow(3)
    kept.grow(4)
    assert bound.used() == 80
    with pytest.raises(PoolFullError, match=r"3 more pages \(30 bytes\) are needed, and 20 of max_memory's 100"):
        plan_growth([(rings, 4, 0), (kept, 6, 0)])
    assert plan_growth([(rings, 4, 0), (kept, 4, 0)]) == [1, 0]
    with pytest.raises(ValueError, match="at least 1 or None, not 0"):
        MemoryBound(0)


def test_what_is_held_back_for_one_pool_is_not_there_for_others():
    bound = MemoryBound(100)
    rings, kept = PageBudget(20, bound), PageBudget(5, bound)
    rings.held_back = 3
    assert plan_growth([(kept, 1, 100)]) == [8]
    kept.grow(8)
    with pytest.raises(PoolFullError, match="1 more pages"):
        plan_growth([(rings, 0, 0), (kept, 9, 0)])
    assert plan_growth([(rings, 3, 100)]) == [3]
    rings.grow(3)
    assert bound.used() == 100
    with pytest.raises(PoolFullError, match="0 of max_memory's 100 bytes"):
        plan_growth([(rings, 4, 0)])


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), max_size=40), st.integers(1, 200))
def test_the_host_never_believes_in_more_free_pages_than_there_are(steps, most):
    budget, truly_free = PageBudget(3, MemoryBound(most)), 0
    for count, taken, asks in steps:
        if asks:
            budget.learn(truly_free)
        try:
            (growth,) = plan_growth([(budget, count, taken)])
        except PoolFullError:
            assert budget.bound.used() + 3 * (count - budget.free) > most
            continue
        if growth:
            budget.grow(growth)
            truly_free += growth
        budget.spend(count)
        truly_free -= min(count, taken)
        assert 0 <= budget.free <= truly_free <= budget.capacity
        assert budget.bound.used() == 3 * budget.capacity <= most
