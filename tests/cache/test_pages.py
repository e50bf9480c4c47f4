"""Page bookkeeping on the host."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spkv.cache.pages import PageBudget, PoolFullError


def test_pages_are_spent_once_and_growth_covers_what_is_missing():
    budget = PageBudget()
    assert not budget.spend(1)
    assert budget.growth(3, wanted=0) == 3
    budget.grow(3)
    assert budget.spend(2)
    assert budget.growth(2, wanted=10) == 10
    assert budget.growth(2, wanted=0) == 1
    budget.learn(2)
    assert budget.spend(2)
    assert not budget.spend(1)


def test_the_limit_is_enforced():
    budget = PageBudget(limit=5)
    budget.grow(budget.growth(3, wanted=100))
    assert budget.capacity == 5
    assert budget.spend(3)
    with pytest.raises(PoolFullError, match="3 pages are needed and 2 of 5 are free, but the pool may hold 5 at most"):
        budget.growth(3, wanted=0)
    with pytest.raises(ValueError, match="at least 1 or None, not 0"):
        PageBudget(limit=0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), max_size=40), st.integers(1, 200))
def test_the_host_never_believes_in_more_free_pages_than_there_are(steps, limit):
    budget, truly_free = PageBudget(limit), 0
    for bound, taken, asks in steps:
        if asks:
            budget.learn(truly_free)
        if not budget.spend(bound):
            try:
                growth = budget.growth(bound, wanted=taken)
            except PoolFullError:
                continue
            budget.grow(growth)
            truly_free += growth
            assert budget.spend(bound)
        truly_free -= min(bound, taken)
        assert 0 <= budget.free <= truly_free <= budget.capacity <= limit
