from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spkv.checkpoint import load_base
from spkv.hf.attach import attach, attachment
from spkv.training import adapt
from spkv.training.checkpoints import load_trained_predictors, save_trained_predictors
from spkv.training.inputs import inputs_of
from spkv.training.parameters import prepare_parameters

# Two processes shard a model's layers; a loss with the utilities in it must have the gradients of the whole model.
SCRIPT = """
import os, sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from spkv.checkpoint import load_base
from spkv.config import SPKVConfig
from spkv.gates import SoftGate, ThresholdGate
from spkv.hf.attach import attach, attachment

def gradients(model, gate):
    model.zero_grad()
    attachment(model).gate = gate
    ids = torch.arange(48)[None] % 90
    with attachment(model).record() as record:
        loss = model(input_ids=ids, labels=ids, segment_ids=ids // 30, use_cache=False).loss
    (loss + 0.1 * torch.stack(list(record.utilities.values())).mean()).backward()
    return {name: p.grad for name, p in model.named_parameters()}

dist.init_process_group("gloo")
torch.manual_seed(0)
whole, sharded = (attach(load_base(sys.argv[1]), SPKVConfig(window=4, initial_bias=0.0)).train() for _ in range(2))
sharded.load_state_dict(whole.state_dict())
mesh = init_device_mesh("cpu", (2,))
for layer in sharded.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
for gate in (SoftGate(), ThresholdGate(0.5)):
    expected, actual = gradients(whole, gate), gradients(sharded, gate)
    for name, gradient in expected.items():
        assert torch.allclose(actual[name].full_tensor(), gradient, rtol=1e-4, atol=1e-7), (gate, name)
    assert any("utility_predictor" in name and bool(g.any()) for name, g in expected.items())
dist.barrier()
os._exit(0)  # gloo's threads, torn down by an ordinary exit, may abort the process
"""


def _launch(script: Path, *arguments: str, **variables: str) -> None:
    """Run a script in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])} | variables
    done = subprocess.run(
        [*command, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_sharded_model_has_the_gradients_of_a_whole_one(model_directory: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    _launch(script, str(model_directory))


@pytest.mark.parametrize("sharded", [False, True])
def test_predictors_survive_beside_lora(model_directory, recipe_of, tmp_path, sharded) -> None:
    recipe = recipe_of("fast-lora", standardised_inputs=True)

    def build() -> torch.nn.Module:
        return prepare_parameters(attach(load_base(model_directory), recipe.config()), recipe)

    saved, loaded = build(), build()
    for predictor in attachment(saved).predictors.values():
        predictor.standardise_inputs(torch.rand(32), torch.rand(32))
    save_trained_predictors(saved, tmp_path, sharded=sharded, write=False)
    assert not list(tmp_path.glob("*.safetensors"))
    save_trained_predictors(saved, tmp_path, sharded=sharded, write=True)
    load_trained_predictors(loaded, tmp_path)
    expected, actual = saved.state_dict(), loaded.state_dict()
    names = [name for name in expected if "utility_predictor" in name]
    assert len(names) == 2 * 4
    assert all(torch.equal(expected[name], actual[name]) for name in names)
    assert len(inputs_of(saved)) == 2 * 2
    assert all(torch.equal(inputs_of(saved)[name], value) for name, value in inputs_of(loaded).items())


# accelerate shards on accelerators alone; told otherwise, it does so in processes of a CPU, too.
ADAPT = """
import json, os, sys
import accelerate.state
import torch.distributed as dist
start, plugins = accelerate.state.AcceleratorState.__init__, []

def sharding(self, *args, fsdp_plugin=None, **options):
    start(self, *args, fsdp_plugin=fsdp_plugin, **options)
    plugins.extend([fsdp_plugin] if fsdp_plugin is not None else [])
    if plugins:
        self.distributed_type, self.fsdp_plugin = accelerate.state.DistributedType.FSDP, plugins[-1]

accelerate.state.AcceleratorState.__init__ = sharding
from spkv.training import Recipe, adapt
options = json.loads(sys.argv[1])
adapt(recipe=Recipe(**options.pop("recipe")), **options)
dist.barrier()
os._exit(0)  # gloo's threads, torn down by an ordinary exit, may abort the process
"""


@pytest.mark.parametrize(("name", "standardised"), [("fast", True), ("fast-frozen", False)])
def test_a_sharded_run_resumes_and_computes_what_a_whole_one_does(
    model_directory, text_file, tmp_path, recipe_of, name, standardised
) -> None:
    recipe = recipe_of(name, standardised_inputs=standardised)
    options = dict(model=str(model_directory), data=[str(text_file)], save_every=6, progress=False)
    adapt(output=tmp_path / "whole", recipe=recipe, batch_size=2, **options)
    script = tmp_path / "run.py"
    script.write_text(ADAPT)
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # as `accelerate config` proposes
    }
    options |= dict(recipe=recipe.to_dict(), batch_size=1, keep_checkpoints=True)
    _launch(script, json.dumps({**options, "output": str(tmp_path / "through")}), **environment)
    shutil.copytree(tmp_path / "through" / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
    _launch(script, json.dumps({**options, "output": str(tmp_path / "resumed"), "resume": True}), **environment)

    for file in ("predictor.safetensors", *(["model.safetensors"] if name == "fast" else [])):
        whole, through, resumed = (load_file(tmp_path / run / file) for run in ("whole", "through", "resumed"))
        assert whole.keys() == through.keys() == resumed.keys()
        for key, expected in whole.items():
            assert torch.equal(through[key], resumed[key]), key
            assert torch.allclose(through[key].float(), expected.float(), rtol=2e-2, atol=1e-3), key
