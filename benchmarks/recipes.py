"""Trains named runs one after another and measures what each costs at each density, against its dense control.

    python -m benchmarks.recipes --suite frontier --data train.npz --validation valid.npz --output runs --json FILE
    python -m benchmarks.recipes --runs "20M-d0.2 initial_bias=1" 20M-d0.1 --data ... --time-limit 570

The same command goes on where it was stopped, whether by its time limit or from outside: finished runs are skipped,
unfinished ones resume. Rows are added to those that FILE holds; `--merge` adds those of other files. Exit code 3 says
that the time limit left something undone. The last line of stdout is JSON. `benchmarks.recipes_in_parallel` gives each
run a GPU of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

import spkv
from benchmarks.losses import measure
from benchmarks.recipe_results import Results
from benchmarks.recipe_runs import SUITES, Run, control_of, find_run, parse_setting, with_controls
from benchmarks.run import environment
from spkv.checkpoint import is_adapter, load_base, resolve_model
from spkv.gates import HardGate, LayoutGate, OpenGate, RandomGate, SinkGate, ThresholdGate
from spkv.training import adapt
from spkv.training.data import PackedRows, spread
from spkv.training.tokens import Tokens, document_prefix, tokenize_files

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
_LOG_EVERY = 50
UNFINISHED = 3


class TimeIsUpError(Exception):
    """The time limit was reached; what is done is stored."""


class _Deadline(TrainerCallback):
    """Stops a run at the first step past a moment, once that step is in a checkpoint."""

    def __init__(self, moment: float):
        self.moment = moment

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_save |= time.monotonic() > self.moment
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A run whose last step this was needs no more time.
        if time.monotonic() > self.moment and state.global_step < state.max_steps:
            raise TimeIsUpError


class Suite:
    """Runs on one model and its data.

    Args:
        options: the command line's.
        results: where rows go.
        deadline: `time.monotonic()` at which to stop.
    """

    def __init__(self, options: argparse.Namespace, results: Results, deadline: float):
        self.options, self.results, self.deadline = options, results, deadline
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = options.model
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(self.model))
        self.held_out: Tokens = tokenize_files([options.validation], tokenizer, progress=False)
        self.prefix = document_prefix(tokenizer)

    def run(self, run: Run) -> None:
        """Train a run and add its rows, or what of them is missing.

        Raises:
            TimeIsUpError: at the deadline.
        """
        rows = self._rows(run)
        identity = self._identity(run, rows)
        self.results.check_recipe(identity, run.recipe)
        policies = _policies(run, self.options.thresholds, self.options.baselines)
        missing = [policy for policy in policies if self.results.find(identity, *policy) is None]
        if not missing:
            return
        self._check_time()
        summary = self._train(run)
        if self.options.train_only:
            return
        self.results.add_recipe(identity, run.recipe)
        trained = {
            "method": run.method,
            "target": run.recipe.target_density,
            "tokens": summary["tokens"],
            "passes": summary["passes"],
            "train_loss": summary["train_loss"],
            "seconds": _seconds(summary),
            "tokens_per_second": summary["tokens_per_second"],
            "compiled": summary["compiled"],
        }
        control = {**identity, "run": control_of(run).name}
        model = self._load(run)
        for policy, threshold in missing:
            self._check_time()
            gate = self._gate(run, policy, threshold, identity)
            found = measure(self._base(run) if policy == "base" else model, rows, gate, self.options.batch_size)
            dense = found if policy == "dense" else self.results.find(control, run.reference, None)
            if dense is None:
                raise ValueError(f"{run.name} is compared with {control['run']}, of which there are no rows")
            dense_loss = dense["loss"]
            row = {
                **identity,
                **trained,
                "policy": policy,
                "threshold": threshold,
                **({"strategy": run.strategy, "coverage": run.coverage} if run.method == "layout" else {}),
                **found,
                "dense_loss": dense_loss,
                "increase": found["loss"] / dense_loss - 1,
            }
            self.results.add(row)
            print(line(row), file=sys.stderr, flush=True)

    def _identity(self, run: Run, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        length = rows[0]["input_ids"].numel()
        return {
            "model": Path(self.model).name,
            "run": run.name,
            "seed": self.options.seed,
            "data": [path.name for path in self._data(run)],
            "validation": self.options.validation.name,
            "validation_tokens": len(rows) * length,
            "evaluation_length": length,
        }

    def _rows(self, run: Run) -> Any:
        length = self.options.evaluation_length or run.recipe.sequence_length
        return spread(PackedRows(self.held_out, length, self.prefix), self.options.validation_tokens)

    def _data(self, run: Run) -> list[Path]:
        return [*self.options.data, *([self.options.retrieval] if run.retrieval else [])]

    def _directory(self, run: Run) -> Path:
        name = re.sub(r"[^\w.=,-]+", "_", run.name)
        return self.options.output / Path(self.model).name / f"{name}-seed{self.options.seed}"

    def _train(self, run: Run) -> dict[str, Any]:
        # What the last run's model held has to be free before a batch size is chosen.
        gc.collect()
        torch.cuda.empty_cache()
        print(f"training {run.name}", file=sys.stderr, flush=True)
        return adapt(
            self.model,
            self._data(run),
            self._directory(run),
            run.recipe,
            resume=True,
            seed=self.options.seed,
            batch_size=self.options.training_batch_size,
            compile=self.options.compile,
            save_every=self.options.save_every,
            log_every=_LOG_EVERY,
            progress=False,
            callbacks=[_Deadline(self.deadline)],
        )

    def _load(self, run: Run) -> PreTrainedModel:
        gc.collect()
        directory = self._directory(run)
        options: dict[str, Any] = {"dtype": torch.float32}
        if not run.recipe.is_control:
            if not is_adapter(directory):
                return spkv.load(directory, device=self.device, **options)
            return spkv.load(self.model, adapter=directory, device=self.device, **options)
        if run.recipe.lora_rank is None:
            return self._attached(load_base(directory, **options), run)
        return self._attached(
            PeftModel.from_pretrained(load_base(self.model, **options), directory).merge_and_unload(), run
        )

    def _base(self, run: Run) -> PreTrainedModel:
        return self._attached(load_base(self.model, dtype=torch.float32), run)

    def _attached(self, plain: PreTrainedModel, run: Run) -> PreTrainedModel:
        # With open gates it computes the same, and tells documents of a row apart as adapted models do.
        return spkv.attach(plain, run.recipe.config()).to(self.device).eval()

    def _gate(self, run: Run, policy: str, threshold: float | None, identity: dict[str, Any]) -> HardGate:
        if policy == "spkv":
            assert threshold is not None
            return ThresholdGate(threshold)
        if policy == "layout":
            assert run.recipe.layout is not None
            return LayoutGate(run.recipe.layout, run.recipe.sinks)
        if policy == "random":
            like = self.results.find(identity, "spkv", _reference(self.options.thresholds))
            assert like is not None
            return RandomGate(like["density"])
        return SinkGate() if policy == "streaming" else OpenGate()

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise TimeIsUpError


def _reference(thresholds: Sequence[float]) -> float:
    """The threshold whose density random gates copy."""
    return 0.5 if 0.5 in thresholds else thresholds[0]


def _seconds(summary: dict[str, Any]) -> float | None:
    """Of the whole training, at the rate of its last part; a resumed run's own seconds leave out the earlier ones."""
    rate = summary["tokens_per_second"]
    return round(summary["tokens"] / rate, 1) if rate else None


