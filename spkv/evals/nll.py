"""Loss of a text, through the cache that serves; or, if asked for, computed with a mask.

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

from spkv.evals.presses import check_press_length, pressing
from spkv.evals.session import Session, token_losses
from spkv.hf.attach import find_attachment
from spkv.hf.generation import CacheSize
from spkv.text import check_readable, document_batches, prefix_ids, read_documents

CONTINUATION = 128
"""Tokens at the end of a sequence whose loss is also measured by itself."""
BUCKETS = 16
"""Parts of a sequence by which the loss is told apart."""

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

    What the tokenizer puts in front of a text, such as `<bos>`, stands in front of every piece and counts in its
    length: models that were trained with it predict badly without. Special tokens that occur in the text are encoded
    as the text they are.

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
    prefix = prefix_ids(tokenizer)
    room = length - len(prefix)
    if room < 1:
        raise ValueError(f"sequence_length must exceed the {len(prefix)} tokens that begin every text; it is {length}")
    pieces: list[Tensor] = []
    longest = 0
    for done, path in enumerate(map(Path, paths)):
        for texts, _ in document_batches(read_documents(path)):
            for ids in tokenizer(texts, split_special_tokens=True, verbose=False).input_ids:
                longest = max(longest, len(ids))
                body = torch.tensor(ids[len(prefix) :], dtype=torch.long)
                begun = torch.tensor(prefix, dtype=torch.long)
                pieces += [torch.cat([begun, piece]) for piece in body.split(room)[: len(body) // room]]
            if progress is not None:
                progress("tokenising", done, len(paths))
    if progress is not None:
        progress("tokenising", len(paths), len(paths))
    if not pieces:
        raise ValueError(f"no document has {length:,} tokens (sequence_length); the longest has {longest:,}")
    count = len(pieces) if limit is None else min(limit, len(pieces))
    return torch.stack([pieces[index * len(pieces) // count] for index in range(count)])


class Losses:
    """The loss of sequences, run: over all their tokens, by position, and over the last of them.

    What stands before the last tokens, the continuation, is the context: methods that prune when a context has been
    read are measured on the continuation alone. It is as long as the usual window, so that what they keep of it
    gives them no advantage.

    A sequence that exceeds the model's positions is read in windows of as many tokens as fit, each into an empty
    cache: the first as it is, the others with their first half for context only.

    Args:
        sequences: [N, L] int64, from `cut_sequences`.
        prefix: ids that each of them begins with; each further window of a long one begins with them, too.

    Attributes:
        name: "nll".
        length: L.
        count: N.
    """

    name = "nll"

    def __init__(self, sequences: Tensor, prefix: Sequence[int] = ()):
        if sequences.dim() != 2 or sequences.shape[0] == 0:
            raise ValueError(f"sequences must be [N, L] and not empty, got shape {list(sequences.shape)}")
        self.sequences, self.prefix = sequences, list(prefix)
        self.count, self.length = sequences.shape
        self.continuation = max(1, min(CONTINUATION, self.length // 4))

    def identity(self) -> dict[str, Any]:
        """What a saved evaluation of the same sequences must agree in."""
        return {"sequences": self.sequences.tolist()}

    def check(self, model: PreTrainedModel, press: str | None = None, *, oracle: bool = False) -> None:
        """Raise a ValueError if nothing of the sequences would be pruned, or a method cannot measure them."""
        found = find_attachment(model)
        if found is not None and self.length <= found.config.window:
            raise ValueError(
                f"sequence_length must exceed the window of {found.config.window} tokens, which is never pruned; it is "
                f"{self.length}"
            )
        if press is None:
            return
        if oracle:
            raise ValueError(f"policy {press} prunes a cache, so it cannot be computed with a mask (--oracle)")
        if len(self._windows(model)) > 1:
            positions = model.config.get_text_config().max_position_embeddings
            raise ValueError(
                f"policy {press} reads a context at once: sequences of {self.length:,} tokens exceed the model's "
                f"{positions:,} positions"
            )
        check_press_length(press, self.length - self.continuation)

    def batches(self, model: PreTrainedModel, batch_size: int) -> list[list[int]]:
        """Sequences that are read together."""
        indices = list(range(self.count))
        return [indices[start : start + batch_size] for start in range(0, self.count, batch_size)]

    def run(
        self,
        model: PreTrainedModel,
        batch: Sequence[int],
        *,
        chunk_size: int,
        press: str | None = None,
        kept_fraction: float | None = None,
        oracle: bool = False,
    ) -> list[dict[str, Any]]:
        """Read, under the policy in force; a record for each sequence of the batch."""
        whole = self.sequences[list(batch)]
        losses: list[list[Tensor]] = [[] for _ in batch]
        for start, first, stop in self._windows(model):
            # Every window but the first is short of a beginning.
            begun = torch.tensor([self.prefix] * len(batch), dtype=torch.long) if start else whole[:, :0]
            ids = torch.cat([begun.view(len(batch), -1), whole[:, start:stop]], dim=1)
            if oracle:
                read, sizes, before = _masked(model, ids, self.continuation)
            else:
                read, sizes, before = self._read(model, ids, chunk_size, press, kept_fraction)
            for place, row in enumerate(read):
                losses[place].append(row[len(row) - (stop - first) :] if first else row)
        return [
            {
                "example": index,
                "tokens": self.length,
                **self._measure(torch.cat(losses[place]).double()),
                "density": sizes[place].density,
                "kept_fraction": sizes[place].kept_fraction,
                "context_density": before[place].density,
                "context_kept_fraction": before[place].kept_fraction,
                "kv_bytes": None if oracle else sizes[place].kv_bytes,
            }
            for place, index in enumerate(batch)
        ]

    def _read(
        self, model: PreTrainedModel, ids: Tensor, chunk_size: int, press: str | None, kept_fraction: float | None
    ) -> tuple[list[Tensor], list[CacheSize], list[CacheSize]]:
        """Losses of each row's tokens, and how much is held at its end and in front of the continuation."""
        session = Session(model, chunk_size=chunk_size)
        context, rest = ids[:, : -self.continuation].tolist(), ids[:, -self.continuation :].tolist()
        if press is None:
            losses = session.read(context, losses=True)
        else:
            assert kept_fraction is not None
            session.read(context, pressing=pressing(press, model, kept_fraction))
            losses = [ids.new_empty(0, dtype=torch.float32)] * len(ids)
        before = session.sizes()
        losses = [torch.cat(pair) for pair in zip(losses, session.read(rest, losses=True), strict=True)]
        return losses, session.sizes(), before

    def _measure(self, losses: Tensor) -> dict[str, Any]:
        """Means of the losses of the tokens 1, 2, ..., or of the last ones alone."""
        positions = torch.arange(self.length - len(losses), self.length)
        width = -(-self.length // BUCKETS)
        by_position = []
        for start in range(0, self.length, width):
            inside = (positions >= start) & (positions < start + width)
            # A bucket that was read in part would be compared with whole ones.
            whole = int(inside.sum()) == min(width, self.length - start) - (start == 0)
            mean = losses[inside].mean().item() if whole and bool(inside.any()) else None
            by_position.append({"start": start, "stop": min(start + width, self.length), "loss": mean})
        complete = len(losses) == self.length - 1
        return {
            "loss": losses.mean().item() if complete else None,
            "continuation_loss": losses[-self.continuation :].mean().item(),
            "by_position": by_position,
        }

    def _windows(self, model: PreTrainedModel) -> list[tuple[int, int, int]]:
        """(start, first, stop) of each window: tokens start to stop are read, and first to stop are counted."""
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or self.length
        if self.length <= limit:
            return [(0, 0, self.length)]
        windows, stop, room = [(0, 0, limit)], limit, limit - len(self.prefix)
        while stop < self.length:
            start = min(stop - room // 2, self.length - room)
            windows.append((start, stop, start + room))
            stop = start + room
        return windows


def _masked(
    model: PreTrainedModel, ids: Tensor, continuation: int
) -> tuple[list[Tensor], list[CacheSize], list[CacheSize]]:
    """What `Losses._read` measures, from one forward pass with the gate in force as a mask; no cache, so no bytes."""
    found = find_attachment(model)
    ids = ids.to(model.device)
    if found is None or found.suspended:
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        sizes = [CacheSize(1.0, 1.0, 0, 0)] * len(ids)
        return list(token_losses(None, logits, ids).cpu()), sizes, sizes
    oracle, found.oracle = found.oracle, True
    try:
        with torch.no_grad(), found.record() as record:
            logits = model(ids, use_cache=False).logits
    finally:
        found.oracle = oracle
    window = found.config.window
    position = torch.arange(ids.shape[1], device=ids.device)[None]
    full = torch.ones(len(ids), found.decoder.kv_heads, ids.shape[1], device=ids.device)
    layers = found.decoder.global_layers
    keep = [found.keep(layer, record.utilities.get(layer, full), position) for layer in layers]
    decisions = torch.stack(keep, dim=1).double().flatten(1, 2)  # [B, layers * Hkv, L]

    def sizes_at(tokens: int) -> list[CacheSize]:
        gone = max(tokens - window, 0)
        kept = decisions[:, :, :gone].mean(1).sum(1).tolist()
        return [CacheSize(k / gone if gone else None, (k + tokens - gone) / tokens, 0, 0) for k in kept]

    length = ids.shape[1]
    return list(token_losses(None, logits, ids).cpu()), sizes_at(length), sizes_at(length - continuation)
