"""The book of slabs: requests always hold what their next step can take, and give back what it did not."""

import random

import pytest

from spkv.serving.ledger import Ledger, SlabSizes

SIZES = SlabSizes(window=20, page_size=4, slab_tokens=8, density=0.25, chunk=32)


def test_growth_covers_every_fill_of_the_last_page():
    # A chain with s seen and m kept pairs takes pages for its ring and for ceil(m / 4).
    for seen in range(0, 50):
        for new in range(1, 30):
            ring = -(-min(seen + new, 20) // 4) + (-min(seen, 20) // 4)
            left, leaving = max(0, seen - 20), max(0, seen + new - 20) - max(0, seen - 20)
            worst = max(-(-(kept + leaving) // 4) + (-kept // 4) for kept in range(left + 1))
            assert SIZES.growth(seen, new) >= (ring + worst) / 2


def test_expected_lies_between_the_window_and_everything():
    for tokens in (1, 20, 21, 100, 1000):
        assert SIZES.most(min(tokens, 20)) <= SIZES.expected(tokens) <= SIZES.most(tokens)
    assert SIZES.expected(1000) < 0.4 * SIZES.most(1000)


def test_block_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of the cache's page size, 4, not 6"):
        SlabSizes(20, 4, 6, 0.5, 32)


def test_what_a_chunk_did_not_use_goes_back():
    ledger = Ledger(SIZES)
    assert ledger.missing("a", 32) == SIZES.most(32) == 4
    ledger.grant("a", 32, [7, 8, 9, 10])
    orders = ledger.orders()
    assert orders.grants == [(0, 0, [7, 8, 9, 10])]
    assert orders.rows == {"a": 0}
    assert ledger.missing("a", 64) == 4  # until the report comes, every slab may be in use
    assert ledger.report(orders.step, {"a": 2}) == {"a": 1}  # one stays for the next token
    assert ledger.missing("a", 33) == 0
    assert ledger.missing("a", 64) == 3
    ledger.grant("b", 8, [1])
    assert ledger.totals() == {"slabs_held": 4, "slabs_used": 2, "slabs_dense": 5, "slabs_returned": 1}


def test_steps_under_way_keep_their_slabs():
    ledger = Ledger(SIZES)
    ledger.grant("a", 32, [1, 2, 3, 4])
    first = ledger.orders()
    ledger.grant("a", 64, [5, 6, 7, 8])
    second = ledger.orders()
    assert second.grants == [(0, 4, [5, 6, 7, 8])]
    assert ledger.report(first.step, {"a": 1}) == {"a": 2}  # 1 in use, 4 promised, 1 for the next token
    assert ledger.report(second.step, {"a": 2}) == {"a": 3}


def test_reports_on_a_former_life_are_ignored():
    ledger = Ledger(SIZES)
    ledger.grant("a", 32, [1, 2, 3, 4])
    before = ledger.orders()
    ledger.release("a")
    assert ledger.report(before.step, {"a": 4}) == {}
    ledger.grant("a", 8, [5])
    assert ledger.report(before.step, {"a": 4}) == {}
    assert ledger.orders().grants == [(0, 0, [5])]


def test_a_request_released_before_its_step_leaves_no_orders():
    ledger = Ledger(SIZES)
    ledger.grant("a", 8, [1])
    ledger.grant("b", 8, [2])
    ledger.release("a")
    orders = ledger.orders()
    assert (orders.grants, orders.rows) == ([(1, 0, [2])], {"b": 1})
    ledger.grant("c", 8, [3])
    assert ledger.orders().grants == [(0, 0, [3])]  # in the row that became free


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_random_lives_never_take_more_than_they_hold(delay):
    """Chains keep at random; each step's true use stays within what was granted, however late reports are."""
    rng = random.Random(delay)
    ledger, free, held, state, reports = Ledger(SIZES), list(range(1000)), {}, {}, []
    chains = 3
    for step in range(400):
        for name in "abcd":
            if rng.random() < 0.03 and name in state:
                free += held.pop(name)
                del state[name]
                ledger.release(name)
            if rng.random() < 0.7:
                seen, kept = state.get(name, (0, [0] * chains))
                new = rng.choice([1, 1, 1, rng.randint(1, 32)])
                slabs = [free.pop() for _ in range(ledger.missing(name, seen + new))]
                ledger.grant(name, seen + new, slabs)
                held.setdefault(name, []).extend(slabs)
                leaving = max(0, seen + new - 20) - max(0, seen - 20)
                share = rng.choice([0, 0.3, 1])
                state[name] = seen + new, [k + sum(rng.random() < share for _ in range(leaving)) for k in kept]
        orders, used = ledger.orders(), {}
        for name in orders.rows:
            seen, kept = state[name]
            pages = sum(-(-min(seen, 20) // 4) - (-k // 4) for k in kept)
            used[name] = -(-pages // (2 * chains))
            assert used[name] <= len(held[name]), (step, name)
        reports.append((orders.step, used))
        while len(reports) > delay:
            for name, count in ledger.report(*reports.pop(0)).items():
                free += [held[name].pop() for _ in range(count)]
    assert len(free) + sum(map(len, held.values())) == len(set(free)) + sum(map(len, held.values())) == 1000
