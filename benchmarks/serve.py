"""Serves a model dense and self-pruned in the same KV memory, to clients over HTTP. The last line of stdout is JSON.

    python -m benchmarks.serve --json benchmarks/results/serve.json

Three servers run in turn, each in a process of its own, with the same weights, options and requests: `dense` is vLLM
without our plugin's part in it, `spkv` the self-pruned model, and `open` the same plugin with gates that keep every
pair, which tells apart what pruning gains and what the plugin costs. Requests come at random times (a Poisson process);
prompts are cut from Python's own documentation. Before any timing, each server's greedy tokens are compared with
the logits of the model in transformers.

    python -m benchmarks.serve --model 8b --prompt-tokens 32768 --new-tokens 1024 --requests 32 --rates 0.5 2 \\
        --dense-requests 8 --chunk 2048 --max-requests 64 --json FILE

does so with Llama-3.1-8B's shape, random weights, and predictors set so that each head keeps `--density` of a text: on
a GPU with 80 GB, and 20 GB of disk.

It needs vLLM (`pip install 'spkv[vllm]'`), and runs on a CUDA device where there is one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import spkv
from benchmarks.run import save
from benchmarks.serve_common import DEVICE, RUNNER, circumstances, print_summary
from benchmarks.serve_load import (
    ServerError,
    arrivals,
    complete,
    cut_prompts,
    drive,
    httpx,
    summarise,
)
from benchmarks.serve_models import IMPLEMENTATIONS, prepare

_BLOCK = 128  # vLLM's own on a CPU; a multiple of the blocks of the others, so that none wastes memory
_CHECKED_TOKENS = 16
# How far below the best logit a chosen token's may lie: rounding decides between tokens that are as good.
_TIE = {"float32": 1e-2, "bfloat16": 0.5, "float16": 0.1}
_SECONDS_TO_START = 1200.0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if a server failed, 2 without vLLM."""
    options = _parse(argv)
    if importlib.util.find_spec("vllm") is None:
        print("benchmarks.serve needs vLLM: pip install 'spkv[vllm]'", file=sys.stderr)
        return 2
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of stopping the server
    result = circumstances("benchmarks.serve", options.commit)
    with tempfile.TemporaryDirectory() as folder:
        result["rows"] = []
        directories = prepare(options.model, Path(folder), options.density)
        _free()
        for implementation in options.implementations:
            result["rows"] += measure(implementation, directories[implementation], options, Path(folder))
            save(result, options.json)
    result["seconds"] = round(time.monotonic() - start, 1)
    save(result, options.json)
    failed = [row for row in result["rows"] if row["error"] is not None]
    print_summary(result, len(failed), options.json)
    return 1 if failed else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="smollm2", help="a packaged model, a directory with a self-pruned one, or 8b: see above"
    )
    parser.add_argument("--density", type=float, default=0.25, help="of 8b, past the window")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--dtype", choices=_TIE, default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.5], help="requests a second")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument(
        "--dense-requests", type=int, default=2, help="KV memory, as the longest requests that it holds when dense"
    )
    parser.add_argument("--chunk", type=int, default=256, help="tokens that a step runs at most")
    parser.add_argument("--max-requests", type=int, default=16, help="that a server runs at a time at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny random model and few requests")
    parser.add_argument("--time-limit", type=float, default=1800.0, metavar="SECONDS", help="of each row")
    parser.add_argument("--json", type=Path, help="file for all rows, written after every server")
    parser.add_argument("--commit", help="to record; default: what git says")
    options = parser.parse_args(argv)
    if options.quick:
        options.model, options.rates, options.requests = "tiny", [4.0], 6
        options.prompt_tokens, options.new_tokens, options.chunk = [256], 16, 64
    return options


