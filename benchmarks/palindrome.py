"""Palindrome reversal: a task that no window can hold, and that a self-pruned cache solves at low density.

A sequence is random symbols, a separator, and the same symbols reversed. They are distinct, so that the one written
last tells which comes next: the one before it in the first half, up to the whole sequence away. Small models are
trained from scratch on the same sequences, with a loss on the reversed half alone: dense; with nothing but a window;
and self-pruned from the first step, to several densities.

    python -m benchmarks.palindrome --json FILE          # a few minutes on a GPU
    python -m benchmarks.palindrome --json FILE --quick  # a minute or two on a CPU

Accuracy is that of the reversed half, each symbol predicted from the true ones before it. Models that FILE has rows
of are not trained again. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import spkv
from benchmarks.losses import measure
from benchmarks.recipes import setting
from benchmarks.run import environment, save
from spkv.gates import OpenGate, ThresholdGate
from spkv.training.adapt import training_arguments
from spkv.training.data import IGNORED, PackedRows, TrainingRows
from spkv.training.parameters import prepare_parameters
from spkv.training.recipes import Recipe
from spkv.training.tokens import Tokens
from spkv.training.trainer import AdaptationTrainer

SEPARATOR = 0
_HELD_OUT = 256
_METHODS = ("dense", "window", "spkv")


@dataclass(frozen=True)
class Size:
    """A task and a model for it.

    Attributes:
        symbols: there are to draw from.
        half: symbols of a sequence before they are reversed.
        window: of the attention.
        layers, heads, head_dim: of the model; every head has keys of its own.
        steps: of training.
        rows: sequences of a step.
        learning_rate: the model's peak.
    """

    symbols: int
    half: int
    window: int
    layers: int
    heads: int
    head_dim: int
    steps: int
    rows: int
    learning_rate: float

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 2 * self.half + 1


REAL = Size(symbols=512, half=255, window=16, layers=2, heads=4, head_dim=64, steps=2000, rows=64, learning_rate=1e-3)
QUICK = Size(symbols=32, half=16, window=4, layers=2, heads=2, head_dim=32, steps=500, rows=64, learning_rate=3e-3)


class Palindromes(PackedRows):
    """Drawn sequences, a row each, with labels in the reversed half alone: the first cannot be foretold.

    Args:
        size: of the task.
        count: sequences.
        seed: of the draw.
    """

    def __init__(self, size: Size, count: int, seed: int):
        draw = np.random.default_rng(seed)
        first = 1 + np.stack([draw.permutation(size.symbols)[: size.half] for _ in range(count)])
        separator = np.full((count, 1), SEPARATOR)
        sequences = np.concatenate([first, separator, first[:, ::-1]], axis=1).astype(np.uint16)
        self.half = size.half
        super().__init__(Tokens(sequences.reshape(-1), np.arange(count) * size.length), size.length)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        row["labels"][: self.half + 1] = IGNORED
        return row


def recipe_of(method: str, size: Size, target: float | None = None) -> Recipe:
    """Return how a method trains; `target` is the density of "spkv"."""
    recipe = Recipe(
        f"palindrome-{method}",
        steps=size.steps,
        sequence_length=size.length,
        tokens_per_step=size.rows * size.length,
        learning_rate=size.learning_rate,
        window=size.window,
        initial_bias=2.0,
        predictor_lr_multiplier=5.0,
        weight_decay=0.01,
        predictor_weight_decay=0.01,
        # A long anneal: sharp attention reads through soft gates that a hard one shuts, and has to find other ways.
        soft_fraction=0.6,
        anneal_steps=size.steps // 5,
    )
    if method == "dense":
        return recipe.replace(gates=False)
    if method == "window":
        # Gates that start closed and never learn: beyond the window there is nothing to see.
        return recipe.replace(initial_bias=-30.0, predictor_lr_multiplier=0.0, predictor_weight_decay=0.0)
    return recipe.replace(target_density=target, regulariser_form="concave")


def make_model(size: Size) -> LlamaForCausalLM:
    """A random model of the task's size, the same every time."""
    torch.manual_seed(0)
    width = size.heads * size.head_dim
    config = LlamaConfig(
        vocab_size=size.symbols + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.length,
        bos_token_id=None,
        eos_token_id=SEPARATOR,
    )
    return LlamaForCausalLM(config)


