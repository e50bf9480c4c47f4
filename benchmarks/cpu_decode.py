"""Decoding on a CPU at a long context: seconds a token, self-pruned beside dense, the same model in one process.

Density is forced by a random gate (predictors run all the same), so that no adapter is needed. Example:

    python -m benchmarks.cpu_decode --length 8000 --density 0.25 --json benchmarks/results/cpu-decode.json
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from statistics import quantiles
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, Cache, PreTrainedModel

import spkv
from spkv.checkpoint import load_base, resolve_model
from spkv.gates import RandomGate
from spkv.hf.generation import cache_size, read


@torch.no_grad()
def token_seconds(model: PreTrainedModel, cache: Cache, tokens: torch.Tensor) -> list[float]:
    """Feed tokens [1, n] one at a time; returns the seconds of each forward pass."""
    seconds = []
    for token in tokens.split(1, dim=1):
        start = time.perf_counter()
        model(token, past_key_values=cache, use_cache=True)
        seconds.append(time.perf_counter() - start)
    return seconds


def row(name: str, seconds: list[float], cache: Cache) -> dict[str, Any]:
    low, median, high = (quantiles(seconds, n=10)[i] for i in (1, 4, 7))
    size = cache_size(cache)
    return {
        "mode": name,
        "milliseconds_per_token": 1e3 * median,
        "quantile_20": 1e3 * low,
        "quantile_80": 1e3 * high,
        "density": size.density,
        "kept_fraction": size.kept_fraction,
        "kv_bytes": size.kv_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8000, help="tokens of context")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16, help="tokens timed in a round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = load_base("smollm2", dtype=torch.float32).eval()
    spkv.attach(model, spkv.SPKVConfig(predictor_width=256))
    spkv.attachment(model).gate = RandomGate(arguments.density)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2"))
    total = arguments.length + arguments.rounds * arguments.tokens
    ids = tokenizer("\n".join(topics.values()), return_tensors="pt", verbose=False).input_ids[:, :total]
    context, rest = ids[:, : arguments.length], ids[:, arguments.length :]

    pruned = read(model, context).cache
    with spkv.dense(model):
        plain = read(model, context).cache
    seconds: dict[str, list[float]] = {"spkv": [], "dense": []}
    for tokens in rest.split(arguments.tokens, dim=1):  # in turns, so that both meet the machine's moods
        seconds["spkv"] += token_seconds(model, pruned, tokens)
        with spkv.dense(model):
            seconds["dense"] += token_seconds(model, plain, tokens)
    rows = [row("spkv", seconds["spkv"], pruned), row("dense", seconds["dense"], plain)]
    result = {
        "command": "python -m benchmarks.cpu_decode " + " ".join(sys.argv[1:]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "device": f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"spkv": spkv.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "model": "SmolLM2-135M-Instruct, float32",
        "length": arguments.length,
        "speedup": rows[1]["milliseconds_per_token"] / rows[0]["milliseconds_per_token"],
        "rows": rows,
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
