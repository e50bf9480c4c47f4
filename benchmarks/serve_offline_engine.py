"""One engine of `benchmarks.serve_offline`, in the process that this command starts.

    python -m benchmarks.serve_offline_engine dense|spkv FILE OPTIONS

FILE is the JSON that the parent has begun, OPTIONS its options in JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import save
from benchmarks.serve_load import Reply, spread, summarise
from benchmarks.serve_offline import (
    Row,
    add_missing,
    kv_bytes,
    longest_request,
    new_tokens,
    phases,
    requests,
    row_head,
    shape,
)
from benchmarks.serve_offline_model import cache_of, calibrate, randomise, read_density, write_directory

_SECONDS_BETWEEN_SAMPLES = 0.1
_SECONDS_TO_END = 30.0  # before the parent's limit, for what `load` has measured by then
_SETTLING = 5  # steps that follow others than of single tokens; several are under way at a time


@dataclass
class Run:
    """Requests that ran together.

    Attributes:
        replies: of all, in their order.
        samples: gauges, the first before they came and the last after they went.
        steps: when each step's tokens came, by the clock, and to how many requests.
    """

    replies: list[Reply]
    samples: list[dict[str, float]]
    steps: list[tuple[float, int]]

    @property
    def unfinished(self) -> int:
        return sum(reply.last == 0.0 for reply in self.replies)


class Engine:
    """vLLM's offline engine on a model of random weights.

    Attributes:
        model: vLLM's.
        facts: what vLLM chose, for the record.
    """

    def __init__(self, implementation: str, options: argparse.Namespace, folder: Path) -> None:
        import vllm

        start = time.perf_counter()
        self._llm = vllm.LLM(
            str(write_directory(implementation, options, folder)),
            load_format="dummy",
            dtype=options.dtype,
            skip_tokenizer_init=True,
            max_model_len=longest_request(options),
            max_num_seqs=options.max_requests,
            max_num_batched_tokens=options.chunk,
            kv_cache_memory_bytes=kv_bytes(options),
            enforce_eager=options.eager,
            enable_prefix_caching=False,  # self-pruned models are served without it, and no prompt begins as another
            seed=0,
        )
        self._sampling = vllm.SamplingParams
        self._scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler
        self._preemptions, preempt = 0, self._scheduler._preempt_request

        def count(*args: Any, **kwargs: Any) -> Any:
            self._preemptions += 1
            return preempt(*args, **kwargs)

        self._scheduler._preempt_request = count
        found: list[torch.nn.Module] = []
        self._llm.apply_model(found.append)
        (self.model,) = found
        config = self._llm.llm_engine.vllm_config
        layer = next(iter(config.compilation_config.static_forward_context.values()))
        attention = getattr(layer, "impl", layer)  # ours computes itself
        self.facts = {
            "seconds_to_start": round(time.perf_counter() - start, 1),
            "attention": type(attention).__name__,
            "flash_attention_version": getattr(attention, "vllm_flash_attn_version", None),
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "compilation_mode": str(config.compilation_config.mode),
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "block_size": config.cache_config.block_size,
            "blocks": config.cache_config.num_gpu_blocks,
        }

    def gauges(self) -> dict[str, float]:
        """As `serve_load.read_gauges` has them of a server."""
        pool = self._scheduler.kv_cache_manager.block_pool
        return {
            "in_flight": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "kv_use": 1.0 - pool.get_num_free_blocks() / (pool.num_gpu_blocks - 1),  # but for vLLM's null block
            "preemptions": self._preemptions,
        }

    def drive(self, prompts: Sequence[list[int]], new: int, deadline: float = math.inf) -> Run:
        """Queue all prompts at once and have each continued by `new` greedy tokens.

        Args:
            prompts: of token ids.
            new: tokens.
            deadline: by the clock `time.perf_counter`, when to leave off.

        Raises:
            RuntimeError: if memory is still in use when all have ended.
        """
        engine = self._llm.llm_engine
        parameters = self._sampling(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        run = Run([], [self.gauges()], [])
        for number, prompt in enumerate(prompts):
            run.replies.append(Reply(sent=time.perf_counter()))
            engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
        sampled = now = 0.0
        while engine.has_unfinished_requests() and now < deadline:
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                reply = run.replies[int(output.request_id.split("-")[0])]  # vLLM may append to it
                reply.tokens = output.outputs[0].token_ids
                reply.first = reply.first or now
                reply.last = now if output.finished else 0.0  # it tells who has ended
            if outputs:  # while the first steps are under way none comes
                run.steps.append((now, len(outputs)))
            if now - sampled > _SECONDS_BETWEEN_SAMPLES:
                run.samples.append(self.gauges())
                sampled = now
        run.samples.append(self.gauges())
        if not run.unfinished and run.samples[-1]["kv_use"] > 0:
            raise RuntimeError(f"all requests have ended, and {run.samples[-1]['kv_use']:.2%} of the memory is in use")
        return run


def full_step_times(steps: Sequence[tuple[float, int]], requests: int) -> list[float]:
    """Seconds of the steps in which every request made a token, but for the first of each stretch of them."""
    times, stretch = [], 0
    for (before, _), (now, tokens) in itertools.pairwise(steps):
        stretch = stretch + 1 if tokens == requests else 0
        if stretch > _SETTLING:
            times.append(now - before)
    return times


def random_prompts(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Token ids, the special ones at the vocabulary's start left out."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]


def measure_steps(engine: Engine, phase: str, options: argparse.Namespace) -> Row:
    """The time of a step in which every request of a phase makes a token."""
    batch = requests(phase, options)
    prompts = random_prompts(batch, options.prompt_tokens, shape(options).vocab_size, seed=1)
    run = engine.drive(prompts, new_tokens(phase, options))
    times = full_step_times(run.steps, batch)[: options.steps]
    if len(times) < options.steps:
        raise RuntimeError(f"{len(times)} steps in which all {batch} requests made a token, not {options.steps}")
    whole = summarise(run.replies, run.samples)
    return {
        "steps": len(times),
        **spread("tpot_ms", [1e3 * seconds for seconds in times]),
        "tokens_per_second": batch / float(torch.tensor(times).median()),
        "seconds_to_all_first_tokens": max(reply.first for reply in run.replies) - run.replies[0].sent,
        **{name: whole[name] for name in ("in_flight_max", "kv_use_max", "preemptions")},
    }


def measure_load(engine: Engine, options: argparse.Namespace, deadline: float) -> Row:
    """Many requests at once; those that have not ended by the deadline count for nothing, and the row says so."""
    prompts = random_prompts(options.requests, options.prompt_tokens, shape(options).vocab_size, seed=2)
    run = engine.drive(prompts, new_tokens("load", options), deadline)
    ended = [reply for reply in run.replies if reply.last]
    if not ended:
        raise RuntimeError("no request ended in time")
    row = summarise(ended, run.samples)
    if run.unfinished:
        row["error"] = f"broken off when {len(ended)} of {options.requests} requests had ended; the numbers are theirs"
    return row


def measure(implementation: str, options: argparse.Namespace, path: Path, folder: Path, deadline: float) -> None:
    """Start an engine and add its facts and rows to the file."""

    def note(row: Row | None = None) -> None:
        result = json.loads(path.read_text(encoding="utf-8"))
        result["engines"][implementation] = engine.facts
        result["rows"] += [] if row is None else [row]
        save(result, path)

    engine = Engine(implementation, options, folder)
    note()
    randomise(engine.model)
    vocabulary = shape(options).vocab_size
    if implementation == "spkv":
        (text,) = random_prompts(1, options.prompt_tokens, vocabulary, seed=3)
        engine.facts["calibration"] = calibrate(engine.model, options.density, lambda: engine.drive([text], 1))
        note()
    # What is compiled when it is first used is compiled now: prompts of several chunks, and some steps together.
    engine.drive(random_prompts(3, min(options.prompt_tokens, 2 * options.chunk + 37), vocabulary, seed=4), 12)
    for phase in phases(implementation, options):
        print(f"{implementation}: {phase} ...", file=sys.stderr, flush=True)
        row = row_head(implementation, phase, options)
        load = phase == "load"
        row |= measure_load(engine, options, deadline) if load else measure_steps(engine, phase, options)
        if implementation == "spkv":
            row |= read_density(cache_of(engine.model), options.density)
        if torch.cuda.is_available():
            engine.facts["peak_bytes"] = torch.cuda.max_memory_allocated()
        note(row)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 1 if rows are missing, for which there are errors in their place."""
    implementation, path, options = argv[0], Path(argv[1]), argparse.Namespace(**json.loads(argv[2]))
    deadline = time.perf_counter() + options.time_limit - _SECONDS_TO_END
    with tempfile.TemporaryDirectory() as folder:
        try:
            measure(implementation, options, path, Path(folder), deadline)
        except Exception as error:  # whatever vLLM raises: the file shall say why rows have no numbers, the log more
            traceback.print_exc()
            result = json.loads(path.read_text(encoding="utf-8"))
            add_missing(result, implementation, options, f"{type(error).__name__}: {error}")
            save(result, path)
            return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # vLLM's threads can keep a process from ending, and all is written
