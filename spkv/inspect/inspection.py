"""An inspection: what a model keeps of some texts, head by head, as tensors and as plain JSON values.

Legend: L global layers, Hkv KV heads, T tokens of a document, w window, b bins, K later queries remembered.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spkv.hf.attach import attachment
from spkv.hf.generation import CHUNK_SIZE
from spkv.inspect.attended import STRONGEST, LaterQueries, LaterQueryFinder
from spkv.inspect.densities import TextDensities, encode_pieces, text_densities
from spkv.inspect.kinds import KINDS, count_kinds, describe, token_kinds
from spkv.inspect.memory import kv_bytes

POSITION_BINS = 64
UTILITY_BINS = 50
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
_UNDECIDED = (0.1, 0.9)


@dataclass(frozen=True)
class Document:
    """One text of an inspection.

    Attributes:
        name: what it is called.
        pieces: [T], its tokens as text.
        densities: utilities and decisions.
        later: where its tokens are attended to past the window; None if that was not asked for.
    """

    name: str
    pieces: list[str]
    densities: TextDensities
    later: LaterQueries | None = None

    @property
    def left(self) -> int:
        """Tokens that have left the window."""
        return max(0, self.densities.tokens - self.densities.window)

    def position_bins(self) -> list[tuple[int, int]]:
        """Ranges of positions, equal up to one token, that cover the tokens that have left the window."""
        bins = min(POSITION_BINS, self.left)
        edges = [self.left * i // bins for i in range(bins + 1)] if bins else []
        return list(itertools.pairwise(edges))

    def density_by_position(self) -> Tensor:
        """[L, Hkv, b] float64: density within each of `position_bins`."""
        keep = self.densities.keep.double()
        parts = [keep[:, :, start:stop].mean(-1) for start, stop in self.position_bins()]
        return torch.stack(parts, dim=-1) if parts else keep.new_zeros(*keep.shape[:2], 0)

    @functools.cached_property
    def kinds(self) -> Tensor:
        """[T] int64, indices into `KINDS`."""
        return token_kinds(self.pieces)


@dataclass(frozen=True)
class Inspection:
    """What a model keeps of some documents. All have the same layers, heads and window.

    Attributes:
        model: its name.
        threshold: in force; None if the gate has none.
        documents: at least one.
        memory: as `kv_bytes` gives it.
        facts: further entries for the JSON file.
        sinks: first positions of a document that every head keeps.
    """

    model: str
    threshold: float | None
    documents: list[Document]
    memory: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    sinks: int = 0

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's index of each global layer."""
        return self.documents[0].densities.layers

    @property
    def window(self) -> int:
        """w."""
        return self.documents[0].densities.window

    @property
    def left(self) -> int:
        """Tokens that have left the window, over all documents."""
        return sum(document.left for document in self.documents)

    def keep(self) -> Tensor:
        """[L, Hkv, left] bool: the decisions about the pairs that have left the window, documents joined."""
        return torch.cat([d.densities.keep[:, :, : d.left] for d in self.documents], dim=2)

    def utilities(self) -> Tensor:
        """[L, Hkv, left] float32: their utilities."""
        return torch.cat([d.densities.utilities[:, :, : d.left] for d in self.documents], dim=2)

    def density_by_head(self) -> Tensor:
        """[L, Hkv] float64; nan where nothing has left the window."""
        return self.keep().double().mean(-1)

    def density_beyond_sinks(self) -> Tensor:
        """[L, Hkv] float64, without the pairs at `sinks`, whose number a longer text does not change; nan as above."""
        beyond = torch.cat([torch.arange(d.left) >= self.sinks for d in self.documents])
        return self.keep()[:, :, beyond].double().mean(-1)

    def utility_by_head(self) -> Tensor:
        """[L, Hkv] float64: mean utility of the pairs that have left the window; nan where there are none."""
        return self.utilities().double().mean(-1)

    def density(self) -> float | None:
        """Density over all documents, layers and heads; None if nothing has left the window."""
        return self.density_by_head().mean().item() if self.left else None

    def kept_fraction(self) -> float:
        """Pairs held at the ends of the documents / pairs that dense caches would hold."""
        tokens = [document.densities.tokens for document in self.documents]
        held = sum(d.densities.kept_fraction() * n for d, n in zip(self.documents, tokens, strict=True))
        return held / sum(tokens)

    def utility_histogram(self) -> Tensor:
        """[L, Hkv, UTILITY_BINS] int64: pairs that have left the window, by utility in equal bins of [0, 1]."""
        index = (self.utilities() * UTILITY_BINS).long().clamp(0, UTILITY_BINS - 1)
        counts = torch.zeros(*index.shape[:2], UTILITY_BINS, dtype=torch.long)
        return counts.scatter_add_(2, index, torch.ones_like(index))

    def undecided(self) -> Tensor:
        """[L, Hkv] float64: share of utilities strictly between 0.1 and 0.9; 0 for perfectly sharp gates."""
        utility = self.utilities()
        return ((utility > _UNDECIDED[0]) & (utility < _UNDECIDED[1])).double().mean(-1)

    def kind_counts(self) -> tuple[Tensor, Tensor]:
        """Tokens that have left the window by kind, and how many each head keeps: [kinds] and [L, Hkv, kinds]."""
        kinds = torch.cat([document.kinds[: document.left] for document in self.documents])
        return count_kinds(kinds, self.keep())

    def early_and_late(self) -> tuple[Tensor, Tensor]:
        """[L, Hkv] float64 twice: density in the first tenth of each document's positions, and in the others."""
        first = torch.cat([torch.arange(d.left) * 10 < d.left for d in self.documents])
        keep = self.keep().double()
        return keep[:, :, first].mean(-1), keep[:, :, ~first].mean(-1)

    def words(self) -> dict[str, Any]:
        """What the heads keep, in words: `all` together, and `heads` [L][Hkv]."""
        if not self.left:
            nothing = "has nothing to keep yet: no token has left the window"
            return {"all": nothing, "heads": [[nothing] * self.keep().shape[1] for _ in self.layers]}
        counts, kept = self.kind_counts()
        density, (first, rest) = self.density_by_head(), self.early_and_late()

        def sentence(density: Tensor, kept: Tensor, early: Tensor) -> str:
            # A first tenth of a few hundred tokens holds little but the first sentences.
            tells = self.left >= 1000 and bool(early.isfinite())
            return describe(density.item(), counts.tolist(), kept.tolist(), early.item() if tells else None)

        return {
            "all": sentence(density.mean(), kept.double().mean((0, 1)), first.mean() / rest.mean()),
            "heads": [
                [sentence(*head) for head in zip(*layer, strict=True)]
                for layer in zip(density, kept, first / rest, strict=True)
            ],
        }

    def summary(self) -> dict[str, Any]:
        """Everything but the tokens, as plain JSON values; null stands where nothing has left the window."""
        counts, kept = self.kind_counts()
        utility = self.utilities()
        return {
            "model": self.model,
            "threshold": self.threshold,
            **self.facts,
            "window": self.window,
            "sinks": self.sinks,
            "layers": list(self.layers),
            "kv_heads": utility.shape[1],
            "tokens": sum(document.densities.tokens for document in self.documents),
            "density": self.density(),
            "kept_fraction": self.kept_fraction(),
            "density_by_head": _nested(self.density_by_head()),
            "utility_by_head": _nested(self.utility_by_head()),
            "utility_histogram": self.utility_histogram().tolist(),
            "undecided_by_head": _nested(self.undecided()),
            "density_at_threshold": [
                {"threshold": t, "by_head": _nested((utility >= t).double().mean(-1))} for t in THRESHOLDS
            ],
            "kinds": {"names": list(KINDS), "tokens": counts.tolist(), "kept": kept.tolist()},
            "words": self.words(),
            "memory": self.memory,
        }


