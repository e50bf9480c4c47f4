"""All that docs/evaluation.md shows, measured: `spkv eval` on each text, task and length, several at a time.

    python -m benchmarks.evaluation_runs my-model-spkv --reference my-control --name "my model" --gpus 2 --at-once 6 \\
        --text books=valid.jsonl.xz --essays essays.jsonl.xz --commit efe3988 --output runs --json FILE

Losses come first. The same command goes on where it was stopped; FILE gets the rows of what is done, as
`benchmarks.evaluation` writes them. Exit code 3 says that the time limit left something undone, 1 that a run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import evaluation
from benchmarks.recipes import UNFINISHED
from spkv.evals.policies import POLICIES, make_policies
from spkv.evals.records import RESULTS_FILE
from spkv.evals.tasks import GROUPS

LENGTHS = (4096, 8192)
KINDS = ("losses", "answers")
# Of each kind of task at each length: losses take more text, since other methods' are of its last tokens alone.
_TOKENS, _TOKENS_FOR_LOSSES = 2**17, 2**19
_DEPTHS, _NEEDLES_AT_A_DEPTH = 11, 3
_LOSS_BATCH = 16
_STAMP = "run.json"


@dataclass(frozen=True)
class Evaluation:
    """One `spkv eval`: the directory that it writes to, its own arguments, and the text that losses are of."""

    name: str
    arguments: tuple[str, ...]
    text: str | None = None


def evaluations(
    texts: Mapping[str, Path], essays: Path | None, lengths: Sequence[int] = LENGTHS, only: str | None = None
) -> Iterator[Evaluation]:
    """Losses of the texts, needles, several questions on one cache, and RULER's tasks that need no file of questions.

    Args:
        texts: held-out text, by name.
        essays: the haystack of all tasks that have one; None takes their default.
        lengths: of sequences and examples, in tokens.
        only: out of `KINDS`; None takes both.
    """
    for length in lengths if only != "answers" else ():
        for name, file in texts.items():
            of_text = _task_arguments("nll", length, max(1, _TOKENS_FOR_LOSSES // length), _LOSS_BATCH)
            yield Evaluation(f"{name}-{length}", (*of_text, "--data", str(file)), name)
    for length in lengths if only != "losses" else ():
        haystack = () if essays is None else ("--task-option", f"essays={essays}")
        needles, examples = _DEPTHS * _NEEDLES_AT_A_DEPTH, max(1, _TOKENS // length)
        for task in ("niah", "turns", *GROUPS["ruler_synthetic"]):
            count = needles if task == "niah" else examples
            yield Evaluation(f"{task}-{length}", (*_task_arguments(task, length, count, count), *haystack))


def _task_arguments(task: str, length: int, examples: int, batch_size: int) -> tuple[str, ...]:
    given = {"--task": task, "--sequence-length": length, "--limit": examples, "--batch-size": batch_size}
    return tuple(str(part) for option in given.items() for part in option)


class Pool:
    """Runs evaluations, several at a time on each GPU.

    Args:
        waiting: what to run, in this order.
        common: arguments of all of them.
        output: directory for their results and logs.
        deadline: `time.monotonic()` at which they are stopped.
    """

    def __init__(self, waiting: Sequence[Evaluation], common: Sequence[str], output: Path, deadline: float):
        self.common, self.output, self.deadline = list(common), output, deadline
        self.states: dict[str, str] = {one.name: "undone" for one in waiting}
        self._waiting: queue.SimpleQueue[Evaluation] = queue.SimpleQueue()
        for one in waiting:
            self._waiting.put(one)

    def run(self, gpus: int, at_once: int) -> dict[str, str]:
        """Returns by name how each ended: done, undone, or failed, with the place of its log."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        places = [gpu for gpu in (visible.split(",")[:gpus] if gpus else [None]) for _ in range(at_once)]
        threads = max(1, (os.cpu_count() or 1) // len(places))
        workers = [threading.Thread(target=self._work, args=(gpu, threads)) for gpu in places]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join()
        except BaseException:
            self.deadline = 0.0  # interrupted: nothing else is to start
            raise
        return self.states

    def _work(self, gpu: str | None, threads: int) -> None:
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "CUDA_VISIBLE_DEVICES": gpu or ""}
        while time.monotonic() < self.deadline:
            try:
                one = self._waiting.get_nowait()
            except queue.Empty:
                return
            self.states[one.name] = self._evaluate(one, environment)
            print(f"{one.name}: {self.states[one.name]}", file=sys.stderr, flush=True)

    def _evaluate(self, one: Evaluation, environment: Mapping[str, str]) -> str:
        command = [sys.executable, "-m", "spkv.cli", "eval", *self.common, *one.arguments]
        log = self.output / f"{one.name}.log"
        with log.open("a") as written:
            try:
                code = subprocess.run(
                    [*command, "--output", str(self.output / one.name)],
                    env=environment,
                    stdout=written,
                    stderr=written,
                    timeout=max(1.0, self.deadline - time.monotonic()),
                ).returncode
            except subprocess.TimeoutExpired:
                return "undone"
        return "done" if code == 0 else f"failed with exit code {code}, see {log.name}"


