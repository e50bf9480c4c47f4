"""The server that vLLM makes of a self-pruned model, over HTTP: clients that behave and clients that do not."""

import json
import os
import random
import runpy
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm")
sys.path.append(str(Path(__file__).parents[2]))  # `benchmarks` is not installed with spkv
os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.serve import serve
from benchmarks.serve_load import httpx

TINY = runpy.run_path(str(Path(__file__).with_name("tiny_checkpoint.py")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served") / "tiny"
    TINY["write"](directory)
    return directory


@pytest.fixture(scope="module")
def client(checkpoint):
    arguments = [f"--model={checkpoint}", "--served-model-name=tiny", "--dtype=float32", "--max-model-len=512"]
    arguments += [f"--kv-cache-memory-bytes={1 << 22}", "--max-num-batched-tokens=64"]
    with serve(checkpoint, arguments, checkpoint.parent) as url, httpx.Client(base_url=url, timeout=120) as client:
        yield client


def prompt(length):
    rng = random.Random(length)
    return [1, *(rng.randrange(3, TINY["VOCABULARY"]) for _ in range(length - 1))]


def body(length, tokens=20, **options):
    known = dict(model="tiny", prompt=prompt(length), max_tokens=tokens, temperature=0, ignore_eos=True)
    return known | dict(return_token_ids=True) | options


def generated(checkpoint, length, tokens=20):
    import torch

    import spkv

    ids = torch.tensor([prompt(length)])
    model = spkv.load(checkpoint)
    return model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)[0, length:].tolist()


def gauge(client, name):
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name + "{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def wait_until_idle(client):
    deadline = time.monotonic() + 60
    while gauge(client, "vllm:num_requests_running") + gauge(client, "vllm:num_requests_waiting"):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_tokens_equal_generate_at_once_and_streamed(client, checkpoint):
    expected = generated(checkpoint, 200)
    reply = client.post("/v1/completions", json=body(200)).json()
    assert reply["choices"][0]["token_ids"] == expected
    with client.stream("POST", "/v1/completions", json=body(200, stream=True)) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events.pop() == "[DONE]"
    streamed = [token for event in events for token in json.loads(event)["choices"][0]["token_ids"]]
    assert streamed == expected
    assert len(events) > 10


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        json.dumps(body(10) | {"max_tokens": -1}).encode(),
        json.dumps(body(10) | {"prompt": None}).encode(),
        json.dumps(body(10) | {"model": "another"}).encode(),
        json.dumps(body(600)).encode(),  # longer than --max-model-len
    ],
)
def test_bad_requests_are_refused_and_the_server_lives(client, checkpoint, content):
    refused = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert 400 <= refused.status_code < 500
    assert client.post("/v1/completions", json=body(50)).json()["choices"][0]["token_ids"] == generated(checkpoint, 50)


def test_slabs_of_clients_that_go_away_come_back(client, checkpoint):
    for _ in range(3):
        with client.stream("POST", "/v1/completions", json=body(300, tokens=200, stream=True)) as response:
            next(response.iter_lines())
    wait_until_idle(client)
    client.post("/v1/completions", json=body(10, tokens=1))  # the gauges are those of the last step
    wait_until_idle(client)
    assert gauge(client, "vllm:kv_cache_usage_perc") == 0
    reply = client.post("/v1/completions", json=body(200)).json()
    assert reply["choices"][0]["token_ids"] == generated(checkpoint, 200)
    assert gauge(client, "vllm:spkv_slabs_returned_total") > 0
    assert gauge(client, "vllm:spkv_slabs_used") <= gauge(client, "vllm:spkv_slabs_held")
