"""What a model keeps of one text: utilities and decisions of every layer, head and token, and a report of them.

Legend: layers are the model's global attention layers, Hkv KV heads, T tokens, w window.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spkv.gates import Gate
from spkv.hf.attach import Attachment, attachment
from spkv.hf.generation import CHUNK_SIZE, read
from spkv.inspect.report import plot_density, write_token_page

DENSITY_PLOT, TOKEN_PAGE, DENSITIES = "density.png", "tokens.html", "densities.json"


@dataclass(frozen=True)
class TextDensities:
    """The decisions about one text. They are final: what follows the text does not change them.

    Attributes:
        layers: the model's index of each row below.
        utilities: [layers, Hkv, T] float32; 1 in a global layer without a predictor, which keeps everything.
        keep: [layers, Hkv, T] bool, the gate's decisions; those of the last w tokens take effect later.
        window: w.
    """

    layers: tuple[int, ...]
    utilities: Tensor
    keep: Tensor
    window: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.keep.shape[2]

    def density_by_head(self) -> Tensor:
        """[layers, Hkv] float64: kept pairs / pairs that left the window; nan where none has left it."""
        return self.keep[:, :, : max(0, self.tokens - self.window)].double().mean(-1)

    def density(self) -> float | None:
        """Density over all layers and heads; None if nothing has left the window."""
        return self.density_by_head().mean().item() if self.tokens > self.window else None

    def kept_fraction(self) -> float:
        """Pairs held at the end of the text / pairs that a dense cache would hold."""
        held = min(self.tokens, self.window) + (self.density() or 0.0) * max(0, self.tokens - self.window)
        return held / self.tokens

    def kept_share(self) -> Tensor:
        """[T] float64: the share of all layers' KV heads that keep each token."""
        return self.keep.double().mean((0, 1))


def text_densities(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    chunk_size: int = CHUNK_SIZE,
    progress: Callable[[int], None] | None = None,
) -> TextDensities:
    """Read a text with the gate in force and return what it keeps.

    Args:
        model: an attached model in evaluation mode.
        input_ids: [1, T] int64.
        chunk_size: tokens of a forward pass; does not change the result but for rounding.
        progress: called with the number of tokens read so far.

    Raises:
        ValueError: if the model is not attached, the gate is soft, or the text exceeds the model's positions.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"input_ids must be one text, [1, tokens], got shape {list(input_ids.shape)}")
    reading = read(model, input_ids, chunk_size=chunk_size, record=True, progress=progress)
    return decisions(attachment(model), reading.utilities, tokens=input_ids.shape[1])


def decisions(
    found: Attachment, utilities: dict[int, Tensor], gate: Gate | None = None, tokens: int | None = None
) -> TextDensities:
    """Turn recorded utilities, layer index -> [1, Hkv, T], into decisions of the gate in force, or of another.

    A static layout records nothing and needs `tokens`, T; its utilities are 1 where it keeps and 0 elsewhere.

    Raises:
        ValueError: if the gate does not decide (it is soft), or nothing was recorded.
    """
    layers, static = found.decoder.global_layers, found.config.layout is not None
    if utilities:
        some = next(iter(utilities.values()))
    elif static and tokens is not None:
        some = torch.ones(1, found.decoder.kv_heads, tokens)
    else:
        raise ValueError("no utilities were recorded")
    position = torch.arange(some.shape[2])[None]
    rows = [utilities.get(layer, torch.ones_like(some)) for layer in layers]
    keep = torch.cat([found.keep(layer, row, position, gate) for layer, row in zip(layers, rows, strict=True)])
    return TextDensities(layers, keep.float() if static else torch.cat(rows), keep, found.config.window)


def encode_pieces(tokenizer: PreTrainedTokenizerBase, text: str, limit: int | None = None) -> tuple[Tensor, list[str]]:
    """Tokenise a text, and cut it into the pieces that its tokens stand for.

    The text's offsets are used: decoding tokens one by one would lose spaces and split characters. Of a character
    made of several tokens the first has it all.

    Args:
        tokenizer: a fast one.
        text: any.
        limit: tokens to take at most.

    Returns:
        [1, T] int64, and T pieces; special tokens that the tokenizer adds have an empty one.

    Raises:
        ValueError: for a slow tokenizer, an empty text, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"the number of tokens must be at least 1, not {limit}")
    if not tokenizer.is_fast:
        raise ValueError(f"a fast tokenizer is needed, not {type(tokenizer).__name__}")
    encoded = tokenizer(text, return_offsets_mapping=True, split_special_tokens=True, verbose=False)
    pieces, end = [], 0
    for _, stop in encoded.offset_mapping[:limit]:
        pieces.append(text[end:stop])
        end = max(end, stop)
    if not pieces:
        raise ValueError("the text is empty")
    return torch.tensor([encoded.input_ids[:limit]], dtype=torch.long), pieces


def write_report(
    densities: TextDensities,
    pieces: list[str],
    directory: str | os.PathLike[str],
    *,
    title: str,
    facts: dict[str, Any],
    summary: dict[str, str] | None = None,
) -> dict[str, str]:
    """Write a heat map of the densities, a page with every token shaded, and the numbers as JSON.

    Args:
        densities: of one text.
        pieces: [T], its tokens as text.
        directory: made if needed; files of the same names are replaced.
        title: of the plot and the page.
        facts: entries put in front of the JSON file (model, threshold).
        summary: the page's small table.

    Returns:
        The paths written, by kind: density_png, token_page, densities_json.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    by_head = densities.density_by_head()
    plot_density(by_head.numpy(), directory / DENSITY_PLOT, title=title, layer_indices=densities.layers)
    write_token_page(
        directory / TOKEN_PAGE,
        pieces,
        densities.kept_share().numpy(),
        title=title,
        summary=summary,
        window=densities.window,
    )
    left = densities.tokens > densities.window
    values = {
        **facts,
        "tokens": densities.tokens,
        "window": densities.window,
        "density": densities.density(),
        "kept_fraction": densities.kept_fraction(),
        "layers": list(densities.layers),
        # JSON has no nan: null says that nothing has left the window.
        "density_by_head": by_head.tolist() if left else [[None] * by_head.shape[1]] * by_head.shape[0],
        "kept_share": densities.kept_share().tolist(),
    }
    (directory / DENSITIES).write_text(json.dumps(values) + "\n", encoding="utf-8")
    names = {"density_png": DENSITY_PLOT, "token_page": TOKEN_PAGE, "densities_json": DENSITIES}
    return {kind: str(directory / name) for kind, name in names.items()}
