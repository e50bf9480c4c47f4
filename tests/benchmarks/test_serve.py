"""The serving benchmark, against a server that answers as vLLM's would."""

import asyncio
import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import spkv
from benchmarks import serve, serve_load, serve_models
from benchmarks.figures import RESULTS, serving_figure

METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0"} 2.0
vllm:num_requests_running{engine="1"} 1.0
vllm:num_requests_waiting{engine="0"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 5.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:num_preemptions_total{engine="0"} 7.0
vllm:spkv_slabs_used{engine="0"} 3.0
vllm:spkv_slabs_dense{engine="0"} 8.0
vllm:spkv_slabs_dense{engine="1"} 4.0
"""


class Stub(BaseHTTPRequestHandler):
    """Continues a prompt with what `reply` returns, a token an event; each metric stays as it is."""

    def reply(self, prompt, count):
        return [sum(prompt) % 100] * count

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(METRICS.encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not body["prompt"]:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b"no prompt")
            return
        self.send_response(200)
        self.end_headers()
        events = [{"choices": [{"token_ids": [t], "text": ""}]} for t in self.reply(body["prompt"], body["max_tokens"])]
        if 666 in body["prompt"]:
            events = [events[0], {"error": {"message": "the engine is gone"}}]
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *args): ...


@contextlib.contextmanager
def stub(handler=Stub):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_shape_is_written_whose_heads_keep_their_share(tmp_path):
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer, LlamaConfig

    shape = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192,
    )  # fmt: skip
    serve_models.write_shape(shape, tmp_path, 0.25)
    model = spkv.load(tmp_path, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path)("\n".join(topics.values()), return_tensors="pt").input_ids[:, :3000]
    with spkv.attachment(model).record() as record, torch.no_grad():
        model(ids, use_cache=False)
    for utility in record.utilities.values():
        assert ((utility >= 0.5).float().mean(2) - 0.25).abs().max() < 0.08


def drive(url, prompts, times, new_tokens=3):
    async def work():
        async with serve._client(url) as client:
            return await serve_load.drive(client, "m", prompts, times, new_tokens)

    return asyncio.run(work())


def test_requests_come_as_often_as_asked_and_the_same_every_time():
    times = serve_load.arrivals(4.0, 4001, seed=1)
    assert times[0] == 0.0
    assert times == sorted(times)
    assert 4000 / times[-1] == pytest.approx(4.0, rel=0.05)
    assert times == serve_load.arrivals(4.0, 4001, seed=1)


def test_prompts_are_cut_from_the_text():
    prompts = serve_load.cut_prompts(range(50), 10, 100, seed=0)
    assert all(prompt == list(range(prompt[0], prompt[0] + 10)) for prompt in prompts)
    assert len({prompt[0] for prompt in prompts}) > 30
    assert serve_load.cut_prompts(range(10), 10, 1, seed=0) == [list(range(10))]
    with pytest.raises(ValueError, match="10 tokens, too few for a prompt of 11"):
        serve_load.cut_prompts(range(10), 11, 1, seed=0)


def test_replies_and_gauges_are_read_from_the_server():
    with stub() as url:
        replies, samples = drive(url, [[1, 2], [3, 4]], [0.0, 0.7])
    assert [reply.tokens for reply in replies] == [[3] * 3, [7] * 3]
    assert 0.6 < replies[1].sent - replies[0].sent < 5
    assert all(reply.sent < reply.first <= reply.last for reply in replies)
    assert len(samples) > 2
    expected = dict(in_flight=3.0, waiting=0.0, kv_use=0.25, preemptions=7.0, slabs_used=3.0, slabs_dense=12.0)
    assert samples[-1] == expected


def test_failures_say_what_the_server_said():
    with stub() as url:
        with pytest.raises(serve_load.ServerError, match="status 400: no prompt"):
            drive(url, [[1], []], [0.0, 0.0])
        with pytest.raises(serve_load.ServerError, match="the engine is gone"):
            drive(url, [[1], [666]], [0.0, 0.0])
        short = type("Short", (Stub,), {"reply": lambda self, prompt, count: [1] * (count - 1)})
    with stub(short) as url, pytest.raises(serve_load.ServerError, match="2 tokens came, and 3 were asked for"):
        drive(url, [[1]], [0.0])
    with pytest.raises(serve_load.ServerError, match="ConnectError"):
        drive(url, [[1]], [0.0])


def test_a_row_holds_the_rates_and_the_waits():
    replies = [serve_load.Reply(sent=i, tokens=[0] * 5, first=i + 0.5, last=i + 2.5) for i in range(3)]
    samples = [dict(in_flight=n, waiting=0, kv_use=n / 4, preemptions=n) for n in (0, 2, 4, 1)]
    row = serve_load.summarise(replies, samples)
    assert row["tokens_per_second"] == pytest.approx(15 / 4.5)
    assert row["ttft_ms_median"] == row["ttft_ms_p90"] == pytest.approx(500)
    assert row["tpot_ms_median"] == pytest.approx(500)
    assert (row["in_flight_mean"], row["in_flight_max"], row["kv_use_mean"], row["preemptions"]) == (3, 4, 0.75, 1)
    assert row["kept_fraction_mean"] is None  # a server that counts no slabs
    slabs = [dict(slabs_used=n, slabs_dense=2 * n) for n in range(len(samples))]
    samples = [sample | more for sample, more in zip(samples, slabs, strict=True)]
    assert serve_load.summarise(replies, samples)["kept_fraction_mean"] == 0.5


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return serve_models.prepare("tiny", tmp_path_factory.mktemp("models"))


def test_the_three_models_have_the_same_weights_and_other_gates(directories):
    ids = torch.arange(1, 101)[None]
    dense = serve.AutoModelForCausalLM.from_pretrained(directories["dense"])
    pruned, opened = (spkv.load(directories[name]) for name in ("spkv", "open"))
    with torch.no_grad():
        # In float64, so that what is left of rounding cannot be taken for other weights.
        expected, unlike, same = (model.double()(ids, use_cache=False).logits for model in (dense, pruned, opened))
    torch.testing.assert_close(same, expected)
    assert not torch.allclose(unlike, expected, atol=0.1)
    files = {name: {file.name for file in path.iterdir()} for name, path in directories.items()}
    assert files["spkv"] - files["dense"] == {"spkv_config.json", "predictor.safetensors"}
    assert files["open"] == files["spkv"]


@pytest.mark.parametrize("implementation", serve.IMPLEMENTATIONS)
def test_a_server_that_says_something_else_is_not_timed(directories, implementation):
    directory, options = directories[implementation], serve._parse(["--quick", "--dtype", "float32"])
    model = spkv.load(directory) if implementation != "dense" else None
    model = model or serve.AutoModelForCausalLM.from_pretrained(directory)
    prompt = list(range(1, 101))
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=16, min_new_tokens=16, do_sample=False)
    right = ids[0, 100:].tolist()
    for tokens in (right, [*right[:9], 5, *right[10:]]):
        handler = type("Model", (Stub,), {"reply": lambda self, prompt, count, tokens=tokens: tokens})
        with stub(handler) as url:
            fails = contextlib.nullcontext() if tokens == right else pytest.raises(serve.ServerError, match="below")
            with fails:
                serve.check(url, implementation, directory, prompt, options)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_so(tmp_path, capsys):
    assert serve.main(["--quick"]) == 2
    assert "pip install 'spkv[vllm]'" in capsys.readouterr().err
    log_of_a_server_that_stops = pytest.raises(serve.ServerError, match="did not start(.|\n)*No module named 'vllm'")
    with log_of_a_server_that_stops, serve.serve(tmp_path, [], tmp_path):
        pass


def test_vllm_serves_the_tiny_model(tmp_path):
    pytest.importorskip("vllm")
    command = [sys.executable, "-m", "benchmarks.serve", "--quick", "--implementations", "spkv"]
    command += ["--json", str(tmp_path / "serve.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(serve.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["errors"] == 0
    (row,) = json.loads((tmp_path / "serve.json").read_text())["rows"]
    assert row["tokens_per_second"] > 0
    assert 0 < row["kv_use_max"] <= 1
    assert 0 < row["kept_fraction_mean"] <= 1


@pytest.mark.parametrize("name", ["serve.json", "serve-8b.json"])
def test_the_committed_rows_agree_with_themselves(name):
    result = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    assert {"device", "commit", "command", "versions", "rows"} <= result.keys()
    assert len({row["kv_bytes"] for row in result["rows"]}) == 1
    for row in result["rows"]:
        assert row["error"] is None
        assert row["tokens_per_second"] == pytest.approx(row["requests"] * row["new_tokens"] / row["seconds"])
        assert row["in_flight_max"] <= row["requests"]


def test_the_committed_rows_can_be_drawn():
    result = json.loads((RESULTS / "serve.json").read_text(encoding="utf-8"))
    assert len(serving_figure(result).axes) == 3
