"""Throughput of adaptation beside dense training of the same model by the same trainer.

The model has the shape of SmolLM2-135M, of Llama-3.2-1B, or of Gemma-3-270M (fifteen of whose eighteen layers have a
sliding window), and random weights, and the tokens are random: time does not depend on them. `dense` is the model as
transformers runs it (SDPA, without gates or predictors); the others train it to prune.

    python -m benchmarks.adaptation --json FILE
    python -m benchmarks.adaptation --shape 1b --training full --attention triton --compile only
    torchrun --nproc-per-node 2 -m benchmarks.adaptation --shape 1b --training full --attention triton --compile only

Under torchrun the same step, 32,768 tokens in all, is divided among the GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedConfig, TrainerCallback

import spkv
import spkv.hf.forward
from benchmarks.run import environment
from spkv.hf.compiled import compiled_parts
from spkv.training.adapt import training_arguments
from spkv.training.data import PackedRows, TrainingRows
from spkv.training.parameters import prepare_parameters
from spkv.training.recipes import Recipe, get_recipe
from spkv.training.tokens import Tokens
from spkv.training.trainer import AdaptationTrainer

_WARM_UP_STEPS = 6
_STEPS = 14
_LORA_RANKS = {"full": None, "lora": 24}
_COMPILED = {"no": (False,), "also": (False, True), "only": (True,)}
_COMMON: dict[str, Any] = dict(max_position_embeddings=8192, tie_word_embeddings=True)
SHAPES: dict[str, PreTrainedConfig] = {
    "smollm2": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        **_COMMON,
    ),
    "1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        **_COMMON,
    ),
    "gemma3-270m": Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        layer_types=[*["sliding_attention"] * 5, "full_attention"] * 3,
        sliding_window=512,
        **_COMMON,
    ),
}
"""SmolLM2-135M, Llama-3.2-1B and Gemma-3-270M."""


class _StepTimes(TrainerCallback):
    """Seconds of each step, from the end of the one before; the device's work and fetching rows included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *arguments: Any, **keywords: Any) -> None:
        self._end = time.perf_counter()

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._end)
        self._end = now


@contextlib.contextmanager
def _gated_attention_by(name: str) -> Iterator[None]:
    original = spkv.hf.forward.gated_attention

    def chosen(*args: Any, **kwargs: Any) -> torch.Tensor:
        # Sliding windows are another layer's business, and FlexAttention has none here.
        return original(*args, **kwargs, implementation=None if kwargs.get("sliding") else name)

    spkv.hf.forward.gated_attention = chosen
    try:
        yield
    finally:
        spkv.hf.forward.gated_attention = original


def _tokens(count: int, vocabulary: int) -> Tokens:
    """A single document, since dense training attends across documents."""
    tokens = np.random.default_rng(0).integers(5, vocabulary, count, dtype=np.uint32)
    return Tokens(tokens, np.zeros(1, dtype=np.int64), "")


