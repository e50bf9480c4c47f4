"""Reports on pruning decisions: :func:`plot_density` (PNG) and :func:`write_token_page` (HTML).

Importing this module needs numpy only; matplotlib is imported when a plot is drawn.
"""

from __future__ import annotations

import html
import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

_DPI = 150
_LINE_INCHES, _DIGIT_INCHES = 0.15, 0.08  # height of an 8 pt tick label, and width of each of its digits
_SHARE_UNITS = 10_000  # shares are stored as whole hundredths of a percent: shorter than decimals


def _unit_interval(name: str, values: ArrayLike, ndim: int, axes: str, *, nan_allowed: bool) -> NDArray[np.float64]:
    """``values`` as float64, or a ValueError that names ``name``, what was given and what is allowed."""
    given = np.asarray(values)
    if given.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be an array of numbers shaped {axes}, got dtype {given.dtype}")
    array = given.astype(np.float64)
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"{name} must be a non-empty array shaped {axes}, got shape {array.shape}")
    missing = np.isnan(array)
    bad = ~((array >= 0) & (array <= 1)) & ~(missing & nan_allowed)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        allowed = "in [0, 1] or nan" if nan_allowed else "in [0, 1], without nan"
        raise ValueError(f"{name} must be {allowed}, got {array[where]:g} at index {list(where)}")
    return array


def _ticks(count: int, inches: float, room: float) -> range:
    """Cells to label on an axis of ``count`` cells: all, or every 2nd, 4th, ... if those are too many."""
    step = 1
    while step * inches / count < room:
        step *= 2
    return range(0, count, step)


