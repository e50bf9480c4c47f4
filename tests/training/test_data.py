from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spkv.training.data import IGNORED, PackedRows, TrainingRows, collate, leaves_window, spread
from spkv.training.tokens import Tokens


def corpus(lengths: list[int]) -> Tokens:
    """Tokens that say where they stand."""
    return Tokens(np.arange(sum(lengths), dtype=np.uint16), np.cumsum([0, *lengths[:-1]]))


document_lengths = st.lists(st.integers(1, 23), min_size=1, max_size=30)


@given(document_lengths, st.integers(2, 17))
def test_packing(lengths: list[int], sequence_length: int) -> None:
    tokens = corpus(lengths)
    if sum(lengths) < sequence_length:
        with pytest.raises(ValueError, match="fewer than one row"):
            PackedRows(tokens, sequence_length)
        return
    rows = PackedRows(tokens, sequence_length)
    document = np.repeat(np.arange(len(lengths)), lengths)
    ids = torch.cat([row["input_ids"] for row in rows]).numpy()
    assert (ids == np.arange(sum(lengths) // sequence_length * sequence_length)).all()  # all tokens, in order
    for row in rows:
        ids, labels, position, segment = (
            row[name].numpy() for name in ("input_ids", "labels", "position_ids", "segment_ids")
        )
        for t in range(sequence_length):
            starts = t == 0 or document[ids[t]] != document[ids[t - 1]]
            assert labels[t] == (IGNORED if starts else ids[t])
            assert position[t] == (0 if starts else position[t - 1] + 1)
            assert segment[t] == (0 if t == 0 else segment[t - 1] + starts)


@given(document_lengths, st.integers(3, 17))
def test_rows_that_begin_inside_a_document_begin_with_the_prefix(lengths: list[int], sequence_length: int) -> None:
    if sum(lengths) < sequence_length:
        return
    tokens = corpus(lengths)
    prefix = [1000, 1001]
    for plain, begun in zip(
        PackedRows(tokens, sequence_length), PackedRows(tokens, sequence_length, prefix), strict=True
    ):
        first, length = int(plain["input_ids"][0]), int((plain["segment_ids"] == 0).sum())
        taken = 0 if first in tokens.document_starts else min(2, length)
        assert begun["input_ids"].tolist() == [*prefix[:taken], *plain["input_ids"].tolist()[taken:]]
        assert torch.equal(begun["segment_ids"], plain["segment_ids"])
        assert (begun["labels"] == torch.where(plain["labels"] == IGNORED, IGNORED, begun["input_ids"])).all()
    assert tokens.tokens.tolist() == list(range(sum(lengths)))
    with pytest.raises(ValueError, match="must exceed the 2 tokens"):
        PackedRows(tokens, 2, prefix)


@given(document_lengths, st.integers(1, 20))
def test_leaves_window_follows_its_definition(lengths: list[int], window: int) -> None:
    segment = np.repeat(np.arange(len(lengths)), lengths)
    ends = np.cumsum(lengths)[segment] - 1
    expected = ends - np.arange(len(segment)) >= window
    assert (leaves_window(torch.from_numpy(segment)[None], window)[0].numpy() == expected).all()


def test_training_rows_shuffle_each_pass_and_depend_on_index_and_seed_alone() -> None:
    rows = PackedRows(corpus([7] * 12), 7)
    order = [int(row["input_ids"][0]) // 7 for row in TrainingRows(rows, 30, seed=3)]
    assert sorted(order[:12]) == sorted(order[12:24]) == list(range(12))
    assert order[:12] != order[12:24]
    again = TrainingRows(rows, 30, seed=3)
    assert [int(again[i]["input_ids"][0]) // 7 for i in reversed(range(30))] == order[::-1]
    assert [int(row["input_ids"][0]) // 7 for row in TrainingRows(rows, 30, seed=4)] != order


def test_spread_takes_evenly_spaced_rows() -> None:
    rows = PackedRows(corpus([10] * 10), 10)
    assert [int(row["input_ids"][0]) for row in spread(rows, 35)] == [0, 30, 60]
    assert len(spread(rows, 1)) == 1
    assert len(spread(rows, 10**6)) == 10


def test_collate_stacks() -> None:
    rows = PackedRows(corpus([5, 9]), 7)
    batch = collate([rows[0], rows[1]])
    assert {name: list(value.shape) for name, value in batch.items()} == {name: [2, 7] for name in rows[0]}
    assert (batch["input_ids"][1] == rows[1]["input_ids"]).all()


def test_rows_beyond_the_last_are_refused() -> None:
    rows = PackedRows(corpus([20]), 7)
    with pytest.raises(IndexError):
        rows[2]
    with pytest.raises(ValueError, match="at least 2"):
        PackedRows(corpus([20]), 1)