def _policies(run: Run, thresholds: Sequence[float], baselines: bool) -> list[tuple[str, float | None]]:
    if run.recipe.is_control:
        return [("dense", None), ("base", None)]
    if run.recipe.layout is not None:
        return [("layout", None)]
    others: list[tuple[str, float | None]] = [(policy, None) for policy in ("streaming", "random", "open")]
    return [*(("spkv", threshold) for threshold in thresholds), *(others if baselines else [])]


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    threshold = "" if row["threshold"] is None else f"{row['threshold']:g}"
    name = f"{row['run'][:44]:44} {row['policy']:9} {threshold:>4}"
    missed = ""
    if row["policy"] == "spkv" and row["threshold"] == 0.5 and row["target"] is not None:
        missed = f", density {100 * (row['density'] / row['target'] - 1):+.0f} % of its target"
    return f"{name} density {row['density']:.3f} loss {row['loss']:.4f} ({100 * row['increase']:+.2f} %{missed})"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or `UNFINISHED`."""
    options = _parse(argv)
    disable_progress_bar()
    start = time.monotonic()
    circumstances = environment("benchmarks.recipes", options.commit, ("transformers", "accelerate", "peft"))
    results = Results(options.json, circumstances)
    for path in options.merge:
        results.merge(path)
    runs = list(_chosen(options))
    undone = []
    if runs:
        suite = Suite(options, results, start + options.time_limit)
        for number, run in enumerate(runs):
            try:
                suite.run(run)
            except TimeIsUpError:
                undone = [run.name for run in runs[number:]]
                break
    summary = {"runs": len(runs), "undone": undone, "rows": len(results.rows), "json": options.json.name}
    print(json.dumps(summary | {"seconds": round(time.monotonic() - start, 1)}))
    return UNFINISHED if undone else 0


def _chosen(options: argparse.Namespace) -> Iterator[Run]:
    chosen = [run for name in options.suite for run in SUITES[name]()] + list(map(find_run, options.runs))
    changed = [run.with_changes(dict(options.set)) for run in chosen]
    # Runs that differ in their gates alone have one twin with a layout.
    changed += dict.fromkeys(run.with_layout(directory) for run in changed for directory in options.layouts)
    if options.controls:
        return iter({control.name: control for control in map(control_of, changed)}.values())
    return iter(changed) if options.alone else with_controls(changed)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--suite", choices=sorted(SUITES), action="append", default=[])
    parser.add_argument(
        "--runs", nargs="+", default=[], metavar="NAME", help="of a suite, or a recipe's; also 'NAME FIELD=VALUE'"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--controls", action="store_true", help="only the controls of these runs")
    which.add_argument("--alone", action="store_true", help="without controls, whose rows must be there already")
    parser.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change this of every run's recipe, as in tokens=200000; it joins the run's name",
    )
    parser.add_argument(
        "--layouts",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="checkpoints by `spkv hybrid`: also train each run with their layouts, in place of gates",
    )
    parser.add_argument("--list", action="store_true", help="only print the names of the chosen runs and controls")
    parser.add_argument("--model", default="smollm2", help="directory, hub name or packaged model; default: smollm2")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="training data, as for `spkv adapt`")
    parser.add_argument("--retrieval", type=Path, help="data that runs named +retrieval mix in")
    parser.add_argument("--validation", type=Path, help="held-out data")
    parser.add_argument("--validation-tokens", type=int, default=1_000_000, help="to use at most, spread evenly")
    parser.add_argument("--evaluation-length", type=int, help="tokens of a held-out row; default: the recipe's")
    parser.add_argument("--thresholds", type=float, nargs="+", default=list(THRESHOLDS))
    parser.add_argument("--no-baselines", dest="baselines", action="store_false", help="measure self-pruning only")
    parser.add_argument("--batch-size", type=int, default=4, help="rows evaluated at once")
    parser.add_argument("--training-batch-size", type=int, help="rows trained on at once; default: what should fit")
    parser.add_argument("--compile", action="store_true", help="train with the small operations compiled")
    parser.add_argument("--train-only", action="store_true", help="measure nothing yet, so that no control is needed")
    parser.add_argument("--output", type=Path, help="directory for models and checkpoints")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows, written after every one")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="files whose rows are added first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, help="steps between checkpoints; default: ten in a run")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="stop cleanly then")
    parser.add_argument("--commit", help="to record; default: what git says")
    options = parser.parse_args(argv)
    for name in options.runs:
        try:
            find_run(name)
        except ValueError as error:
            parser.error(str(error))
    if options.list:
        print(*(run.name for run in _chosen(options)), sep="\n")
        parser.exit()
    if options.suite or options.runs:
        missing = [name for name in ("data", "validation", "output") if not getattr(options, name)]
        if missing:
            parser.error(f"runs need --{', --'.join(missing)}")
        if options.retrieval is None and any(run.retrieval for run in _chosen(options)):
            parser.error("runs named +retrieval need --retrieval; benchmarks.retrieval_data makes such a file")
    return options


def setting(text: str) -> tuple[str, Any]:
    """`parse_setting` for argparse."""
    try:
        return parse_setting(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