def plot_density(
    density: ArrayLike,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    layer_indices: Sequence[int] | None = None,
) -> None:
    """Write a PNG heat map of the cache density, one cell per layer (y, first on top) and KV head (x).

    Args:
        density: ``[layers, kv_heads]``, kept pairs / pairs that have left the window, each in [0, 1]. nan
            says that nothing has left the window yet; such a cell is hatched and left out of the mean.
        path: file to write; an existing one is replaced. The format is PNG whatever the suffix.
        title: first line of the title. The unweighted mean of the cells stands below it.
        layer_indices: ``[layers]``, the model's index of each row; 0, 1, ... if not given.

    Raises:
        ValueError: ``density`` is empty, not two-dimensional or has values outside [0, 1], or
            ``layer_indices`` is not one integer for each row.
        ModuleNotFoundError: matplotlib is not installed (``pip install "spkv[plots]"``).
        OSError: ``path`` cannot be written.
    """
    cells = _unit_interval("density", density, 2, "[layers, kv_heads]", nan_allowed=True)
    layers, heads = cells.shape
    rows = np.arange(layers) if layer_indices is None else np.asarray(layer_indices)
    if rows.shape != (layers,) or rows.dtype.kind not in "iu":
        raise ValueError(
            f"layer_indices must be {layers} integers, one for each row of density, "
            f"got shape {rows.shape} of {rows.dtype}"
        )
    try:
        # Figure instead of pyplot: no window system, and no global list that keeps the figure alive.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ModuleNotFoundError as error:
        message = f'plot_density needs matplotlib ({error}): pip install "spkv[plots]"'
        raise ModuleNotFoundError(message, name=error.name) from error

    missing = np.isnan(cells)
    width = min(max(0.45 * heads, 4.0), 12.0)
    height = min(max((0.17 if layers > 32 else 0.26) * layers, 1.0), 24.0)
    upright = height >= 4.0  # a shorter vertical bar could not hold its label
    key = 0.3 if missing.any() else 0.0
    size = (width + (1.9 if upright else 0.9), height + (1.3 if upright else 2.0) + key)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    absent = Patch(label="nothing has left the window yet")
    for patch in (absent, axes.patch):  # masked cells are transparent: the hatched background shows through
        patch.set(facecolor="#d4d4d4", edgecolor="#8a8a8a", hatch="////")
    x, y = np.arange(heads + 1) - 0.5, np.arange(layers + 1) - 0.5
    mesh = axes.pcolormesh(x, y, np.ma.masked_invalid(cells), cmap="viridis", vmin=0, vmax=1)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(y[-1], y[0])
    axes.hlines(y[1:-1], x[0], x[-1], color="white", linewidth=0.5)
    axes.vlines(x[1:-1], y[0], y[-1], color="white", linewidth=0.5)
    across = _ticks(heads, width, _DIGIT_INCHES * (len(str(heads)) + 1))
    down = _ticks(layers, height, _LINE_INCHES)
    axes.set_xticks(across, [str(head) for head in across], fontsize=8)
    axes.set_yticks(down, [str(rows[row]) for row in down], fontsize=8)
    axes.set_xlabel("KV head", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    if heads <= 16 and layers <= 32:  # numbers only while they are legible
        for row, head in np.argwhere(~missing):
            value = cells[row, head]
            ink = "white" if value < 0.5 else "black"  # the better contrast on viridis
            axes.text(head, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    bar = figure.colorbar(
        mesh, ax=axes, location="right" if upright else "bottom", aspect=40 if upright else 30,
        shrink=min(1.0, 6.0 / height) if upright else 1.0,
    )  # fmt: skip
    bar.set_label("density (kept pairs / pairs that have left the window)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if missing.any():
        figure.legend(handles=[absent], loc="outside lower center", fontsize=8, frameon=False)
    counted = int(cells.size - missing.sum())
    mean = f"mean density {cells[~missing].mean():.3f}" if counted else "nothing has left the window yet"
    if 0 < counted < cells.size:
        mean += f" ({counted} of {cells.size} heads)"
    first = textwrap.wrap(title, width=int(size[0] * 11)) if title else []
    # parse_math off: a "$" in a model's name is no formula.
    figure.suptitle("\n".join([*first, mean]), fontsize=11, parse_math=False)
    figure.savefig(path, format="png", dpi=_DPI)


def script_json(value: object) -> str:
    """``value`` as JSON that is safe as the text of a script element and always encodes to UTF-8."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # "<" could close the element or open a comment in it; lone surrogates have no UTF-8 form.
    return re.sub("[<>&\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def write_token_page(
    path: str | os.PathLike[str],
    tokens: Sequence[str],
    kept: ArrayLike,
    *,
    title: str,
    summary: Mapping[str, str] | None = None,
    window: int | None = None,
) -> None:
    """Write one self-contained HTML page in which each token is shaded by how widely it was kept.

    The page loads nothing else, shows any markup in its texts as text, and needs JavaScript. Shares are shown
    rounded to 0.01 %, in 16 shades. The file has 10 to 15 bytes for each token of English text.

    Args:
        path: file to write (UTF-8); an existing one is replaced.
        tokens: decoded pieces of the text in order. Control characters are shown by their code.
        kept: float ``[tokens]``, share in [0, 1] of the (layer, KV head) pairs that kept the token. Counts
            are refused, as a count of 1 would read as "kept everywhere": divide by layers * kv_heads.
        title: heading of the page.
        summary: names and values of a small table below the heading.
        window: length of the local window in tokens; the last ``window`` tokens are marked as still in it.

    Raises:
        ValueError: ``tokens`` is empty or not a sequence of str, ``kept`` is not one float in [0, 1] for each
            token, or ``window`` is negative or no integer.
        OSError: ``path`` cannot be written.
    """
    if isinstance(tokens, str) or len(tokens) == 0:
        raise ValueError(f"tokens must be a non-empty list of str, got {str(tokens)[:40]!r}")
    stranger = next((index for index, token in enumerate(tokens) if not isinstance(token, str)), None)
    if stranger is not None:
        kind = type(tokens[stranger]).__name__
        raise ValueError(f"tokens must be a list of str, got {kind} at index {stranger}")
    given = np.asarray(kept)
    if given.dtype.kind in "iub":
        raise ValueError(f"kept must be float shares in [0, 1], got {given.dtype}: divide counts by layers * kv_heads")
    shares = _unit_interval("kept", given, 1, "[tokens]", nan_allowed=False)
    if len(shares) != len(tokens):
        raise ValueError(f"kept must have one share per token: got {len(shares)} for {len(tokens)} tokens")
    whole = isinstance(window, (int, np.integer)) and not isinstance(window, bool)
    if window is not None and not (whole and window >= 0):
        raise ValueError(f"window must be an integer >= 0 or None, got {window!r}")

    table = "".join(
        f"<tr><th scope=row>{html.escape(str(name))}<td>{html.escape(str(value))}"
        for name, value in (summary or {}).items()
    )
    units = np.rint(shares * _SHARE_UNITS).astype(int).tolist()
    parts = {
        "title": html.escape(title),
        "summary": f"<table>{table}</table>" if table else "",
        "facts": f"{len(tokens):,} tokens, on average kept by {shares.mean():.1%} of all layers' KV heads",
        "data": script_json(
            {"tokens": list(tokens), "shares": units, "units": _SHARE_UNITS, "window": int(window or 0)}
        ),
    }
    template = resources.files("spkv.inspect").joinpath("token_page.html").read_text(encoding="utf-8")
    # One pass, so that a placeholder inside a caller's text stays text.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    Path(path).write_text(page, encoding="utf-8", errors="replace", newline="\n")
