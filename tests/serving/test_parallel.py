"""Two workers of vLLM's, on the CPU, with half of the heads each or half of the layers, say what generate() says.

    python test_parallel.py DIRECTORY OPTIONS PROMPTS OUTPUT

writes the tokens of an engine with OPTIONS, in JSON; it runs as a program, since vLLM's workers import what started
them.
"""

import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spkv

NEW = 30


def prepare(worker):
    # On a CPU vLLM makes the buffers between stages when it compiles, which it does not with our models.
    worker.model_runner.profile_run()


def main(directory, options, prompts, output):
    import vllm

    llm = vllm.LLM(
        directory, dtype="float32", max_model_len=512, max_num_seqs=4, max_num_batched_tokens=64, **json.loads(options)
    )
    llm.collective_rpc(prepare)
    params = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    made = llm.generate([{"prompt_token_ids": prompt} for prompt in json.loads(prompts)], params)
    Path(output).write_text(json.dumps([list(one.outputs[0].token_ids) for one in made]))


@pytest.mark.parametrize(
    ("option", "adapted"),
    [("tensor_parallel_size", False), ("tensor_parallel_size", True), ("pipeline_parallel_size", True)],
)
def test_two_workers_say_what_generate_says(tmp_path, option, adapted):
    pytest.importorskip("vllm")
    tiny = runpy.run_path(str(Path(__file__).with_name("tiny_checkpoint.py")))
    options = {option: 2}
    if adapted:
        tiny["write_base_and_adapter"](tmp_path, tmp_path / "adapter")
        options |= {"hf_overrides": {"spkv_adapter": str(tmp_path / "adapter")}}
        options |= {"additional_config": {"spkv_threshold": 0.7}}
        model = spkv.load(tmp_path, adapter=tmp_path / "adapter", threshold=0.7)
    else:
        tiny["write"](tmp_path, layers=(0, 2))  # the layer between keeps every pair; a stage has one or two
        model = spkv.load(tmp_path)
    rng = random.Random(0)
    prompts = [[1, *(rng.randrange(3, tiny["VOCABULARY"]) for _ in range(n - 1))] for n in (200, 60, 17, 130)]
    expected = []
    for prompt in prompts:
        greedy = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None)
        expected.append(model.generate(torch.tensor([prompt]), **greedy)[0, len(prompt) :].tolist())
    settings = dict(
        HF_HUB_OFFLINE="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_SIM_MULTI_NUMA="1",  # two workers on one processor
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # of `prepare`
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_LOGGING_LEVEL="WARNING",
    )
    output = tmp_path / "tokens.json"
    command = [sys.executable, __file__, str(tmp_path), json.dumps(options), json.dumps(prompts), str(output)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(output.read_text()) == expected


if __name__ == "__main__":
    main(*sys.argv[1:])
