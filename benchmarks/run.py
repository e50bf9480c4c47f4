"""Runs a suite of benchmarks on a CUDA device and writes its rows as JSON. The last line of stdout is JSON.

    python -m benchmarks.run --suite ops --json benchmarks/results/ops.json

Every result is compared with a reference before it is timed: a row that is wrong carries an error and no time, and if
it is one of ours, the run ends with exit code 1. FA3 comes with `pip install fa3-fwd`, FlashInfer with
`pip install flashinfer-python`; a baseline that does not load has a row that says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import spkv
from benchmarks import baselines, generate, ops
from benchmarks.timing import (
    DeviceLostError,
    Row,
    Session,
    case_label,
    compare_with_dense,
    is_dense,
    measure_limits,
)

SUITES: dict[str, ModuleType] = {"ops": ops}
_FLASHINFER_SECONDS = 300.0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if a row of ours failed, 2 without a CUDA device."""
    options = _parse(argv)
    if not torch.cuda.is_available():
        print("benchmarks.run needs a CUDA device, and torch finds none here.", file=sys.stderr)
        return 2
    start = time.monotonic()
    torch.manual_seed(0)
    result = environment("benchmarks.run", options.commit, ("flashinfer-python", "fa3-fwd", "transformers"))
    if options.suite == "generate":
        generate.run(options, result, lambda: save(result, options.json))
        result["seconds"] = round(time.monotonic() - start, 1)
        save(result, options.json)
        print(json.dumps(result if options.json is None else {"rows": len(result["rows"]), "json": str(options.json)}))
        return 0
    suite, cases = SUITES[options.suite], options.cases

    flashinfer = None
    if options.flashinfer is not None:
        print("compiling FlashInfer's kernels ...", file=sys.stderr, flush=True)
        flashinfer = baselines.compile_flashinfer(
            suite.flashinfer_kernels(cases, options.quick), min(options.flashinfer, options.time_limit)
        )
    limits = measure_limits(options.quick)
    result["limits"] = {"copy_gb_per_s": limits.copy_gb_per_s, "matmul_tflop_per_s": limits.matmul_tflop_per_s}
    result["rows"] = []
    torch.cuda.empty_cache()
    session = Session(
        limits=limits,
        quick=options.quick,
        filters=options.filter,
        deadline=start + options.time_limit,
        flashinfer=flashinfer,
    )
    try:
        for row in suite.rows(session, cases):
            result["rows"].append(row)
            compare_with_dense(result["rows"])
            save(result, options.json)
    except DeviceLostError as error:
        result["rows"].append(error.row)
        result["error"] = str(error)
    result["seconds"] = round(time.monotonic() - start, 1)
    save(result, options.json)
    print(table(result["rows"]), file=sys.stderr, flush=True)
    failed = [row for row in result["rows"] if row["error"] is not None]
    ours = [row for row in failed if not is_dense(row)]
    for row in ours:
        print(f"FAILED: {case_label(row)} {row['implementation']}: {row['error']}", file=sys.stderr)
    if options.json is None:
        print(json.dumps(result))
    else:
        summary = {"suite": options.suite, "json": str(options.json), "rows": len(result["rows"])}
        summary |= {"errors": len(failed), "errors_of_ours": len(ours), "seconds": result["seconds"]}
        print(json.dumps(summary | {"error": result.get("error"), "limits": result["limits"]}))
    return 1 if ours or "error" in result else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted([*SUITES, "generate"]), required=True)
    parser.add_argument("--json", type=Path, help="file for all rows, written after every one")
    parser.add_argument(
        "--cases", type=_cases, default=list(ops.CASES), help=f"of {','.join(ops.CASES)}; default: all, in this order"
    )
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="SUBSTR",
        help="only rows whose name holds this, such as 'fwd+bwd' or '16x32768'; may be given several times",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few repetitions")
    parser.add_argument(
        "--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="after which no case starts"
    )
    parser.add_argument(
        "--flashinfer",
        type=float,
        nargs="?",
        const=_FLASHINFER_SECONDS,
        metavar="SECONDS",
        help="measure FlashInfer too. It first compiles its kernels with nvcc, for minutes unless its cache holds "
        f"them; those not ready after SECONDS (default {_FLASHINFER_SECONDS:g}) are left out",
    )
    parser.add_argument(
        "--lengths",
        type=_numbers(int),
        default=list(generate.LENGTHS),
        help="suite generate: pairs, such as 8192,32768",
    )
    parser.add_argument(
        "--densities",
        type=_numbers(float),
        default=list(generate.DENSITIES),
        help="suite generate: such as 0.25,0.1; -1 for the skewed ones",
    )
    parser.add_argument("--commit", help="to record; default: what git says")
    return parser.parse_args(argv)


def _cases(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in ops.CASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known are {', '.join(ops.CASES)}")
    return names


def _numbers(kind: type) -> Callable[[str], list[Any]]:
    return lambda text: [kind(number) for number in text.split(",")]


def environment(module: str, commit: str | None = None, packages: Sequence[str] = ()) -> dict[str, Any]:
    """What a result was measured on: device, commit (git's, if none is given), command and versions."""
    git = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        found = ""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": commit or found,
        # Files by their names: where they lie means nothing elsewhere.
        "command": shlex.join(["python", "-m", module, *(Path(argument).name for argument in sys.argv[1:])]),
        "versions": {
            "spkv": spkv.__version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            **{package: _version(package) for package in packages},
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def save(result: dict[str, Any], path: Path | None) -> None:
    """Write the result, whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def table(rows: Sequence[Row]) -> str:
    """The rows as text: time in ms, percent of the measured limit, and times as fast as the fastest dense."""
    lines = [f"{'case':48} {'density':>8} {'implementation':26} {'ms':>9} {'% limit':>8} {'vs dense':>8}"]
    for row in rows:
        density = "" if row["density"] is None else f"{row['density']:g}" + ("*" if row["skewed"] else "")
        line = f"{case_label(row):48} {density:>8} {row['implementation']:26} "
        if row["error"] is not None:
            line += row["error"].splitlines()[0][:60]
        else:
            numbers = (row["milliseconds"], 9, 4), (row["percent_of_limit"], 8, 1), (row["versus_fastest_dense"], 8, 2)
            line += " ".join(" " * width if x is None else f"{x:{width}.{digits}f}" for x, width, digits in numbers)
        lines.append(line.rstrip())
    return "\n".join([*lines, "* skewed over heads"])


if __name__ == "__main__":
    sys.exit(main())
