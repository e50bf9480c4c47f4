"""Requests as a service meets them: they come at random, over HTTP, and their tokens stream back.

Everything here speaks to a server by its URL and needs no vLLM.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

try:
    import httpx
except ModuleNotFoundError:  # transformers brings one of the two, by the version of huggingface_hub
    import httpx2 as httpx

_SECONDS_BETWEEN_SAMPLES = 0.5
_GAUGES = {
    "in_flight": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_use": "vllm:kv_cache_usage_perc",
    "preemptions": "vllm:num_preemptions_total",
    # Of a self-pruned model's server alone; elsewhere they stay 0.
    "slabs_used": "vllm:spkv_slabs_used",
    "slabs_dense": "vllm:spkv_slabs_dense",
}


class ServerError(RuntimeError):
    """The server refused a request or broke it off."""


@dataclass
class Reply:
    """The tokens of one request, and by the clock when it was sent and when they came."""

    sent: float
    tokens: list[int] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0

    @property
    def seconds_to_first_token(self) -> float:
        return self.first - self.sent

    @property
    def seconds_per_later_token(self) -> float:
        return (self.last - self.first) / max(1, len(self.tokens) - 1)


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which requests come that do not know of each other, `rate` a second on average; the first at 0."""
    rng, at, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(at)
        at += rng.expovariate(rate)
    return times


def cut_prompts(tokens: Sequence[int], length: int, count: int, seed: int) -> list[list[int]]:
    """Prompts of `length` tokens from random places of a text."""
    if length > len(tokens):
        raise ValueError(f"the text has {len(tokens)} tokens, too few for a prompt of {length}")
    rng = random.Random(seed)
    starts = [rng.randrange(len(tokens) - length + 1) for _ in range(count)]
    return [list(tokens[start : start + length]) for start in starts]


async def complete(client: httpx.AsyncClient, model: str, prompt: Sequence[int], new_tokens: int) -> Reply:
    """Have the server continue a prompt by exactly `new_tokens` greedy tokens.

    Raises:
        ServerError: if it does not.
    """
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    reply = Reply(time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise ServerError(f"status {response.status_code}: {(await response.aread()).decode()[:500]}")
            async for line in response.aiter_lines():
                text = line.removeprefix("data: ")
                if text == line or text == "[DONE]":
                    continue
                event = json.loads(text)
                if "error" in event:
                    raise ServerError(str(event["error"]))
                new = [token for choice in event["choices"] for token in choice["token_ids"] or ()]
                if new:
                    reply.last = time.perf_counter()
                    reply.first = reply.first or reply.last
                    reply.tokens += new
    except httpx.HTTPError as error:
        raise ServerError(f"{type(error).__name__}: {error}") from error
    if len(reply.tokens) != new_tokens:
        raise ServerError(f"{len(reply.tokens)} tokens came, and {new_tokens} were asked for")
    return reply


async def drive(
    client: httpx.AsyncClient, model: str, prompts: Sequence[Sequence[int]], times: Sequence[float], new_tokens: int
) -> tuple[list[Reply], list[dict[str, float]]]:
    """Send every prompt at its time; returns the replies, and the server's gauges while it worked."""
    start = time.perf_counter()

    async def send(at: float, prompt: Sequence[int]) -> Reply:
        await asyncio.sleep(start + at - time.perf_counter())
        return await complete(client, model, prompt, new_tokens)

    samples: list[dict[str, float]] = [await read_gauges(client)]

    async def watch() -> None:
        while True:
            await asyncio.sleep(_SECONDS_BETWEEN_SAMPLES)
            samples.append(await read_gauges(client))

    tasks = [asyncio.create_task(send(*pair)) for pair in zip(times, prompts, strict=True)]
    watcher = asyncio.create_task(watch())
    try:
        replies = await asyncio.gather(*tasks)
    finally:
        for task in (*tasks, watcher):
            task.cancel()
        await asyncio.gather(*tasks, watcher, return_exceptions=True)
    samples.append(await read_gauges(client))
    return replies, samples


async def read_gauges(client: httpx.AsyncClient) -> dict[str, float]:
    """What the server's metrics say now, of all its engines together."""
    try:
        lines = (await client.get("/metrics")).text.splitlines()
    except httpx.HTTPError as error:
        raise ServerError(f"{type(error).__name__}: {error}") from error
    found = dict.fromkeys(_GAUGES, 0.0)
    for line in lines:
        for name, metric in _GAUGES.items():
            if line.startswith((metric + "{", metric + " ")):
                found[name] += float(line.rsplit(" ", 1)[1])
    return found


def summarise(replies: Sequence[Reply], samples: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The numbers of a row: of all requests together, over requests, and over time."""
    seconds = max(reply.last for reply in replies) - min(reply.sent for reply in replies)
    between = samples[1:-1] or samples  # the first and the last were taken at rest
    held = [sample["slabs_used"] / sample["slabs_dense"] for sample in between if sample.get("slabs_dense")]
    return {
        "seconds": seconds,
        "tokens_per_second": sum(len(reply.tokens) for reply in replies) / seconds,
        **spread("ttft_ms", [1e3 * reply.seconds_to_first_token for reply in replies]),
        **spread("tpot_ms", [1e3 * reply.seconds_per_later_token for reply in replies]),
        **{
            f"{name}_{kind}": float(of([sample[name] for sample in between]))
            for name in ("in_flight", "waiting", "kv_use")
            for kind, of in (("mean", np.mean), ("max", np.max))
        },
        "kept_fraction_mean": float(np.mean(held)) if held else None,
        "preemptions": int(samples[-1]["preemptions"] - samples[0]["preemptions"]),
    }


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median and 90th percentile, under the names that rows have for them."""
    median, high = np.percentile(values, (50, 90))
    return {f"{name}_median": float(median), f"{name}_p90": float(high)}
