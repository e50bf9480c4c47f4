"""Requests side by side: which go together, and that every token comes back to its place."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spkv.serving.chunks import groups

CPU = torch.device("cpu")


def starts_of(lengths):
    return [0, *itertools.accumulate(lengths)]


@given(lengths=st.lists(st.integers(1, 900), min_size=1, max_size=12), data=st.data())
def test_tokens_go_there_and_back(lengths, data):
    starts, first = starts_of(lengths), data.draw(st.integers(0, len(lengths)))
    tokens = torch.arange(starts[-1] * 2).view(-1, 2)
    seen = 0
    for group in groups([*starts, *starts[-1:] * 2], first, CPU):  # the last two have no tokens
        assert group.requests.start == first + seen
        rows = group.side_by_side(tokens)  # two heads
        own = [tokens[starts[i] : starts[i + 1]].T for i in range(group.requests.start, group.requests.stop)]
        assert rows.shape == (len(own), 2, max(part.shape[1] for part in own))
        for row, part in zip(rows, own, strict=True):
            assert torch.equal(row[:, : part.shape[1]], part)
        assert torch.equal(group.one_after_another(rows), tokens[group.tokens])
        if group.lengths is not None:
            assert group.lengths.tolist() == group.valid.sum(1).tolist() == [part.shape[1] for part in own]
            assert group.valid[:, 0].all()
            assert len(own) <= 32
        seen += len(own)
    assert seen == len(lengths) - first


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([2048], [1]),
        ([2000, 30], [2]),  # padding does not double them
        ([2000, 30, 30], [2, 1]),
        ([30, 30, 2000], [2, 1]),
        ([60, 20, 7, 3], [4]),  # few
        ([500, 300, 400, 450], [4]),
        ([1000, 100, 100, 100], [2, 2]),
        ([100] * 70, [32, 32, 6]),
        ([30, 0, 0], [1]),
        ([0, 0], []),
    ],
)
def test_padding_at_most_doubles_what_stands_side_by_side(lengths, sizes):
    found = groups(starts_of(lengths), 0, CPU)
    assert [group.requests.stop - group.requests.start for group in found] == sizes


def test_a_single_request_is_not_copied():
    tokens = torch.randn(50, 2, 4)
    (group,) = groups([20, 50], 0, CPU)
    assert group.lengths is None
    assert group.side_by_side(tokens).data_ptr() == tokens[20:].data_ptr()
