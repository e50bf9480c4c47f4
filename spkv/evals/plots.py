"""Pictures of evaluations, drawn from the rows of their results. Needs matplotlib when something is drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spkv.evals.labels import policy_label

_DPI = 130
_PANEL = (4.6, 3.6)
_ACROSS = 3  # panels beside each other
_MOST_INSIDE = 6  # names of lines that a panel has room for; more stand beside it
_WIDER = 1.65
_MARKERS = "osD^vP*X<"  # nine, so that ten colours come round with others

Row = dict[str, Any]


def check_matplotlib() -> None:
    """Raise a ModuleNotFoundError that says how to install matplotlib if it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        message = f'a report draws with matplotlib ({error}): pip install "spkv[plots]"'
        raise ModuleNotFoundError(message, name=error.name) from error


def draw_all(rows: Sequence[Row], folder: Path) -> list[tuple[str, Path]]:
    """Draw what the rows have numbers for.

    Returns:
        Caption and file of each picture, in the order of the report.
    """
    drawn: list[tuple[str, Path]] = []
    for task in dict.fromkeys(row["task"] for row in rows):
        same = [row for row in rows if row["task"] == task]
        name = re.sub(r"[^\w.-]+", "-", task)
        for measure, caption in (("score", "Score"), ("loss", "Loss"), ("continuation_loss", "Loss after the context")):
            known = [row for row in same if row[measure] is not None and row["kept_fraction"] is not None]
            incomplete = any(row["loss"] is None for row in same)  # that of some policies, which have no other
            if known and (measure != "continuation_loss" or incomplete):
                file = folder / f"{measure.replace('_', '-')}-{name}.png"
                _by_length(known, file, partial(_against_kept_fraction, measure=measure))
                drawn.append((f"{caption} of {task} against kept_fraction", file))
        with_positions = [row for row in same if any(bucket["loss"] is not None for bucket in row["by_position"])]
        if with_positions:
            file = folder / f"position-{name}.png"
            _by_length(with_positions, file, _against_position)
            drawn.append((f"Loss of {task} against position", file))
        with_depths = [row for row in same if "depth" in row["by_fact"]]
        if with_depths:
            file = folder / f"depth-{name}.png"
            _depth_by_length(with_depths, file)
            drawn.append((f"Score of {task} by depth and length", file))
    pruned = [row for row in rows if row["threshold"] is not None and row["density"] is not None]
    if pruned:
        file = folder / "density.png"
        tasks = list(dict.fromkeys(row["task"] for row in pruned))
        _save(_panels(len(tasks)), [partial(_density_against_length, rows=pruned, task=task) for task in tasks], file)
        drawn.append(("Density against length", file))
    return drawn


def _panels(count: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(count, _ACROSS)
    down = -(-count // across)
    # Figure instead of pyplot: no window system, and no global list that keeps the figure alive.
    figure = Figure(figsize=(_PANEL[0] * across, _PANEL[1] * down), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.subplots(down, across, squeeze=False)
    for axes in figure.axes[count:]:
        axes.set_visible(False)
    return figure


def _save(figure: Any, draw: Sequence[Callable[[Any], None]], file: Path) -> None:
    for axes, panel in zip(list(figure.axes), draw, strict=False):
        panel(axes)
    if any(len(axes.get_legend_handles_labels()[1]) > _MOST_INSIDE for axes in figure.axes):
        figure.set_figwidth(_WIDER * figure.get_figwidth())
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})


def _by_length(rows: Sequence[Row], file: Path, panel: Callable[[Any, list[Row]], None]) -> None:
    """A panel for each length."""
    lengths = sorted({row["length"] for row in rows})

    def draw(axes: Any, length: int) -> None:
        panel(axes, [row for row in rows if row["length"] == length])
        axes.set_title(f"{length:,} tokens", fontsize=10)

    _save(_panels(len(lengths)), [partial(draw, length=length) for length in lengths], file)


def _against_kept_fraction(axes: Any, rows: Sequence[Row], measure: str) -> None:
    """A line for each policy, over its thresholds or those it takes the memory of.

    What follows a context is kept whole by some policies, so scores and losses that follow it stand against what was
    kept of the context: there the policies are compared at equal memory.
    """
    of_context = measure != "loss" and all(row["context_kept_fraction"] is not None for row in rows)
    kept = "context_kept_fraction" if of_context else "kept_fraction"
    for index, name in enumerate(dict.fromkeys(_series(row) for row in rows)):
        points = sorted((row[kept], row[measure]) for row in rows if _series(row) == name)
        axes.plot(*zip(*points, strict=True), marker=_MARKERS[index % len(_MARKERS)], markersize=5, label=_plain(name))
    axes.set_xlim(0, 1.03)
    if measure == "score":
        axes.set_ylim(-0.03, 1.03)
    _finish(axes, "kept_fraction" + " of the context" * of_context, measure.replace("_", " "))


def _against_position(axes: Any, rows: Sequence[Row]) -> None:
    for row in rows:
        buckets = [bucket for bucket in row["by_position"] if bucket["loss"] is not None]
        if buckets:
            middles = [(bucket["start"] + bucket["stop"]) / 2 for bucket in buckets]
            axes.plot(middles, [bucket["loss"] for bucket in buckets], label=_plain(_label(row)))
    _finish(axes, "position", "loss")


def _density_against_length(axes: Any, rows: Sequence[Row], task: str) -> None:
    """The lines of one task; all tasks have the lengths that any of the rows has."""
    same = [row for row in rows if row["task"] == task]
    for index, label in enumerate(dict.fromkeys(_label(row) for row in same)):
        points = sorted((row["length"], row["density"]) for row in same if _label(row) == label)
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=5, label=_plain(label))
    axes.set_title(_plain(task), fontsize=10)
    axes.set_xscale("log", base=2)
    lengths = sorted({row["length"] for row in rows})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(0, 1.2 * max(row["density"] for row in same) or 1)
    _finish(axes, "length", "density")


def _depth_by_length(rows: Sequence[Row], file: Path) -> None:
    """A heat map for each policy: depth down, length across."""
    labels = list(dict.fromkeys(_label(row) for row in rows))
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({value for row in rows for value in row["by_fact"]["depth"]}, key=_number)
    figure = _panels(len(labels))

    def draw(axes: Any, label: str) -> None:
        scores = {row["length"]: row["by_fact"]["depth"] for row in rows if _label(row) == label}
        cells = [[scores.get(n, {}).get(d, {}).get("score", float("nan")) for n in lengths] for d in depths]
        image = axes.imshow(cells, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
        axes.set_yticks(range(len(depths)), depths, fontsize=8)
        axes.set_xlabel("length", fontsize=9)
        axes.set_ylabel("depth", fontsize=9)
        axes.set_title(_plain(label), fontsize=10)
        figure.colorbar(image, ax=axes)

    _save(figure, [partial(draw, label=label) for label in labels], file)


def _finish(axes: Any, across: str, up: str) -> None:
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    names = len(axes.get_legend_handles_labels()[1])
    if names > _MOST_INSIDE:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.02))
    elif names:
        axes.legend(fontsize=7)


def _series(row: Row) -> str:
    return row["policy"] + _of_run(row)


def _label(row: Row) -> str:
    return policy_label(row) + _of_run(row)


def _of_run(row: Row) -> str:
    return f" ({row['run']})" if row.get("run") else ""


def _plain(text: str) -> str:
    """A "$" in a name is no formula."""
    return text.replace("$", r"\$")


def _number(text: str) -> tuple[bool, float, str]:
    try:
        return (False, float(text), "")
    except ValueError:
        return (True, 0.0, text)