def measure(
    shape: PreTrainedConfig, recipe: Recipe, attention: str, compile: bool, batch_size: int | None = None
) -> dict[str, Any]:
    """Train for some steps; returns tokens a second and the milliseconds of the median step.

    Args:
        shape: of the model.
        recipe: says how many tokens a step has.
        attention: "dense", or an implementation of `gated_attention`.
        compile: fuse small operations.
        batch_size: rows that a GPU computes at once; None: all of a step.

    Raises:
        ValueError: if a step's rows cannot be divided so.
    """
    step_rows = recipe.tokens_per_step // recipe.sequence_length
    own_rows, left = divmod(step_rows, gpus())
    batch_size = batch_size or own_rows
    if left or not own_rows or own_rows % batch_size:
        raise ValueError(f"{step_rows} rows of a step cannot be divided into {gpus()} x {batch_size}")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    if recipe.lora_rank is not None:
        base = base.to(torch.bfloat16)  # as `adapt` loads what LoRA leaves as it is
    model: Any = prepare_parameters(spkv.attach(base, recipe.config()), recipe)
    rows = _tokens(4 * recipe.tokens_per_step, shape.vocab_size)
    with tempfile.TemporaryDirectory() as output, contextlib.ExitStack() as stack:
        stack.enter_context(spkv.dense(model) if attention == "dense" else _gated_attention_by(attention))
        stack.enter_context(disable_input_dtype_casting(model, active=recipe.lora_rank is not None))
        if compile:
            stack.enter_context(compiled_parts(base, training=True))
        args = training_arguments(
            output,  # type: ignore[arg-type]
            recipe,
            recipe.total_steps(0),
            batch_size=batch_size,
            accumulation=own_rows // batch_size,
            save_every=10**9,
            log_every=10**9,
            seed=0,
            progress=False,
        )
        args.save_strategy = "no"
        wanted = args.max_steps * recipe.tokens_per_step // recipe.sequence_length
        trainer = AdaptationTrainer(
            model, args, recipe, TrainingRows(PackedRows(rows, recipe.sequence_length), wanted, 0)
        )
        times = _StepTimes()
        trainer.add_callback(times)
        trainer.train()
    median = statistics.median(times.seconds[_WARM_UP_STEPS:])
    return {
        "attention": attention,
        "compiled": compile,
        "gpus": gpus(),
        "batch_size": batch_size,
        "milliseconds_per_step": 1e3 * median,
        "tokens_per_second": recipe.tokens_per_step / median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def gpus() -> int:
    """How many share a step: torchrun's processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rows(
    shape: str = "smollm2",
    trainings: Sequence[str] = tuple(_LORA_RANKS),
    attentions: Sequence[str] = ("dense", "triton", "flex"),
    compiled: Sequence[bool] = (False, True),
    batch_size: int | None = None,
    report: Callable[[dict[str, Any]], None] = print,
) -> list[dict[str, Any]]:
    """Measure dense training and adaptation; each row names its share of the dense throughput, if that is measured."""
    found = []
    for training, compile in itertools.product(trainings, compiled):
        dense = None
        # What FlexAttention compiles is its own.
        for attention in (one for one in attentions if not (compile and one == "flex")):
            name = "dense-control" if attention == "dense" else "fast"
            # The anneal and the hard phase cost the same; soft gates for all steps keep the steps alike.
            changes: dict[str, Any] = dict(steps=_WARM_UP_STEPS + _STEPS, soft_fraction=1.0, anneal_steps=0)
            if (rank := _LORA_RANKS[training]) is not None:
                changes["lora_rank"] = rank
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            measured = measure(SHAPES[shape], get_recipe(name, **changes), attention, compile, batch_size)
            row = {"shape": shape, "training": training, **measured}
            dense = row["tokens_per_second"] if attention == "dense" else dense
            row["versus_dense"] = None if dense is None else row["tokens_per_second"] / dense
            found.append(row)
            report(row)
            torch.cuda.empty_cache()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adaptation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2")
    parser.add_argument("--training", nargs="+", choices=list(_LORA_RANKS), default=list(_LORA_RANKS))
    attentions = ["dense", "triton", "flex"]
    parser.add_argument("--attention", nargs="+", choices=attentions, default=attentions)
    parser.add_argument("--compile", choices=list(_COMPILED), default="also", help="whether small operations are fused")
    parser.add_argument("--batch-size", type=int, help="rows that a GPU computes at once; default: all of a step")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--commit", help="to record; default: what git says")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("the throughput of adaptation is measured on a CUDA device, and there is none here")
    first = os.environ.get("RANK", "0") == "0"
    if "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    result = environment("benchmarks.adaptation", options.commit, ("transformers", "peft"))

    def report(row: dict[str, Any]) -> None:
        if first:
            print(row, file=sys.stderr, flush=True)

    compiled = _COMPILED[options.compile]
    result["rows"] = rows(
        options.shape, options.training, options.attention, compiled, options.batch_size, report=report
    )
    if first:
        print(json.dumps(result))
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
