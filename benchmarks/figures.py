"""Draws the figures of the documentation from `benchmarks/results/`.

python -m benchmarks.figures
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from spkv.checkpoint import SHIPPED_ADAPTERS
from spkv.config import CONFIG_FILE

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def adapter_figure() -> Figure:
    """What the shipped adapter costs at each density, and what its heads keep."""
    rows = json.loads((RESULTS / "smollm2-adapter.json").read_text(encoding="utf-8"))["rows"]
    training = json.loads((SHIPPED_ADAPTERS / "smollm2" / CONFIG_FILE).read_text(encoding="utf-8"))["training"]
    densities = [training["densities"][str(layer)] for layer in range(len(training["densities"]))]

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    cost, heads = figure.subplots(1, 2, width_ratios=(1, 1.15))
    curve = sorted((r for r in rows if r["policy"] == "spkv"), key=lambda r: r["density"])
    cost.plot([r["density"] for r in curve], [100 * r["increase"] for r in curve], "o-", label="spkv")
    for r in curve:
        cost.annotate(f"τ {r['threshold']}", (r["density"], 100 * r["increase"]), (3, 5), textcoords="offset points")
    for policy, label, marker in (("streaming", "4 sinks + window", "s"), ("random", "random gates", "^")):
        (row,) = (r for r in rows if r["policy"] == policy)
        cost.plot(row["density"], 100 * row["increase"], marker, label=label)
    cost.axhline(0, color="grey", linewidth=0.8, linestyle="--")
    cost.set(xlabel="density", ylabel="loss over dense control, %", title="Held-out loss at 4,096 tokens")
    cost.set_xlim(-0.02, 0.45)
    cost.legend(loc="center right")
    cost.grid(alpha=0.3)

    image = heads.imshow(list(zip(*densities, strict=True)), aspect="auto", vmin=0, vmax=1, cmap="viridis")
    heads.set(xlabel="layer", ylabel="KV head", yticks=range(len(densities[0])), title="Density of each head, τ 0.5")
    figure.colorbar(image, ax=heads)
    return figure


def main() -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    adapter_figure().savefig(FIGURES / "smollm2-adapter.png", dpi=130)


if __name__ == "__main__":
    main()
