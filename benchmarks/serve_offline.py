"""Llama-3.1-8B's shape in vLLM's offline engine, dense and self-pruned in the same KV memory. The last line is JSON.

    python -m benchmarks.serve_offline --json benchmarks/results/serve-offline.json

Weights are random, and predictors set so that each head keeps the share `--density` of a random text; what is kept is
read back from the cache, and a row with another density has no numbers. Three phases:

- `tpot`: as many requests as the memory holds when dense, in both; a step is timed where each makes one token.
- `full`: the same of self-pruned, with as many requests as the memory then holds.
- `load`: many requests, all queued at once; how many run at a time is up to the scheduler.

Each engine runs in a process of its own (`benchmarks.serve_offline_engine`), under a time limit, and adds a row to the
file after each phase. Rows that the file has of another implementation stay, if they were measured alike.
Whether tokens are right is tested elsewhere (`tests/serving`, on a GPU with `-m gpu`).

It needs vLLM (`pip install 'spkv[vllm]'`) and, but for `--quick`, a GPU with 80 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import spkv
from benchmarks.generate import QUICK_SHAPE, SHAPE_8B
from benchmarks.run import save
from benchmarks.serve_common import RUNNER, circumstances, print_summary

Row = dict[str, Any]

IMPLEMENTATIONS = ("dense", "spkv")
PHASES = ("tpot", "full", "load")
_BLOCK = 128  # vLLM's own on a CPU; a multiple of the blocks of the others, so that none wastes memory
_SPARE_STEPS = 20  # of a batch, beside those that are timed
_FILLED = 0.9  # of the memory, by the requests of the phase `full`; chunks of prompts under way need some, too
# What rows that stand in one file have in common.
_SHARED = (
    "density",
    "prompt_tokens",
    "new_tokens",
    "requests",
    "dense_requests",
    "steps",
    "chunk",
    "max_requests",
    "eager",
    "quick",
    "dtype",
)
# Of an engine's process, where the caller's environment does not say otherwise.
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # scheduler, model and cache are looked at
    **RUNNER,
    "VLLM_NO_USAGE_STATS": "1",
    # One process talks to itself, and its machine may have no network.
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if a row has an error, 2 without vLLM or with a file of other rows."""
    options = _parse(argv)
    if importlib.util.find_spec("vllm") is None:
        print("benchmarks.serve_offline needs vLLM: pip install 'spkv[vllm]'", file=sys.stderr)
        return 2
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of ending the engine's process
    result = circumstances("benchmarks.serve_offline", options.commit)
    result |= {"settings": {name: getattr(options, name) for name in _SHARED}, "engines": {}, "rows": []}
    try:
        result = with_others(result, options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        path = (options.json or Path(folder) / "rows.json").resolve()
        save(result, path)
        for implementation in options.implementations:
            print(f"{implementation}: starting ...", file=sys.stderr, flush=True)
            result = run_engine(implementation, options, path)
        result["seconds"] = round(time.monotonic() - start, 1)
        save(result, path)
    own = [row for row in result["rows"] if row["implementation"] in options.implementations]
    failed = [row for row in own if row["error"] is not None]
    print_summary(result, len(failed), options.json)
    return 1 if failed else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve_offline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--density", type=float, default=0.25, help="share of the pairs past the window to keep")
    parser.add_argument("--prompt-tokens", type=int, default=32_768)
    parser.add_argument("--new-tokens", type=int, default=256, help="of a request of the phase load")
    parser.add_argument("--requests", type=int, default=48, help="of the phase load")
    parser.add_argument(
        "--dense-requests",
        type=int,
        default=8,
        help="KV memory, as the longest requests that it holds when dense; so many run in the phase tpot",
    )
    parser.add_argument(
        "--full-requests", type=int, help="of the phase full; default: what fills 0.9 of the memory at the density"
    )
    parser.add_argument("--steps", type=int, default=100, help="that the phases tpot and full time")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens that a step runs at most")
    parser.add_argument("--max-requests", type=int, default=64, help="that an engine runs at a time at most")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs, and dense without vLLM's compiler")
    parser.add_argument("--quick", action="store_true", help="a small shape and few requests, for a CPU too")
    parser.add_argument("--time-limit", type=float, default=1800.0, metavar="SECONDS", help="of each engine")
    parser.add_argument("--json", type=Path, help="file for all rows, written after every phase")
    parser.add_argument("--commit", help="to record; default: what git says")
    # Nothing to choose. On CPUs float32, as in benchmarks.serve.
    parser.set_defaults(dtype="bfloat16" if torch.cuda.is_available() else "float32")
    parser.set_defaults(window=spkv.SPKVConfig().window)
    options = parser.parse_args(argv)
    if options.quick:
        options.prompt_tokens, options.new_tokens, options.requests, options.window = 256, 48, 8, 32
        options.dense_requests, options.steps, options.chunk, options.max_requests = 2, 20, 128, 8
        options.full_requests = 3
    if not 0.0 < options.density < 1.0:
        parser.error(f"--density must lie in (0, 1), not {options.density}")
    if options.full_requests is None:
        kept = options.density + (1 - options.density) * min(1.0, options.window / options.prompt_tokens)
        options.full_requests = min(options.max_requests, int(_FILLED * options.dense_requests / kept))
    if nothing := [one for one in options.implementations if not phases(one, options)]:
        parser.error(f"of {', '.join(nothing)} the phase full would be tpot again; choose another")
    for name in ("dense_requests", *["full_requests"] * ("full" in options.phases)):
        count, flag = getattr(options, name), name.replace("_", "-")
        if not 1 <= count < options.chunk:
            parser.error(f"--{flag} must be at least 1 and below --chunk, or else prompts wait for others' tokens")
        if options.max_requests < count:
            parser.error(f"--max-requests must not be below --{flag}, {count}")
    return options


def shape(options: argparse.Namespace) -> LlamaConfig:
    """The sizes of the model."""
    return QUICK_SHAPE if options.quick else SHAPE_8B


def with_others(result: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Add to a result what the file has of other implementations.

    Raises:
        ValueError: if that was measured otherwise.
    """
    command = result.pop("command")
    result["commands"] = dict.fromkeys(options.implementations, command)
    if options.json is None or not options.json.exists():
        return result
    other = json.loads(options.json.read_text(encoding="utf-8"))
    mine = options.implementations
    if not any(row["implementation"] not in mine for row in other["rows"]):
        return result
    different = [name for name in ("device", "commit", "versions", "settings") if other.get(name) != result[name]]
    if different:
        raise ValueError(f"{options.json} holds rows with other {', '.join(different)}; choose another file")
    result["commands"] = other["commands"] | result["commands"]
    result["engines"] = {name: facts for name, facts in other["engines"].items() if name not in mine}
    result["rows"] = [row for row in other["rows"] if row["implementation"] not in mine]
    return result


def phases(implementation: str, options: argparse.Namespace) -> list[str]:
    """The chosen ones, in order; `full` of dense would be `tpot` again."""
    return [phase for phase in PHASES if phase in options.phases and (phase, implementation) != ("full", "dense")]


def requests(phase: str, options: argparse.Namespace) -> int:
    """How many a phase has."""
    return int({"tpot": options.dense_requests, "full": options.full_requests, "load": options.requests}[phase])


def new_tokens(phase: str, options: argparse.Namespace) -> int:
    """Tokens that each request of a phase makes.

    But in `load` so many that the first still makes some when the last has read its prompt and all steps were timed.
    """
    if phase == "load":
        return int(options.new_tokens)
    batch = requests(phase, options)
    reading = math.ceil(batch * options.prompt_tokens / (options.chunk - batch))
    return int(reading + options.steps + _SPARE_STEPS)


def longest_request(options: argparse.Namespace) -> int:
    """Tokens, those of its prompt included."""
    return int(options.prompt_tokens + max(new_tokens(phase, options) for phase in PHASES))


def kv_bytes(options: argparse.Namespace) -> int:
    """Memory for `--dense-requests` of the longest request, and one block, which vLLM sets aside."""
    config = shape(options)
    pair = 2 * config.head_dim * getattr(torch, options.dtype).itemsize
    tokens = (options.dense_requests * math.ceil(longest_request(options) / _BLOCK) + 1) * _BLOCK
    return int(tokens * config.num_hidden_layers * config.num_key_value_heads * pair)


def row_head(implementation: str, phase: str, options: argparse.Namespace) -> Row:
    """A row before anything is measured; `density` is still the dense one's or unknown."""
    dense = implementation == "dense"
    return {
        "model": "quick shape" if options.quick else "Llama-3.1-8B shape",
        "dtype": options.dtype,
        "implementation": implementation,
        "phase": phase,
        "eager": options.eager,
        "kv_bytes": kv_bytes(options),
        "requests": requests(phase, options),
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": new_tokens(phase, options),
        "chunk": options.chunk,
        "target_density": None if dense else options.density,
        "density": 1.0 if dense else None,
        "error": None,
    }


def add_missing(result: dict[str, Any], implementation: str, options: argparse.Namespace, error: str) -> None:
    """Enter a row with an error and no numbers for each phase that was not measured."""
    there = {row["phase"] for row in result["rows"] if row["implementation"] == implementation}
    for phase in phases(implementation, options):
        if phase not in there:
            result["rows"].append(row_head(implementation, phase, options) | {"error": error})


def run_engine(implementation: str, options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Have a process of its own add its rows to the file, which is returned; those it did not get to say why."""
    with subprocess.Popen(
        command(implementation, options, path),
        cwd=Path(__file__).parents[1],
        env=_SETTINGS | os.environ,
        stdout=sys.stderr,  # the last line of stdout is ours
        start_new_session=True,
    ) as process:
        try:
            error = f"its process ended with code {process.wait(options.time_limit)}"
        except subprocess.TimeoutExpired:
            error = f"not done in {options.time_limit:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing is left of it
                os.killpg(process.pid, signal.SIGKILL)
    result = json.loads(path.read_text(encoding="utf-8"))
    add_missing(result, implementation, options, error)
    save(result, path)
    for row in result["rows"]:
        if row["implementation"] == implementation:
            print(line(row), file=sys.stderr, flush=True)
    return result


def command(implementation: str, options: argparse.Namespace, path: Path) -> list[str]:
    """What runs an engine that adds its rows to the file."""
    values = json.dumps(vars(options) | {"json": None})
    return [sys.executable, "-m", "benchmarks.serve_offline_engine", implementation, str(path), values]


def line(row: Row) -> str:
    """A row as text."""
    head = (
        f"{row['implementation']:6} {row['phase']} {row['requests']} x ({row['prompt_tokens']}+{row['new_tokens']})"
        + (f" density {row['density']:.3f}" if row["density"] is not None else "")
    )
    if "tokens_per_second" not in row:
        return f"{head}: {row['error']}"
    numbers = f"TPOT {row['tpot_ms_median']:.2f} ms (p90 {row['tpot_ms_p90']:.2f})"
    numbers += f", {row['tokens_per_second']:.1f} tokens/s, KV at most {row['kv_use_max']:.0%}"
    if row["phase"] == "load":
        numbers += f", TTFT {row['ttft_ms_median']:.0f} ms (p90 {row['ttft_ms_p90']:.0f}), in flight "
        numbers += f"{row['in_flight_mean']:.1f} (most {row['in_flight_max']:.0f}), preempted {row['preemptions']}"
    return f"{head}: {numbers}" + ("" if row["error"] is None else f"; {row['error']}")


if __name__ == "__main__":
    sys.exit(main())
