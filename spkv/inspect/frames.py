"""Inspections as pandas data frames. pandas is imported when one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spkv.inspect.inspection import Document, Inspection
from spkv.inspect.kinds import KINDS

if TYPE_CHECKING:
    import pandas


def heads_frame(inspection: Inspection) -> pandas.DataFrame:
    """A row for every layer and head: layer, head, density, utility (mean), undecided, and density by kind of token.

    Densities are of the pairs that have left the window, over all documents; nan where there are none.

    Raises:
        ModuleNotFoundError: pandas is not installed.
    """
    counts, kept = inspection.kind_counts()
    columns = {
        "density": inspection.density_by_head(),
        "utility": inspection.utility_by_head(),
        "undecided": inspection.undecided(),
        **{name: kept[:, :, kind].double() / counts[kind] for kind, name in enumerate(KINDS)},
    }
    heads = kept.shape[1]
    index = {
        "layer": np.repeat(inspection.layers, heads),
        "head": np.tile(np.arange(heads), len(inspection.layers)),
    }
    return import_pandas().DataFrame(index | {name: values.flatten().numpy() for name, values in columns.items()})


def tokens_frame(inspection: Inspection) -> pandas.DataFrame:
    """A row for every token: document, position, piece, kind, kept_share and utility (means over all heads), left.

    `left` says whether the token has left the window; decisions about the others take effect later.

    Raises:
        ModuleNotFoundError: pandas is not installed.
    """
    frames = [import_pandas().DataFrame(_token_columns(document)) for document in inspection.documents]
    return import_pandas().concat(frames, ignore_index=True)


def pairs_frame(document: Document) -> pandas.DataFrame:
    """A row for every pair of one document: layer, head, position, utility, keep. It has L * Hkv * T rows.

    Raises:
        ModuleNotFoundError: pandas is not installed.
    """
    densities = document.densities
    shape = densities.keep.shape
    layer, head, position = (axis.ravel() for axis in np.indices(shape))
    return import_pandas().DataFrame(
        {
            "layer": np.asarray(densities.layers)[layer],
            "head": head,
            "position": position,
            "utility": densities.utilities.flatten().numpy(),
            "keep": densities.keep.flatten().numpy(),
        }
    )


def _token_columns(document: Document) -> dict[str, Any]:
    densities = document.densities
    return {
        "document": document.name,
        "position": np.arange(densities.tokens),
        "piece": document.pieces,
        "kind": [KINDS[kind] for kind in document.kinds],
        "kept_share": densities.kept_share().numpy(),
        "utility": densities.utilities.double().mean((0, 1)).numpy(),
        "left": np.arange(densities.tokens) < document.left,
    }


def import_pandas() -> Any:
    """pandas, or an error that says how to get it."""
    try:
        import pandas
    except ModuleNotFoundError as error:
        message = f'data frames need pandas ({error}): pip install "spkv[frames]"'
        raise ModuleNotFoundError(message, name=error.name) from error
    return pandas
