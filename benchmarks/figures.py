"""Draws the figures of the documentation from `benchmarks/results/`.

python -m benchmarks.figures

The figures of operators, generation, the frontier, the server and evaluations are drawn once their benchmarks have left
rows there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.recipe_runs import frontier
from spkv.checkpoint import SHIPPED_ADAPTERS
from spkv.config import CONFIG_FILE
from spkv.evals.tasks import GROUPS

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
THRESHOLD = 0.5
WIDE = " window=512"
"""What runs with a wider window have in their names."""
_METHODS = {
    "spkv": "self-pruned",
    "h2o": "H2O",
    "expected-attention": "ExpectedAttention",
    "snapkv": "SnapKV",
    "tova": "TOVA",
    "keydiff": "KeyDiff",
}
_TEXTS = {"valid": "held-out text"}
PUBLISHED = ((0.2572, 0.08, "τ 0.5"), (0.1144, 0.46, "τ 0.7"))
"""Density, increase of the loss in percent, and threshold (SP-KV, arXiv 2605.14037, 8.1B parameters)."""


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
        if r["threshold"] in (curve[0]["threshold"], THRESHOLD, curve[-1]["threshold"]):  # those between lie too near
            below = r["threshold"] == THRESHOLD
            place = (r["density"], 100 * r["increase"])
            cost.annotate(f"τ {r['threshold']}", place, (-7, -16 if below else 8), textcoords="offset points")
    for policy, label, marker in (("streaming", "4 sinks + window", "s"), ("random", "random gates", "^")):
        (row,) = (r for r in rows if r["policy"] == policy)
        cost.plot(row["density"], 100 * row["increase"], marker, label=label)
    # Straight near 0, and logarithmic beyond.
    cost.set_yscale("symlog", linthresh=0.1)
    cost.yaxis.set_major_formatter("{x:g}")
    cost.set_ylim(bottom=0, top=100)
    cost.set(xlabel="density", ylabel="loss over dense control, %", title="Held-out loss at 4,096 tokens")
    cost.set_xlim(-0.02, 0.3)
    cost.legend(loc="lower left")
    cost.grid(alpha=0.3)
    image = heads.imshow(list(zip(*densities, strict=True)), aspect="auto", vmin=0, vmax=1, cmap="viridis")
    heads.set(xlabel="layer", ylabel="KV head", yticks=range(len(densities[0])), title="Density of each head, τ 0.5")
    figure.colorbar(image, ax=heads)
    return figure


def ops_figure(result: dict[str, Any]) -> Figure:
    """Time and percent of the measured limit: decode and prefill against density, training against length.

    `result` is what `benchmarks.run --suite ops` writes. Dense baselines, which have no density, are dashed lines.
    """
    rows = [row for row in result["rows"] if row["milliseconds"] is not None]
    panels: list[tuple[str, str, str, Callable[[dict[str, Any]], bool]]] = [
        ("Decode, 16 × 32k, 32/8 heads × 128", "density", "copy", lambda r: _is(r, "packed_decode", 16, 32768, 1)),
        ("Prefill, 32k, 32/8 heads × 128", "density", "matmul", lambda r: _is(r, "pruned_prefill", 1, 32768, 32768)),
        (
            "Training step, 32/8 heads × 128",
            "length",
            "matmul",
            lambda r: (r["operator"], r["pass"], r["head_dim"]) == ("gated_attention", "fwd+bwd", 128),
        ),
    ]
    figure = Figure(figsize=(13, 7), layout="constrained")
    figure.suptitle(f"{result['device']}, bfloat16, torch {result['versions']['torch']}", fontsize="medium")
    names = sorted({row["implementation"] for row in rows}, key=lambda name: (not name.startswith("spkv"), name))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    for column, (title, x, limit, belongs) in zip(figure.subplots(2, 3).T, panels, strict=True):
        chosen = [row for row in rows if belongs(row)]
        for axes, y in zip(column, ("milliseconds", "percent_of_limit"), strict=True):
            _draw(axes, chosen, x, y, colours)
            axes.grid(alpha=0.3)
            axes.set(xlabel=x)
        column[0].set(title=title, ylabel="milliseconds", yscale="log" if x == "length" else "linear")
        column[1].set(ylabel=f"% of the measured {limit} rate", ylim=(0, None))
        if chosen:
            column[0].legend(fontsize="x-small")
    return figure


def _is(row: dict[str, Any], operator: str, batch: int, length: int, queries: int) -> bool:
    return (row["operator"], row["batch"], row["length"], row["queries"]) == (operator, batch, length, queries)


def _draw(axes: Axes, rows: Sequence[dict[str, Any]], x: str, y: str, colours: dict[str, str]) -> None:
    """One line an implementation; densities that are skewed over heads are stars."""
    for name in [n for n in colours if any(row["implementation"] == n for row in rows)]:
        own = sorted((row for row in rows if row["implementation"] == name), key=lambda row: row[x])
        if x == "density" and not name.startswith("spkv"):
            axes.axhline(own[0][y], color=colours[name], linestyle="--", linewidth=1, label=name)
            continue
        even, skewed = ([row for row in own if row["skewed"] is wanted] for wanted in (False, True))
        axes.plot([r[x] for r in even], [r[y] for r in even], "o-", color=colours[name], label=name)
        if skewed:
            points = [r[x] for r in skewed], [r[y] for r in skewed]
            axes.plot(*points, "*", markersize=11, color=colours[name], label=f"{name}, skewed over heads")
    if x == "length":
        lengths = sorted({row[x] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])


def generation_figure(result: dict[str, Any]) -> Figure:
    """Decode steps at 32,768 pairs: their time with its limit, and tokens a second in the same memory.

    `result` is what `benchmarks.run --suite generate` writes.
    """
    fastest = {"dense": "concurrent", "spkv": "compiled"}
    rows = [r for r in result["rows"] if r["phase"] == "decode" and r["mode"] == fastest[r["implementation"]]]
    rows = [r for r in rows if r["length"] == 32_768 and r["model"].startswith("Llama") and not r["skewed"]]
    rows = [r for r in rows if "commit" not in r]  # of another run
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    title = f"{rows[0]['model']}, 32,768 pairs a sequence, {result['device']}, weights in bfloat16"
    figure.suptitle(title, fontsize="medium")
    times, rates = figure.subplots(1, 2)

    def label(row: dict[str, Any]) -> str:
        coded = "" if row["page_dtype"] == "bfloat16" else f"\n{row['page_dtype']}"
        return "dense" if row["implementation"] == "dense" else f"{row['density']:.2f}{coded}"

    steps = [r for r in rows if r["batch"] == 8]
    limits = [r["milliseconds_per_step"] * r["percent_of_limit"] / 100 for r in steps]
    names = [label(r) for r in steps]
    times.bar(names, [r["milliseconds_per_step"] for r in steps], color="C0", label="a step")
    times.bar(names, limits, width=0.4, color="C1", label="weights and held pairs at a copy's rate")
    times.set(ylabel="milliseconds", title="8 sequences")
    times.legend(fontsize="x-small")
    full = [r for r in rows if r["iso_memory"]]
    names = [f"{label(r)}\n({r['batch']})" for r in full]
    rates.bar(names, [r["tokens_per_second"] for r in full], color=["grey", *["C0"] * (len(full) - 1)])
    rates.set(ylabel="tokens / s", title="As many sequences as fit (their number)")
    for axes in (times, rates):
        axes.tick_params(axis="x", labelsize="x-small")
        axes.set_xlabel("density, and how pairs are coded", fontsize="x-small")
    return figure


def frontier_figure(result: dict[str, Any], model: str = "smollm2") -> Figure:
    """Loss over the dense control against density, for each budget of training tokens.

    `result` is what `benchmarks.recipes --suite frontier` writes. Lines join the runs at the threshold that they were
    trained for; the small points are the same models at other thresholds, and other seeds. Squares are runs with a
    wider window.
    """
    names = {run.name for run in frontier()}
    pruned = [row for row in result["rows"] if row["model"] == model and row["policy"] == "spkv"]
    rows = [row for row in pruned if row["run"] in names]
    wide = [row for row in pruned if row["run"].endswith(WIDE) and row["run"].removesuffix(WIDE) in names]
    budgets = sorted({row["tokens"] for row in rows})
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for colour, budget in ((f"C{i}", budget) for i, budget in enumerate(budgets)):
        own = sorted((row for row in rows if row["tokens"] == budget), key=lambda row: row["density"])
        trained_for = [row for row in own if (row["threshold"], row["seed"]) == (THRESHOLD, 0)]
        others = [row for row in own if row not in trained_for]
        label = f"{budget / 1e6:.0f} M tokens"
        axes.plot(*_costs(trained_for), "o-", color=colour, label=label)
        axes.plot(*_costs(others), ".", color=colour, markersize=4, alpha=0.5)
        wider = [row for row in wide if row["tokens"] == budget and row["threshold"] == THRESHOLD]
        axes.plot(*_costs(wider), "s", color=colour, markersize=6)
    if wide:
        axes.plot([], [], "s", color="grey", label=WIDE.strip().replace("=", " "))
    for density, increase, label in PUBLISHED:
        axes.plot(density, increase, "k*", markersize=11)
        axes.annotate(label, (density, increase), (6, 6), textcoords="offset points", fontsize="x-small")
    axes.axhline(0, color="grey", linewidth=0.8, linestyle="--")
    # Straight near 0, where differences may be negative, and logarithmic beyond.
    axes.set_yscale("symlog", linthresh=0.1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="density", ylabel="loss over dense control, %", xlim=(0, 0.5))
    axes.set_title(f"{model}, held-out loss at {rows[0]['evaluation_length']:,} tokens; ★ published, 8.1B parameters")
    axes.title.set_fontsize("medium")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def serving_figure(result: dict[str, Any]) -> Figure:
    """What a server does with the same memory, dense and self-pruned, as requests come more often.

    `result` is what `benchmarks.serve` writes.
    """
    rows = [row for row in result["rows"] if row["error"] is None]
    rates = sorted({row["rate"] for row in rows})
    names = {"dense": "dense", "spkv": "self-pruned", "open": "self-pruned, all kept"}
    one = rows[0]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    title = (
        f"{one['model']}, {one['prompt_tokens']:,} + {one['new_tokens']} tokens, {result['device']}, equal KV memory"
    )
    figure.suptitle(title, fontsize="medium")
    panels = (
        ("requests in flight (mean, most)", "in_flight_mean", "in_flight_max", 1.0),
        ("tokens / s", "tokens_per_second", None, 1.0),
        ("seconds to the first token (median, p90)", "ttft_ms_median", "ttft_ms_p90", 1e-3),
    )
    width = 0.8 / len(names)
    for axes, (label, middle, most, unit) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for i, (implementation, name) in enumerate(names.items()):
            own = {row["rate"]: row for row in rows if row["implementation"] == implementation}
            places = [place + (i - 1) * width for place, rate in enumerate(rates) if rate in own]
            found = [own[rate] for rate in rates if rate in own]
            axes.bar(places, [unit * row[middle] for row in found], width, color=f"C{i}", label=name)
            if most is not None:
                axes.plot(places, [unit * row[most] for row in found], "_k", markersize=9)
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_xlabel("requests / s", fontsize="small")
        axes.set_title(label, fontsize="small")
    figure.legend(*axes.get_legend_handles_labels(), fontsize="x-small", loc="outside lower center", ncols=len(names))
    return figure


def offline_serving_figure(result: dict[str, Any]) -> Figure:
    """What vLLM's engine does with the same memory on a GPU, dense and self-pruned.

    `result` is what `benchmarks.serve_offline` writes.
    """
    rows = {(row["implementation"], row["phase"]): row for row in result["rows"]}
    dense, pruned, full = rows["dense", "tpot"], rows["spkv", "tpot"], rows["spkv", "full"]
    loads = [rows[name, "load"] for name in ("dense", "spkv")]
    panels = (
        (f"{dense['requests']} requests: ms a step", [dense["tpot_ms_median"], pruned["tpot_ms_median"]], "{:.1f}"),
        ("requests that fill the memory", [dense["requests"], full["requests"]], "{}"),
        ("tokens / s, memory full", [dense["tokens_per_second"], full["tokens_per_second"]], "{:,.0f}"),
        (
            f"tokens / s, {loads[0]['requests']} requests\nof {loads[0]['new_tokens']:,} tokens, prompts included",
            [row["tokens_per_second"] for row in loads],
            "{:,.0f}",
        ),
    )
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    figure.suptitle(
        f"{dense['model']}, prompts of {dense['prompt_tokens']:,} tokens, density {full['density']:.2f}, "
        f"{result['device']}, {dense['kv_bytes'] / 1e9:.1f} GB of KV",
        fontsize="medium",
    )
    for axes, (title, values, text) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        bars = axes.bar(["dense", "self-pruned"], values, 0.6, color=["C0", "C1"])
        axes.bar_label(bars, [text.format(value) for value in values], fontsize="small")
        axes.set_title(title, fontsize="small")
        axes.set_yticks([])
        axes.margins(y=0.15)
        axes.tick_params(labelsize="small")
    return figure


def evaluation_figure(result: dict[str, Any]) -> Figure:
    """Loss over the dense model of the tokens after a context, and RULER's mean score, for each method.

    `result` is what `benchmarks.evaluation_runs` writes. Of the first model in it, at the usual threshold; methods that
    are not done everywhere are left out.
    """
    model = result["rows"][0]["model"]
    rows = [r for r in result["rows"] if r["model"] == model and r["threshold"] in (None, THRESHOLD)]
    losses, scores = _losses_and_ruler_means(rows)
    done = set.intersection(*(set(one) for one in (*losses.values(), *scores.values())))
    policies = [policy for policy in dict.fromkeys(r["policy"] for r in rows) if policy in done - {"dense"}]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(f"{model}: methods at equal memory (streaming holds sinks and window alone)", fontsize="medium")
    left, right = figure.subplots(1, 2)
    for i, (name, own) in enumerate(losses.items()):
        places = [place + 0.8 * (i / len(losses) - 0.4) for place in range(len(policies))]
        increases = [100 * (own[policy] / own["dense"] - 1) for policy in policies]
        left.bar(places, increases, 0.8 / len(losses), color=f"C{i}", label=name)
    # Straight near 0, where a method may gain, and logarithmic beyond; above, room for the legend.
    left.set_yscale("symlog", linthresh=0.1)
    left.set_ylim(top=10 * left.get_ylim()[1])
    left.yaxis.set_major_formatter("{x:g}")
    left.set_title("loss of the 128 tokens after a context, over dense, %", fontsize="small")
    for i, (name, own) in enumerate(scores.items()):
        colour = f"C{i + len(losses)}"
        places = [place + 0.8 * (i / len(scores) - 0.25) for place in range(len(policies))]
        right.bar(places, [own[policy] for policy in policies], 0.8 / len(scores), color=colour, label=name)
        right.axhline(own["dense"], color=colour, linewidth=1, linestyle="--")
    right.set_ylim(top=1.2 * right.get_ylim()[1])
    right.set_title("RULER, mean score of eleven tasks (lines: dense)", fontsize="small")
    for axes in (left, right):
        names = [_METHODS.get(policy, policy) for policy in policies]
        axes.set_xticks(range(len(policies)), names, rotation=35, ha="right", fontsize="small")
        axes.legend(fontsize="x-small", ncols=2, loc="upper right")
        axes.grid(axis="y", alpha=0.3)
    return figure


def _losses_and_ruler_means(
    rows: Sequence[dict[str, Any]],
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """By text and length, and by length: of each policy. A mean is of all tasks, or not there."""
    losses: dict[str, dict[str, float]] = {}
    scores: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["task"] == "nll":
            name = f"{_TEXTS.get(row['data'], row['data'])}, {row['length']:,} tokens"
            losses.setdefault(name, {})[row["policy"]] = row["continuation_loss"]
        elif row["task"] in GROUPS["ruler_synthetic"]:
            scores.setdefault(f"{row['length']:,} tokens", {}).setdefault(row["policy"], []).append(row["score"])
    tasks = len(GROUPS["ruler_synthetic"])
    means = {
        length: {policy: 100 * sum(own) / tasks for policy, own in policies.items() if len(own) == tasks}
        for length, policies in scores.items()
    }
    return losses, means


def _costs(rows: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["density"] for row in rows], [100 * row["increase"] for row in rows]


def main() -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    adapter_figure().savefig(FIGURES / "smollm2-adapter.png", dpi=130)
    for name, results, draw in (
        ("ops", "ops", ops_figure),
        ("generation", "generate", generation_figure),
        ("frontier", "frontier", frontier_figure),
        ("serving", "serve", serving_figure),
        ("serving-gpu", "serve-offline", offline_serving_figure),
        ("evaluation", "evaluation", evaluation_figure),
    ):
        path = RESULTS / f"{results}.json"
        if path.exists():
            draw(json.loads(path.read_text(encoding="utf-8"))).savefig(FIGURES / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
