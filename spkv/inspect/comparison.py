"""Two inspections side by side: two checkpoints on the same texts, or one checkpoint on different texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spkv.inspect.inspection import Inspection

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Comparison:
    """What differs between two inspections of models with the same layers and heads.

    Attributes:
        layers: the model's index of each global layer.
        density: [2, L, Hkv] float64, of the first and of the second.
        utility: [2, L, Hkv] float64, means.
        agreement: [L, Hkv] float64, share of the pairs decided alike; None unless both read the same tokens.
        overlap: [L, Hkv] float64, pairs that both keep / pairs that one of them keeps, nan where neither keeps any;
            None unless both read the same tokens.
    """

    layers: tuple[int, ...]
    density: Tensor
    utility: Tensor
    agreement: Tensor | None
    overlap: Tensor | None

    def density_change(self) -> Tensor:
        """[L, Hkv] float64: the second's density minus the first's."""
        return self.density[1] - self.density[0]

    def correlation(self) -> float | None:
        """Of the heads' densities (Pearson); None if one of the two has the same density everywhere."""
        first, second = self.density.flatten(1)
        if not self.density.isfinite().all() or first.std() == 0 or second.std() == 0:
            return None
        return torch.corrcoef(torch.stack([first, second]))[0, 1].item()

    def to_dict(self) -> dict[str, Any]:
        """The comparison over all heads, as plain JSON values; None stands for what is not known."""
        return {
            "density": [_mean(own) for own in self.density],
            "utility": [_mean(own) for own in self.utility],
            "largest_change": _mean(self.density_change().abs().amax()),
            "correlation": self.correlation(),
            "agreement": None if self.agreement is None else _mean(self.agreement),
            "overlap": None if self.overlap is None else _mean(self.overlap.nanmean()),
        }

    def to_frame(self) -> pandas.DataFrame:
        """A row for every layer and head: both densities and mean utilities, and what is known of single pairs.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        from spkv.inspect.frames import import_pandas

        heads = self.density.shape[2]
        columns = {
            "layer": np.repeat(self.layers, heads),
            "head": np.tile(np.arange(heads), len(self.layers)),
            "density_first": self.density[0].flatten().numpy(),
            "density_second": self.density[1].flatten().numpy(),
            "utility_first": self.utility[0].flatten().numpy(),
            "utility_second": self.utility[1].flatten().numpy(),
        }
        for name, values in (("agreement", self.agreement), ("overlap", self.overlap)):
            if values is not None:
                columns[name] = values.flatten().numpy()
        return import_pandas().DataFrame(columns)


def compare(first: Inspection, second: Inspection) -> Comparison:
    """Compare two inspections; pair by pair if they read the same tokens with the same window.

    Raises:
        ValueError: if the models have other layers or numbers of heads.
    """
    shapes = [(i.layers, i.documents[0].densities.keep.shape[1]) for i in (first, second)]
    if shapes[0] != shapes[1]:
        (layers, heads), (other_layers, other_heads) = shapes
        raise ValueError(
            f"the models have different heads to compare: layers {list(layers)} with {heads} KV heads, and layers "
            f"{list(other_layers)} with {other_heads}"
        )
    agreement = overlap = None
    pieces = [[document.pieces for document in i.documents] for i in (first, second)]
    if pieces[0] == pieces[1] and first.window == second.window and first.left:
        a, b = first.keep(), second.keep()
        agreement = (a == b).double().mean(-1)
        overlap = (a & b).sum(-1).double() / (a | b).sum(-1)
    return Comparison(
        layers=first.layers,
        density=torch.stack([first.density_by_head(), second.density_by_head()]),
        utility=torch.stack([first.utility_by_head(), second.utility_by_head()]),
        agreement=agreement,
        overlap=overlap,
    )


def _mean(values: Tensor) -> float | None:
    mean = values.mean().item()
    return mean if mean == mean else None
