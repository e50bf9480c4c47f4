"""Packing: documents laid one after the other into rows of equal length, each seeing only itself.

Legend: T tokens of a row (the sequence length), w window.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from spkv.training.tokens import Tokens

IGNORED = -100
"""The label that transformers leaves out of the loss."""


class PackedRows(Dataset[dict[str, Tensor]]):
    """The tokens of a corpus, cut into rows of T.

    A document that crosses the end of a row goes on in the next one as a segment of its own, with positions from 0:
    attention cannot reach back over the cut. What does not fill a last row is left out.

    Args:
        tokens: the corpus.
        sequence_length: T, at least 2.
        prefix: ids that every document begins with (`document_prefix`), for models that are lost without them: in a
            row that begins inside a document they take the place of its first tokens.

    Raises:
        ValueError: if the corpus does not fill one row, or the prefix does.
    """

    def __init__(self, tokens: Tokens, sequence_length: int, prefix: Sequence[int] = ()):
        if sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, not {sequence_length}")
        if len(prefix) >= sequence_length:
            raise ValueError(f"sequence_length must exceed the {len(prefix)} tokens that begin every text")
        if len(tokens.tokens) < sequence_length:
            raise ValueError(
                f"the data hold {len(tokens.tokens)} tokens, fewer than one row of {sequence_length}; "
                "give more text or a smaller sequence_length"
            )
        self.tokens, self.sequence_length = tokens, sequence_length
        self.prefix = np.asarray(prefix, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.tokens.tokens) // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids`, `labels`, `position_ids`, `segment_ids` of one row, each [T] int64.

        `labels` follow transformers' custom: labels[i] is the token at i, which the model predicts from i - 1. They
        are -100 at the first token of each segment, so that nothing is predicted across documents. `segment_ids`
        count the row's segments from 0.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        T = self.sequence_length
        first = index * T
        row = self.tokens.tokens[first : first + T].astype(np.int64)
        starts = self.tokens.document_starts
        begun = np.searchsorted(starts, first, "right")  # documents that began by here
        inner = starts[begun : np.searchsorted(starts, first + T)] - first
        if starts[begun - 1] != first:
            # What is left of a document may be shorter than the prefix.
            taken = min(len(self.prefix), inner[0] if len(inner) else T)
            row[:taken] = self.prefix[:taken]
        ids = torch.from_numpy(row)
        bounds = np.concatenate([[0], inner.astype(np.int64), [T]])
        lengths = np.diff(bounds)
        segments = np.repeat(np.arange(len(lengths)), lengths)
        labels = ids.clone()
        labels[bounds[:-1]] = IGNORED
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": torch.from_numpy(np.arange(T) - bounds[segments]),
            "segment_ids": torch.from_numpy(segments),
        }


class TrainingRows(Dataset[dict[str, Tensor]]):
    """The rows of a whole training run, in their final order: item i is row i of the run.

    The order is a function of (seed, i) alone: each pass over the data is shuffled anew. So it does not depend on
    the number of processes, and a resumed run finds its place by counting.

    Args:
        rows: the corpus' rows.
        length: rows in the run; more than the corpus holds means several passes.
        seed: of the order.
    """

    def __init__(self, rows: PackedRows, length: int, seed: int):
        self.rows, self.length, self.seed = rows, length, seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"row {index} of {self.length}")
        epoch, place = divmod(index, len(self.rows))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            self._epoch = epoch
        return self.rows[int(self._order[place])]

    def identity(self) -> dict[str, int]:
        """Return numbers that differ, but for chance, if data or order do: for recognising a run on resuming it."""
        first = self[0]["input_ids"].numpy().tobytes()
        return {"seed": self.seed, "rows": self.length, "corpus_rows": len(self.rows), "first_row": zlib.crc32(first)}


def spread(rows: PackedRows, tokens: int) -> Dataset[dict[str, Tensor]]:
    """Return evenly spaced rows that hold `tokens` at most, one at least."""
    count = min(len(rows), max(1, tokens // rows.sequence_length))
    return Subset(rows, [index * len(rows) // count for index in range(count)])


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack rows to a batch [B, T]."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def leaves_window(segment_ids: Tensor, window: int) -> Tensor:
    """Return bool [B, T]: True for the tokens that leave the window before their segment ends.

    Token s does if token s + w, the first query that sees s only through its gate, belongs to the same segment.
    These are the pairs that density counts and that the regulariser acts on.
    """
    B, T = segment_ids.shape
    leaves = torch.zeros(B, T, dtype=torch.bool, device=segment_ids.device)
    if window < T:
        leaves[:, : T - window] = segment_ids[:, window:] == segment_ids[:, : T - window]
    return leaves
