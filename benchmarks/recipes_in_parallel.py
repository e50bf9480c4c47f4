"""The runs of `benchmarks.recipes`, each on a GPU of its own, several at a time.

    python -m benchmarks.recipes_in_parallel --gpus 4 --suite frontier --data ... --json FILE --time-limit 1500

Takes the options of `benchmarks.recipes`, and several seeds. Controls come first, and a run is measured once its
control is there; of those that can start, the longest does. With `--at-once 2` a GPU has two runs, so that one computes
while the other starts or is measured; tokens a second are then no measurement. Every run writes a file of its own
beside FILE, and FILE has the rows of all that are finished. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.recipe_runs import SUITES, Run, control_of, find_run, with_controls
from benchmarks.recipes import UNFINISHED

# Options of `benchmarks.recipes` that say which runs there are, or what is done with them.
_OF_ONE_PROCESS = ("--set", "--layouts", "--controls", "--alone", "--list", "--train-only", "--merge", "--seed")


@dataclass
class Job:
    """A run with a seed, and how it stands: "waiting", "running", "done", or how it failed."""

    run: Run
    seed: int
    state: str = "waiting"

    @property
    def name(self) -> str:
        return f"{self.run.name}-seed{self.seed}"


class Fleet:
    """Hands runs out to GPUs.

    Args:
        runs: with their controls.
        seeds: each run is trained with each.
        arguments: for `benchmarks.recipes`, without runs, seeds and FILE.
        json_file: FILE.
        deadline: `time.monotonic()` at which to stop.
    """

    def __init__(
        self, runs: Sequence[Run], seeds: Sequence[int], arguments: list[str], json_file: Path, deadline: float
    ):
        self.jobs = {(run.name, seed): Job(run, seed) for seed in seeds for run in runs}
        # A control need not have a name that can be looked up.
        self.options = {run.name: ["--runs", run.name, "--alone"] for run in runs}
        self.options |= {
            control_of(run).name: ["--runs", run.name, "--controls"] for run in runs if control_of(run) != run
        }
        self.arguments, self.json_file, self.deadline = arguments, json_file, deadline
        self.changed = threading.Condition()

    def work(self, gpu: str) -> None:
        """Run one job after another on a GPU, until there is none left or the time is up."""
        while (job := self._next()) is not None:
            try:
                state = self._run(job, gpu)
            except OSError as error:
                state = f"failed: {error}"
            with self.changed:
                job.state = state
                print(f"GPU {gpu}: {job.name}: {state}", file=sys.stderr, flush=True)
                self.changed.notify_all()

    def merge(self) -> None:
        """Put the rows of all runs into FILE."""
        files = [str(path) for path in map(self._file, self.jobs.values()) if path.exists()]
        if files:
            command = [sys.executable, "-m", "benchmarks.recipes", "--json", str(self.json_file), "--merge", *files]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def _next(self) -> Job | None:
        """The longest job that can start: a control, or a run whose control has started."""
        with self.changed:
            if time.monotonic() > self.deadline:
                return None
            ready = [job for job in self.jobs.values() if job.state == "waiting" and self._is_ready(job)]
            if not ready:
                return None
            job = max(ready, key=lambda job: (not job.run.recipe.gates, job.run.recipe.tokens or 0))
            job.state = "running"
            return job

    def _is_ready(self, job: Job) -> bool:
        control = self._control(job)
        return control is job or control.state in ("running", "done")

    def _control(self, job: Job) -> Job:
        return self.jobs[control_of(job.run).name, job.seed]

    def _run(self, job: Job, gpu: str) -> str:
        """Train and measure; where the control is still running, train first and wait for it then."""
        control = self._control(job)
        if control is not job and control.state != "done":
            if (state := self._recipes(job, gpu, ["--train-only"])) != "done":
                return state
            with self.changed:
                self.changed.wait_for(lambda: control.state != "running", timeout=self._left())
            if control.state != "done":
                return "unfinished"
        return self._recipes(job, gpu, [] if control is job else ["--merge", str(self._file(control))])

    def _recipes(self, job: Job, gpu: str, options: list[str]) -> str:
        own = self._file(job)
        command = [sys.executable, "-m", "benchmarks.recipes", *self.options[job.run.name], "--seed", str(job.seed)]
        command += ["--json", str(own), *self.arguments, *options, "--time-limit", f"{self._left():.0f}"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        with own.with_suffix(".log").open("a") as log:
            code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
        return {0: "done", UNFINISHED: "unfinished"}.get(code, f"failed with exit code {code}, see {own.stem}.log")

    def _left(self) -> float:
        return max(1.0, self.deadline - time.monotonic())

    def _file(self, job: Job) -> Path:
        return self.json_file.with_name(f"{self.json_file.stem}-{job.name.replace('/', '_')}.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, `UNFINISHED`, or 1 where a run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes_in_parallel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, required=True, help="the first of those that CUDA_VISIBLE_DEVICES names")
    parser.add_argument(
        "--at-once", type=int, default=1, help="runs that a GPU has at a time; set --training-batch-size"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--suite", choices=sorted(SUITES), action="append", default=[])
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS")
    options, arguments = parser.parse_known_args(argv)
    refused = [name for name in _OF_ONE_PROCESS if any(word.split("=")[0] == name for word in arguments)]
    if refused:
        parser.error(f"{', '.join(refused)}: give this to benchmarks.recipes; a setting may join a run's name here")
    if options.at_once > 1 and not any(word.startswith("--training-batch-size") for word in arguments):
        parser.error("--at-once needs --training-batch-size: what fits when a run starts need not fit beside another")
    try:
        runs = [run for name in options.suite for run in SUITES[name]()] + list(map(find_run, options.runs))
    except ValueError as error:
        parser.error(str(error))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(options.gpus)))).split(",")
    if not 1 <= options.gpus <= len(visible) or options.at_once < 1:
        parser.error(f"--gpus must be 1 to {len(visible)}, those that are visible, and --at-once at least 1")
    deadline = time.monotonic() + min(options.time_limit, threading.TIMEOUT_MAX)
    fleet = Fleet(list(with_controls(runs)), options.seeds, arguments, options.json, deadline)
    workers = [threading.Thread(target=fleet.work, args=(gpu,)) for gpu in visible[: options.gpus] * options.at_once]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    fleet.merge()
    states = {job.name: job.state for job in fleet.jobs.values()}
    print(json.dumps({"runs": states, "json": options.json.name}))
    if any(state.startswith("failed") for state in states.values()):
        return 1
    return 0 if all(state == "done" for state in states.values()) else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