def measure(implementation: str, directory: Path, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Start a server, check what it says, and return its rows; one that fails has an error and no numbers."""
    kv_bytes = _kv_bytes(directory, options)
    text = AutoTokenizer.from_pretrained(directory)("\n".join(topics.values()), verbose=False).input_ids
    cases = [(rate, length) for rate in options.rates for length in options.prompt_tokens]
    rows, error = [], None
    with contextlib.ExitStack() as stack:
        try:
            print(f"{implementation}: starting ...", file=sys.stderr, flush=True)
            url = stack.enter_context(serve(directory, _server_arguments(directory, kv_bytes, options), folder))
            prompt = cut_prompts(text, min(options.prompt_tokens), 1, options.seed)[0]
            check(url, implementation, directory, prompt, options)
            _free()
        except ServerError as failure:
            error = str(failure)
        for rate, length in cases:
            row = {
                "model": Path(options.model).name,
                "dtype": options.dtype,
                "implementation": implementation,
                "kv_bytes": kv_bytes,
                "rate": rate,
                "prompt_tokens": length,
                "new_tokens": options.new_tokens,
                "requests": options.requests,
                "error": error,
            }
            if error is None:
                prompts = cut_prompts(text, length, options.requests, options.seed)
                times = arrivals(rate, options.requests, options.seed)
                try:
                    row |= asyncio.run(_case(url, directory, prompts, times, options))
                except (ServerError, TimeoutError, asyncio.TimeoutError) as failure:
                    row["error"] = str(failure) or f"not done in {options.time_limit:g} s"
            print(line(row), file=sys.stderr, flush=True)
            rows.append(row)
    return rows


async def _case(
    url: str, directory: Path, prompts: list[list[int]], times: list[float], options: argparse.Namespace
) -> dict[str, Any]:
    async with _client(url) as client:
        work = drive(client, str(directory), prompts, times, options.new_tokens)
        return summarise(*await asyncio.wait_for(work, options.time_limit))


def check(url: str, implementation: str, directory: Path, prompt: list[int], options: argparse.Namespace) -> None:
    """Compare the server's greedy tokens with the model in transformers, one forward pass over all of them.

    Raises:
        ServerError: if one of them was not the best there, or as good.
    """

    async def ask() -> list[int]:
        async with _client(url) as client:
            return (await complete(client, str(directory), prompt, _CHECKED_TOKENS)).tokens

    tokens = asyncio.run(ask())
    dtype = getattr(torch, options.dtype)
    if implementation == "dense":
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval().to(DEVICE)
    else:
        model = spkv.load(directory, dtype=dtype, device=DEVICE)
    ids = torch.tensor([prompt + tokens], device=DEVICE)
    with torch.no_grad():
        logits = model(ids, use_cache=False, logits_to_keep=len(tokens) + 1).logits[0, :-1].float()
    behind = logits.max(1).values - logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    if behind.max() > _TIE[options.dtype]:
        raise ServerError(f"greedy tokens lie up to {behind.max():.3g} below the best logits in transformers")


def _free() -> None:
    """Leave the device to the server, which asks for nearly all of its memory."""
    gc.collect()
    torch.cuda.empty_cache()


def _client(url: str) -> httpx.AsyncClient:
    # As many connections as requests, and no deadline of their own: a request may wait long for its turn.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False)


def _kv_bytes(directory: Path, options: argparse.Namespace) -> int:
    """Memory for `--dense-requests` of the longest prompt, and one block, which vLLM sets aside."""
    config = AutoConfig.from_pretrained(directory)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pair = 2 * head_dim * getattr(torch, options.dtype).itemsize
    blocks = math.ceil((max(options.prompt_tokens) + options.new_tokens) / _BLOCK)
    tokens = (options.dense_requests * blocks + 1) * _BLOCK
    return tokens * config.num_hidden_layers * config.num_key_value_heads * pair


def _server_arguments(directory: Path, kv_bytes: int, options: argparse.Namespace) -> list[str]:
    values = {
        "model": directory,
        "dtype": options.dtype,
        "kv-cache-memory-bytes": kv_bytes,
        "max-model-len": max(options.prompt_tokens) + max(options.new_tokens, _CHECKED_TOKENS),
        "max-num-batched-tokens": options.chunk,
        "max-num-seqs": options.max_requests,
    }
    # Self-pruned models are served without it, and no prompt here begins as another.
    return [*(f"--{name}={value}" for name, value in values.items()), "--no-enable-prefix-caching"]


@contextlib.contextmanager
def serve(directory: Path, arguments: Sequence[str], folder: Path) -> Iterator[str]:
    """Run vLLM's server, in a process of its own, until the block ends; yields its URL once it answers.

    Raises:
        ServerError: if it stops or takes too long, with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # What `vllm serve` runs; the package of vLLM for CPUs has a command of that name that does not start.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host=127.0.0.1", f"--port={port}"]
    log = folder / f"{directory.name}.log"
    with log.open("w") as out:
        environment = (RUNNER if DEVICE == "cuda" else {}) | os.environ
        process = subprocess.Popen(
            [*command, *arguments], stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + _SECONDS_TO_START
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
                raise ServerError(f"the server did not start; its log ends:\n{tail}")
            time.sleep(0.5)
        yield url
    finally:
        _stop(process)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    head = (
        f"{row['implementation']:6} {row['rate']:g}/s {row['requests']} x ({row['prompt_tokens']}+{row['new_tokens']})"
    )
    if row["error"] is not None:
        return f"{head}: {row['error']}"
    return (
        f"{head}: {row['tokens_per_second']:.1f} tokens/s, TTFT {row['ttft_ms_median']:.0f} ms "
        f"(p90 {row['ttft_ms_p90']:.0f}), TPOT {row['tpot_ms_median']:.0f} ms (p90 {row['tpot_ms_p90']:.0f}), "
        f"in flight {row['in_flight_mean']:.1f} (most {row['in_flight_max']:.0f}), "
        f"KV {row['kv_use_mean']:.0%} (most {row['kv_use_max']:.0%}), preempted {row['preemptions']}"
        + (f", {row['kept_fraction_mean']:.2f} of a dense cache" if row["kept_fraction_mean"] is not None else "")
    )


if __name__ == "__main__":
    sys.exit(main())