def command_of(arguments: Sequence[str]) -> str:
    """An evaluation's command without the paths of the machine that it ran on."""
    return shlex.join(["spkv", "eval", *(re.sub(r"[^,=]*/", "", part) for part in arguments)])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, `UNFINISHED`, or 1 where a run failed."""
    options = _parse(argv)
    waiting = list(evaluations(dict(options.text), options.essays, options.lengths, options.only))
    policies = [*options.policies, *([f"twin={options.twin}"] if options.twin else [])]
    common = [str(options.model), "--policies", ",".join(policies), "--thresholds", options.thresholds]
    if options.match_thresholds is not None:
        common += ["--match-thresholds", options.match_thresholds]
    if options.reference is not None:
        common += ["--reference", str(options.reference)]
    if options.dtype is not None:
        common += ["--dtype", options.dtype]
    options.output.mkdir(parents=True, exist_ok=True)
    _check_same(options.output / _STAMP, {"commit": options.commit, "arguments": common})
    pool = Pool(waiting, common, options.output, time.monotonic() + min(options.time_limit, threading.TIMEOUT_MAX))
    states = pool.run(options.gpus, options.at_once)
    device = torch.cuda.get_device_name() if options.gpus else "CPU"
    rows = []
    for one in waiting:
        directory = options.output / one.name
        if (directory / RESULTS_FILE).is_file():
            about = {"model": options.name, "device": device, "commit": options.commit}
            found = evaluation.gather([directory], {**about, "command": command_of([*common, *one.arguments])})
            rows += [{**row, "data": one.text} for row in found]
    summary = {"rows": evaluation.add(rows, options.json), "json": options.json.name, "evaluations": states}
    print(json.dumps(summary))
    if any(state.startswith("failed") for state in states.values()):
        return 1
    return 0 if all(state == "done" for state in states.values()) else UNFINISHED


def _check_same(stamp: Path, run: dict[str, Any]) -> None:
    """Raise a ValueError if another commit or command has measured what is there: its rows would be taken for ours."""
    if not stamp.exists():
        stamp.write_text(json.dumps(run) + "\n", encoding="utf-8")
    elif (before := json.loads(stamp.read_text(encoding="utf-8"))) != run:
        raise ValueError(f"{stamp.parent} holds what was measured by {before}, not by {run}; choose another --output")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation_runs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="self-pruned checkpoint")
    parser.add_argument("--reference", type=Path, help="for dense and the methods of others; default: the model")
    parser.add_argument("--twin", type=Path, help="the reference with predictors that were fitted to it, frozen")
    parser.add_argument("--name", required=True, help="what the rows call the model")
    parser.add_argument("--commit", required=True, help="that is measured")
    parser.add_argument("--text", type=named_file, action="append", default=[], metavar="NAME=FILE", help="for losses")
    parser.add_argument("--essays", type=Path, help="haystack of all tasks; default: Python's documentation")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--only", choices=KINDS, help="default: both")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), help="those of `spkv eval`, spaces between")
    parser.add_argument("--thresholds", default="0.5", help="of policy spkv, with commas")
    parser.add_argument("--match-thresholds", help="those whose memory the other methods get; default: all")
    parser.add_argument("--dtype", help="of weights and cache")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="default: all; 0 is the CPU")
    parser.add_argument("--at-once", type=int, default=1, help="evaluations on a GPU at a time")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--output", type=Path, required=True, help="directory for what is measured, and logs")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    options = parser.parse_args(argv)
    try:
        make_policies(options.policies)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if options.only == "losses" and not options.text:
        parser.error("--only losses needs a --text NAME=FILE")
    if options.at_once < 1:
        parser.error(f"--at-once must be at least 1, not {options.at_once}")
    if len(dict(options.text)) < len(options.text):
        parser.error("two --text have one name")
    return options


def named_file(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not name or "/" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name, Path(path)


if __name__ == "__main__":
    sys.exit(main())
