"""Loss of a text under several policies, through the cache that serves: nothing here is simulated by a mask.

Legend: N sequences, L tokens of each, B sequences read at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spkv.evals.policies import Policy
from spkv.gates import Gate, RandomGate
from spkv.hf.attach import attachment, dense
from spkv.hf.generation import CHUNK_SIZE, cache_size, check_length, read
from spkv.text import check_readable, document_batches, read_documents

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def cut_sequences(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Tokenise documents and cut each into pieces of `length` that do not overlap; what is left over is dropped.

    Special tokens that occur in the text are encoded as the text they are.

    Args:
        paths: files that `spkv.text` reads.
        tokenizer: the model's.
        length: L, at least 2.
        limit: sequences to return at most, spread evenly over the data; None takes all.
        progress: called after each batch of documents, with files done and in all.

    Returns:
        [N, L] int64.

    Raises:
        FileNotFoundError, ValueError: for files that cannot be read, or if no document has `length` tokens.
    """
    if length < 2:
        raise ValueError(f"sequence_length must be at least 2, not {length}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 sequence, not {limit}")
    if not paths:
        raise ValueError("no data files were given")
    for path in map(Path, paths):
        check_readable(path)
    pieces: list[Tensor] = []
    longest = 0
    for done, path in enumerate(map(Path, paths)):
        for texts, _ in document_batches(read_documents(path)):
            for ids in tokenizer(texts, split_special_tokens=True, verbose=False).input_ids:
                longest = max(longest, len(ids))
                pieces += torch.tensor(ids, dtype=torch.long).split(length)[: len(ids) // length]
            if progress is not None:
                progress("tokenising", done, len(paths))
    if progress is not None:
        progress("tokenising", len(paths), len(paths))
    if not pieces:
        raise ValueError(f"no document has {length:,} tokens (sequence_length); the longest has {longest:,}")
    count = len(pieces) if limit is None else min(limit, len(pieces))
    return torch.stack([pieces[index * len(pieces) // count] for index in range(count)])


def evaluate_nll(
    model: PreTrainedModel,
    sequences: Tensor,
    policies: Sequence[Policy],
    *,
    batch_size: int = 1,
    chunk_size: int = CHUNK_SIZE,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure loss and density of the same sequences under each policy.

    Args:
        model: an attached model in evaluation mode.
        sequences: [N, L] int64, from `cut_sequences`; longer than the window, so that there is something to prune.
        policies: from `make_policies`, or one's own.
        batch_size: B.
        chunk_size: tokens of a forward pass.
        progress: called after each chunk, with the tokens read and in all.

    Returns:
        A row a policy, in their order: policy, threshold (or None), loss (mean next-token cross-entropy, nats),
        density (at the ends of the sequences, over all layers, heads and sequences), kept_fraction, sequences,
        tokens (predicted).

    Raises:
        ValueError: for sequences that are not longer than the window, or exceed the model's positions.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if sequences.dim() != 2 or sequences.shape[0] == 0:
        raise ValueError(f"sequences must be [N, L] and not empty, got shape {list(sequences.shape)}")
    N, L = sequences.shape
    check_sequence_length(model, L)
    found = attachment(model)
    work = N * L * len(policies)
    rows: dict[int, dict[str, Any]] = {}
    densities: dict[float, float] = {}
    # Random gates come last: they copy a measured density.
    for index, policy in sorted(enumerate(policies), key=lambda item: item[1].match_threshold is not None):
        gate = _gate(policy, densities)
        loss = density = kept_fraction = 0.0
        with dense(model) if gate is None else found.using(gate):
            for first in range(0, N, batch_size):
                batch = sequences[first : first + batch_size]
                before = len(rows) * N * L + first * L

                def advance(tokens: int, before: int = before, share: int = len(batch)) -> None:
                    if progress is not None:
                        progress("evaluating", before + tokens * share, work)

                reading = read(model, batch, chunk_size=chunk_size, loss=True, progress=advance)
                size = cache_size(reading.cache)
                assert reading.loss is not None
                assert size.density is not None
                assert size.kept_fraction is not None
                # Lengths are equal, so means weighted by sequences are the quotients of the sums.
                loss += reading.loss * len(batch)
                density += size.density * len(batch)
                kept_fraction += size.kept_fraction * len(batch)
        rows[index] = {
            "policy": policy.name,
            "threshold": policy.threshold,
            "loss": loss / N,
            "density": density / N,
            "kept_fraction": kept_fraction / N,
            "sequences": N,
            "tokens": N * (L - 1),
        }
        if policy.name == "spkv" and policy.threshold is not None:
            densities[policy.threshold] = density / N
    return [rows[index] for index in range(len(policies))]


def check_sequence_length(model: PreTrainedModel, length: int) -> None:
    """Raise a ValueError if sequences of `length` tokens do not fit the model, or nothing of them would be pruned."""
    check_length(model.config, length)
    window = attachment(model).config.window
    if length <= window:
        raise ValueError(
            f"sequence_length must exceed the window of {window} tokens, which is never pruned; it is {length}"
        )


def _gate(policy: Policy, densities: dict[float, float]) -> Gate | None:
    if policy.match_threshold is None:
        return policy.gate
    if policy.match_threshold not in densities:
        raise ValueError(
            f"policy {policy.name} takes the density of spkv at threshold {policy.match_threshold}, "
            f"which is not evaluated; evaluated are {sorted(densities)}"
        )
    return RandomGate(densities[policy.match_threshold])
