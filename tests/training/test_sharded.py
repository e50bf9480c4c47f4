from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spkv.checkpoint import load_base
from spkv.hf.attach import attach, attachment
from spkv.training.checkpoints import load_trained_predictors, save_trained_predictors
from spkv.training.inputs import inputs_of
from spkv.training.parameters import prepare_parameters

# Two processes shard a model's layers; a loss with the utilities in it must have the gradients of the whole model.
SCRIPT = """
import sys, torch
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
dist.barrier()  # a process that leaves while another still talks to it aborts
dist.destroy_process_group()
"""


def test_a_sharded_model_has_the_gradients_of_a_whole_one(model_directory: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    done = subprocess.run(
        [*command, str(script), str(model_directory)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


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