def train(recipe: Recipe, size: Size, seed: int) -> Any:
    """Train a model from scratch; returns it in evaluation mode."""
    model: Any = prepare_parameters(spkv.attach(make_model(size), recipe.config()), recipe)
    rows = size.steps * size.rows
    with tempfile.TemporaryDirectory() as output:
        args = training_arguments(
            Path(output),
            recipe,
            size.steps,
            batch_size=size.rows,
            accumulation=1,
            save_every=size.steps + 1,
            log_every=max(1, size.steps // 20),
            seed=seed,
            progress=False,
        )
        args.save_strategy = "no"
        trainer = AdaptationTrainer(model, args, recipe, TrainingRows(Palindromes(size, rows, seed), rows, seed))
        trainer.train()
    return model.eval()


def run(method: str, target: float | None, size: Size, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Train by a method, "spkv" with changes of its recipe, and return its row."""
    gc.collect()
    torch.cuda.empty_cache()
    start = time.monotonic()
    recipe = recipe_of(method, size, target).replace(**changes)
    model = train(recipe, size, seed)
    seconds = time.monotonic() - start
    gate = ThresholdGate(recipe.threshold) if recipe.gates else OpenGate()
    held_out = Palindromes(size, _HELD_OUT, seed + 1_000_000)
    return {
        "method": method,
        "target": target,
        "changes": changes,
        "threshold": recipe.threshold if recipe.gates else None,
        **measure(model, held_out, gate, batch_size=32),
        "seed": seed,
        "seconds": round(seconds, 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    parser.add_argument("--quick", action="store_true", help="short sequences and a tiny model")
    parser.add_argument("--methods", nargs="+", choices=_METHODS, default=list(_METHODS))
    parser.add_argument("--targets", type=float, nargs="+", help="densities of spkv; default: 0.4 0.3 0.2, quick 0.3")
    settings: dict[str, Any] = dict(nargs="+", type=setting, default=[], metavar="FIELD=VALUE")
    parser.add_argument("--set", **settings, help="of the task, such as steps=4000")
    parser.add_argument("--recipe", **settings, help="of spkv's recipe, such as gate_noise=1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="to record; default: what git says")
    options = parser.parse_args(argv)
    size = dataclasses.replace(QUICK if options.quick else REAL, **dict(options.set))
    changes = dict(options.recipe)
    start = time.monotonic()
    result = environment("benchmarks.palindrome", options.commit, ("transformers",))
    result |= {"task": dataclasses.asdict(size), "rows": []}
    if options.json.exists():
        stored = json.loads(options.json.read_text(encoding="utf-8"))
        if stored["task"] != result["task"]:
            parser.error(f"{options.json.name} holds another task: {stored['task']}")
        result["rows"] = stored["rows"]
    wanted: list[tuple[str, float | None]] = [(method, None) for method in options.methods if method != "spkv"]
    targets = options.targets or ([0.3] if options.quick else [0.4, 0.3, 0.2])
    wanted += [("spkv", target) for target in targets if "spkv" in options.methods]
    done = [(row["method"], row["target"], row["changes"], row["seed"]) for row in result["rows"]]
    for method, target in wanted:
        own = changes if method == "spkv" else {}
        if (method, target, own, options.seed) not in done:
            result["rows"].append(run(method, target, size, options.seed, own))
            print(result["rows"][-1], file=sys.stderr, flush=True)
            save(result, options.json)
    print(json.dumps({"rows": len(result["rows"]), "seconds": round(time.monotonic() - start, 1)}))


if __name__ == "__main__":
    main()