def inspect_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, str]],
    *,
    name: str = "model",
    limit: int | None = None,
    strongest: int = STRONGEST,
    chunk_size: int = CHUNK_SIZE,
    progress: Callable[[str, int, int], None] | None = None,
) -> Inspection:
    """Read texts, each into a cache of its own with the gate in force, and return what the model keeps of them.

    Args:
        model: an attached model in evaluation mode.
        tokenizer: its own, a fast one.
        texts: name and text of each document.
        name: of the model, for titles.
        limit: tokens of a document to read at most.
        strongest: later queries to remember for every pair; 0 saves the time of finding them.
        chunk_size: tokens of a forward pass.
        progress: called with a document's name, the tokens of it read so far, and in all.

    Raises:
        ValueError: if there is no text, one is empty or exceeds the model's positions, or the gate is soft.
    """
    if not texts:
        raise ValueError("there is no text to inspect")
    if strongest < 0:
        raise ValueError(f"the number of later queries must be at least 0, not {strongest}")
    found = attachment(model)
    documents = []
    for title, text in texts:
        input_ids, pieces = encode_pieces(tokenizer, text, limit)
        finder = LaterQueryFinder(found.config.window, strongest) if strongest else None
        report = None if progress is None else functools.partial(_report, progress, title, len(pieces))
        with nullcontext() if finder is None else found.observing(finder):
            densities = text_densities(model, input_ids, chunk_size=chunk_size, progress=report)
        documents.append(Document(title, pieces, densities, None if finder is None else finder.result()))
    result = Inspection(name, getattr(found.gate, "threshold", None), documents, sinks=found.config.sinks)
    result.memory.extend(kv_bytes(found, result.density_beyond_sinks(), model.dtype))
    return result


def _report(progress: Callable[[str, int, int], None], title: str, total: int, done: int) -> None:
    progress(f"reading {title}", done, total)


def _nested(values: Tensor) -> list[Any]:
    """As lists, null for nan: JSON has no nan."""
    return [[None if cell != cell else cell for cell in row] for row in values.tolist()]
