"""Throughput of adaptation beside dense training of the same model by the same trainer.

The model has the shape of SmolLM2-135M and random weights, and the tokens are random: time does not depend on them.
`dense` is the model as transformers runs it (SDPA, without gates or predictors); the others train it to prune.

    python -m benchmarks.adaptation --json FILE
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

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


class _StepTimes(TrainerCallback):
    """Seconds of each step, the device's work included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
        torch.cuda.synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)


@contextlib.contextmanager
def _gated_attention_by(name: str) -> Iterator[None]:
    original = spkv.hf.forward.gated_attention
    spkv.hf.forward.gated_attention = functools.partial(original, implementation=name)  # type: ignore[assignment]
    try:
        yield
    finally:
        spkv.hf.forward.gated_attention = original


def smollm2_shape() -> LlamaForCausalLM:
    """SmolLM2-135M with random weights, in float32."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def _tokens(count: int, document: int) -> Tokens:
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 49000, count, dtype=np.uint16)
    return Tokens(tokens, np.arange(0, count, document, dtype=np.int64), "")


def measure(recipe: Recipe, attention: str, batch_size: int, steps: int, compile: bool) -> dict[str, Any]:
    """Train for some steps; returns tokens a second and the milliseconds of the median step."""
    base = smollm2_shape()
    if recipe.lora_rank is not None:
        base = base.to(torch.bfloat16)  # as `adapt` loads what LoRA leaves as it is
    model: Any = prepare_parameters(spkv.attach(base, recipe.config()), recipe)
    rows = _tokens(4 * recipe.tokens_per_step, document=10**9)  # one document: dense training attends across documents
    with tempfile.TemporaryDirectory() as output, contextlib.ExitStack() as stack:
        stack.enter_context(spkv.dense(model) if attention == "dense" else _gated_attention_by(attention))
        stack.enter_context(disable_input_dtype_casting(model, active=recipe.lora_rank is not None))
        if compile:
            stack.enter_context(compiled_parts(base, training=True))
        args = training_arguments(
            output,  # type: ignore[arg-type]
            recipe,
            _WARM_UP_STEPS + steps,
            batch_size=batch_size,
            accumulation=recipe.tokens_per_step // recipe.sequence_length // batch_size,
            save_every=10**9,
            log_every=10**9,
            seed=0,
            progress=False,
        )
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
        "batch_size": batch_size,
        "milliseconds_per_step": 1e3 * median,
        "tokens_per_second": recipe.tokens_per_step / median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def rows(
    steps: int = 14, batch_size: int = 8, report: Callable[[dict[str, Any]], None] = print
) -> list[dict[str, Any]]:
    """Measure dense training and adaptation; each row names its share of the dense throughput."""
    found = []
    for (training, lora_rank), compile in itertools.product((("full", None), ("LoRA", 24)), (False, True)):
        dense = None
        for attention in ("dense", "triton") if compile else ("dense", "triton", "flex"):
            name = "dense-control" if attention == "dense" else "fast"
            # The anneal and the hard phase cost the same; soft gates for all steps keep the steps alike.
            changes: dict[str, Any] = dict(steps=_WARM_UP_STEPS + steps, soft_fraction=1.0, anneal_steps=0)
            if lora_rank:
                changes["lora_rank"] = lora_rank
            torch.cuda.reset_peak_memory_stats()
            row = {"training": training, **measure(get_recipe(name, **changes), attention, batch_size, steps, compile)}
            dense = dense or row["tokens_per_second"]
            row["versus_dense"] = row["tokens_per_second"] / dense
            found.append(row)
            report(row)
            torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--commit", help="to record; default: what git says")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("the throughput of adaptation is measured on a CUDA device, and there is none here")
    result = environment("benchmarks.adaptation", options.commit, ("transformers", "peft"))
    result["rows"] = rows(report=lambda row: print(row, file=sys.stderr, flush=True))
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
