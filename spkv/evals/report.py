"""Reports of evaluations: one page with a table and pictures, made from the JSON of one run or several."""

from __future__ import annotations

import base64
import html
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spkv.evals.labels import beside, format_kept_fraction, matched_in_context, policy_label
from spkv.evals.plots import check_matplotlib, draw_all
from spkv.evals.records import RESULTS_FILE, stored_seconds, write_json

PAGE_FILE, ROWS_FILE = "report.html", "report.json"
# What a report cannot do without, and what it takes for absent where older results lack it.
_NEEDED = ("task", "policy", "length", "examples")
_OPTIONAL: dict[str, Any] = {
    **dict.fromkeys(("threshold", "match_threshold", "score", "loss", "continuation_loss", "density")),
    **dict.fromkeys(("kept_fraction", "context_kept_fraction", "kv_bytes", "seconds")),
    "standard_error": {},
    "by_fact": {},
    "by_position": [],
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1250px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 2em } td, th { padding: .25em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
tbody tr:nth-child(even) { background: #f4f4f4 } figure { margin: 2em 0 } figure img { max-width: 100% }
figcaption { font-weight: 600 } dt { font-weight: 600 } dd { overflow-wrap: anywhere }
"""


def write_report(sources: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> dict[str, Any]:
    """Write a page, its pictures and the rows it was made from.

    Args:
        sources: results of `spkv eval`: directories given to its --output, or files of JSON.
        output: directory to write to, made if needed.

    Returns:
        "page" and "rows", the files, and "pictures", the list of theirs.

    Raises:
        FileNotFoundError, ValueError: for a source that holds no results.
        ModuleNotFoundError: if matplotlib is missing.
    """
    check_matplotlib()
    results = [load_results(source) for source in sources]
    rows = merge([result["rows"] for result in results], [result["name"] for result in results])
    # A report that is drawn again tells of the runs that it was drawn from.
    runs = [run for result in results for run in result.get("runs", [result])]
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(rows, folder)
    write_json(folder / ROWS_FILE, {"runs": [{k: r[k] for k in ("name", "arguments")} for r in runs], "rows": rows})
    (folder / PAGE_FILE).write_text(_page(rows, runs, pictures), encoding="utf-8", newline="\n")
    return {
        "page": str(folder / PAGE_FILE),
        "rows": str(folder / ROWS_FILE),
        "pictures": [str(file) for _, file in pictures],
    }


def load_results(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the results of one evaluation: its "name", its "arguments" and its "rows"; of a report, its "runs", too.

    Rows of several texts or models may lie in one file (`benchmarks.evaluation` makes such): then the text joins the
    name of the task, and the model is the row's "run".

    Raises:
        FileNotFoundError, ValueError: if there are none.
    """
    path = Path(source)
    file = path / RESULTS_FILE if path.is_dir() else path
    if not file.is_file():
        missing = f"{path} holds no {RESULTS_FILE}" if path.is_dir() else f"no such file of results: {path}"
        raise FileNotFoundError(f"{missing}; give a directory that `spkv eval --output` wrote, or the JSON it printed")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    rows = content.get("rows") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file} holds no rows of an evaluation")
    for row in rows:
        missing_names = [n for n in _NEEDED if n not in row] if isinstance(row, dict) else list(_NEEDED)
        if missing_names:
            raise ValueError(f"{file} is no result of `spkv eval`: a row lacks {', '.join(missing_names)}")
    arguments = content.get("arguments", {}) if isinstance(content, dict) else {}
    result = {"name": path.resolve().name if path.is_dir() else path.stem, "arguments": arguments}
    if isinstance(content, dict) and "runs" in content:
        result["runs"] = content["runs"]
    rows = [{**_OPTIONAL, **row} for row in rows]
    if path.is_dir():
        seconds = stored_seconds(path)
        for row in rows:
            row["seconds"] = seconds.get((row["task"], row["length"], policy_label(row)), row["seconds"])
    return {**result, "rows": _told_apart(rows)}


def _told_apart(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    several = len({row.get("model") for row in rows}) > 1
    return [
        {
            **{name: value for name, value in row.items() if name != "data"},
            "task": f"{row['task']}: {row['data']}" if row.get("data") else row["task"],
            "run": row.get("run") or (row.get("model") if several else None),
        }
        for row in rows
    ]


def merge(results: Sequence[Sequence[dict[str, Any]]], names: Sequence[str]) -> list[dict[str, Any]]:
    """All rows, by task and length; where runs have the same policy there, their names tell them apart, as "run"."""
    count = Counter(_key(row) for rows in results for row in rows)
    # Runs may share a name; a number tells them apart.
    unique = [f"{name} {i + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]
    merged = [
        {**row, "run": ", ".join(filter(None, (name, row.get("run")))) if count[_key(row)] > 1 else row.get("run")}
        for rows, name in zip(results, unique, strict=True)
        for row in rows
    ]
    order = {task: place for place, task in enumerate(dict.fromkeys(row["task"] for row in merged))}
    return sorted(merged, key=lambda row: (order[row["task"]], row["length"] or 0))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["length"], policy_label(row), row.get("run")


def _page(rows: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], pictures: Sequence[tuple[str, Path]]) -> str:
    facts = "".join(
        f"<h2>{html.escape(run['name'])}</h2><dl>"
        + "".join(
            f"<dt>{html.escape(name)}<dd>{html.escape(value if isinstance(value, str) else json.dumps(value))}"
            for name, value in run["arguments"].items()
        )
        + "</dl>"
        for run in runs
        if run["arguments"]
    )
    figures = "".join(
        f'<figure><figcaption>{html.escape(caption)}</figcaption><img alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"></figure>'
        for caption, file in pictures
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>spkv: evaluation</title>'
        f"<style>{_STYLE}</style></head><body><h1>Evaluation</h1>{_table(rows)}{figures}{facts}</body></html>\n"
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    measures = [m for m in ("score", "loss", "continuation_loss") if any(row[m] is not None for row in rows)]
    header = ["task", "length", "policy", "examples", *(m.replace("_", " ") for m in measures)]
    contexts = any(matched_in_context(row) for row in rows)
    header += ["density", *(["kept of the context"] * contexts), "kept_fraction", "KV bytes", "seconds"]
    body = []
    for row in rows:
        place = (row["task"], row["length"], row["run"])
        dense = next((r for r in rows if r["policy"] == "dense" and (r["task"], r["length"], r["run"]) == place), None)
        if dense is None:
            dense = next((r for r in rows if r["policy"] == "dense" and (r["task"], r["length"]) == place[:2]), None)
        cells = [
            row["task"],
            "–" if row["length"] is None else f"{row['length']:,}",
            policy_label(row) + (f" ({row['run']})" if row["run"] else ""),
            f"{row['examples']:,}",
            *(beside(measure, row, dense) for measure in measures),
            "–" if row["density"] is None else f"{row['density']:.3f}",
            *([format_kept_fraction(row["context_kept_fraction"])] * contexts),
            format_kept_fraction(row["kept_fraction"]),
            "–" if row["kv_bytes"] is None else f"{row['kv_bytes']:,.0f}",
            "–" if row["seconds"] is None else f"{row['seconds']:.1f}",
        ]
        body.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        "<p>In brackets: the difference from dense, in points of a score or as a share of a loss; and the factor that "
        "a kept_fraction saves. ± is one standard error of the mean difference, example by example. Policies that take "
        "the memory of another have as much of the context; what follows it, some keep whole.</p>"
    )
