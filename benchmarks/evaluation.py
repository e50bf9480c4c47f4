"""Gathers what `spkv eval --output` measured of one model, in any number of runs and on any device, into one file.

    spkv eval my-model-spkv --reference my-model --task vt --policies dense,spkv,tova --output runs/vt-4k
    python -m benchmarks.evaluation runs/vt-4k --model my-model --device "NVIDIA H200" --commit efe3988 \\
        --command "spkv eval ..." --json FILE

FILE gets a row for each task, length and policy that is done, in place of those that it had of the same ones.
`benchmarks.evaluation_runs` runs and gathers all that docs/evaluation.md shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spkv.evals.labels import policy_label
from spkv.evals.report import load_results

_MEASURED = (
    "task",
    "policy",
    "threshold",
    "match_threshold",
    "length",
    "examples",
    "kept_fraction",
    "context_kept_fraction",
    "density",
    "score",
    "loss",
    "continuation_loss",
    "standard_error",
    "kv_bytes",
    "by_fact",
    "by_turn",
    "by_position",
)


def gather(sources: Sequence[Path], about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of evaluations, each with what is known about all of them.

    A loss says which data it is of, by the name of its evaluation.

    Raises:
        FileNotFoundError, ValueError: for a source that holds no results.
    """
    rows = []
    for source in sources:
        result = load_results(source)
        for row in result["rows"]:
            data = result["name"] if row["task"] == "nll" else None
            circumstances = {**about, "data": data, "dtype": result["arguments"].get("dtype")}
            rows.append(
                {**circumstances, **{name: row[name] for name in _MEASURED if row.get(name, []) not in ([], {})}}
            )
    return rows


def merge(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows; new ones replace old ones of the same model, data, task, length and policy."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["model"], row["data"], row["task"], row["length"], policy_label(row)

    return list({key(row): row for row in (*old, *new)}.values())


def add(new: Sequence[dict[str, Any]], file: Path) -> int:
    """Merge rows into a file's, which is made if needed; returns how many it has then."""
    old = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    rows = merge(old, new)
    text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text(f'{{"rows": [\n{text}\n]}}\n', encoding="utf-8")
    return len(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", type=Path, nargs="+", help="directories given to `spkv eval --output`")
    parser.add_argument("--model", required=True, help="what the rows call it")
    parser.add_argument("--device", required=True, help="that it was measured on")
    parser.add_argument("--commit", required=True, help="that it was measured at")
    parser.add_argument("--command", required=True, help="that measured it, without the paths of its machine")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    options = parser.parse_args(argv)
    new = gather(options.sources, {name: getattr(options, name) for name in ("model", "device", "commit", "command")})
    print(json.dumps({"rows": add(new, options.json), "json": options.json.name}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
