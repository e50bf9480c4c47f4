"""The inspection's two files: its data as JSON, and one HTML page that shows them without loading anything else.

The page carries each document's arrays as zlib streams in base64, which the browser unpacks when the document is
chosen; a text of 32k tokens and 90 heads would be too much to parse as JSON.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import json
import os
import re
import zlib
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spkv.inspect.densities import DENSITY_PLOT
from spkv.inspect.inspection import Document, Inspection
from spkv.inspect.report import plot_density, script_json

PAGE, DATA = "inspection.html", "inspection.json"
# In this order: a file uses what those before it define.
_SCRIPTS = ("data.js", "charts.js", "panels.js", "text.js", "main.js")
_UNITS = 1000  # utilities and weights are written in thousandths


def write_inspection(inspection: Inspection, directory: str | os.PathLike[str]) -> dict[str, str]:
    """Write an inspection as a page and as JSON.

    Args:
        inspection: what to write.
        directory: made if needed; files of the same names are replaced.

    Returns:
        The paths written, by kind: inspection_page, inspection_json and, if matplotlib is installed, density_png.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = inspection.summary() | {"documents": [_document(d) | _lists(d) for d in inspection.documents]}
    (directory / DATA).write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")
    (directory / PAGE).write_text(_page(inspection), encoding="utf-8", errors="replace", newline="\n")
    paths = {"inspection_page": str(directory / PAGE), "inspection_json": str(directory / DATA)}
    if importlib.util.find_spec("matplotlib") is not None:
        cells, layers = inspection.density_by_head().numpy(), inspection.layers
        plot_density(cells, directory / DENSITY_PLOT, title=inspection.model, layer_indices=layers)
        paths["density_png"] = str(directory / DENSITY_PLOT)
    return paths


def _document(document: Document) -> dict[str, Any]:
    densities = document.densities
    bins = document.position_bins()
    return {
        "name": document.name,
        "tokens": densities.tokens,
        "density": densities.density(),
        "kept_fraction": densities.kept_fraction(),
        "position_edges": [bins[0][0], *(stop for _, stop in bins)] if bins else [],
        "density_by_position": document.density_by_position().tolist(),
        "pieces": document.pieces,
    }


def _lists(document: Document) -> dict[str, Any]:
    """What the JSON file says of single tokens: for each layer and head the positions kept, and all utilities.

    Later queries stand beside the positions kept, K for each, by position and weight; 0 stands where there are fewer,
    which position 0 is too early for.
    """
    keep = document.densities.keep
    lists: dict[str, Any] = {
        "kept": [[head.nonzero()[:, 0].tolist() for head in layer] for layer in keep],
        "utilities": (_thousandths(document.densities.utilities.numpy()) / _UNITS).tolist(),
    }
    if document.later is not None:
        positions, weights = (
            document.later.positions.clamp_min(0),
            _thousandths(document.later.weights.numpy()) / _UNITS,
        )
        lists["later_queries"] = [
            [{"positions": p[k].tolist(), "weights": w[k.numpy()].tolist()} for p, w, k in zip(*rows, strict=True)]
            for rows in zip(positions, weights, keep, strict=True)
        ]
    return lists


def _packed(document: Document) -> dict[str, Any]:
    """The same for the page, as arrays over [L, Hkv, T] or, of later queries, [L, Hkv, T, K]; all little-endian."""
    densities = document.densities
    packed: dict[str, Any] = {
        "keep": _deflate(np.packbits(densities.keep.numpy(), axis=2, bitorder="little")),
        "utilities": _deflate(_thousandths(densities.utilities.numpy()).astype("<u2")),
        "kinds": _deflate(document.kinds.numpy().astype("u1")),
    }
    if document.later is not None:
        packed["later_positions"] = _deflate(document.later.positions.clamp_min(0).numpy().astype("<u4"))
        packed["later_weights"] = _deflate(_thousandths(document.later.weights.numpy()).astype("<u2"))
        packed["strongest"] = document.later.positions.shape[3]
    return packed


def _thousandths(values: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.rint(values.astype(np.float64) * _UNITS).astype(np.int64)


def _deflate(array: NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 6)).decode("ascii")


def _page(inspection: Inspection) -> str:
    data = inspection.summary() | {
        "units": _UNITS,
        "documents": [_document(d) | {"packed": _packed(d)} for d in inspection.documents],
    }
    folder = resources.files("spkv.inspect").joinpath("page")
    parts = {
        "title": html.escape(f"{inspection.model}: what it keeps"),
        "style": folder.joinpath("page.css").read_text(encoding="utf-8"),
        "data": script_json(data),
        "script": "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS),
    }
    template = folder.joinpath("page.html").read_text(encoding="utf-8")
    # One pass, so that a placeholder inside a text stays text.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
