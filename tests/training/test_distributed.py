from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spkv.training import adapt

# What `torchrun` runs, in every process.
SCRIPT = """
import json, os, sys, torch
import torch.distributed as dist
from pathlib import Path
from spkv.training import Recipe, adapt
from transformers import TrainerCallback
class Look(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **rest):
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        assert gradients and all(gradient._is_view() for gradient in gradients), "they lie outside of what is sent"
options = json.loads(sys.argv[1])
adapt(recipe=Recipe(**options.pop("recipe")), callbacks=[Look()], **options)
Path(options["output"], f"next-draw-{os.environ['RANK']}").write_text(str(torch.rand(()).item()))
dist.barrier()
os._exit(0)  # gloo's threads, torn down by an ordinary exit, may abort the process
"""


def launched(nodes: int) -> list[list[str]]:
    """Two processes: what starts them on each of so many nodes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    if nodes == 1:
        return [[*torchrun, "--standalone", "--nproc-per-node", "2"]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--nnodes", str(nodes), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    return [[*torchrun, *place, "--node-rank", str(rank), "--nproc-per-node", "1"] for rank in range(nodes)]


@pytest.mark.parametrize(("name", "nodes"), [("fast", 1), ("fast-lora", 1), ("fast-frozen", 1), ("fast", 2)])
def test_two_processes_compute_what_one_does(
    model_directory: Path, text_file: Path, tmp_path: Path, recipe_of, name: str, nodes: int
) -> None:
    recipe = recipe_of(name, target_density=0.5)
    options = dict(
        model=str(model_directory), data=[str(text_file)], validation=[str(text_file)], validation_tokens=200
    )
    options |= dict(log_every=1, progress=False)
    one = adapt(output=tmp_path / "one", recipe=recipe, batch_size=4, **options)
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    options |= dict(output=str(tmp_path / "two"), recipe=recipe.to_dict(), batch_size=1)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    logs = [tmp_path / f"node-{rank}.log" for rank in range(nodes)]
    started = []
    try:
        for command, log in zip(launched(nodes), logs, strict=True):
            arguments = [*command, str(script), json.dumps(options)]
            started.append(subprocess.Popen(arguments, env=environment, stderr=log.open("w")))
        for process, log in zip(started, logs, strict=True):
            assert process.wait(timeout=300) == 0, log.read_text()[-4000:]
    finally:
        for process in started:
            process.kill()

    draws = {file.read_text() for file in (tmp_path / "two").glob("next-draw-*")}
    assert len(draws) == 2, "noise on gates must differ between processes"
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["validation_tokens"] == one["validation_tokens"]
    for key in ("base_validation_loss", "validation_loss"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)
    assert two["density"] == pytest.approx(one["density"], abs=5e-3)
    one_log, two_log = (
        [e for e in json.loads((tmp_path / run / "trainer_state.json").read_text())["log_history"] if "loss" in e]
        for run in ("one", "two")
    )
    assert len(one_log) == recipe.steps
    for ours, theirs in zip(one_log, two_log, strict=True):
        for key in ("loss", "mean_utility", "lambda", "grad_norm"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4), (ours["step"], key)
    for file in (tmp_path / "one").glob("*.safetensors"):
        other = load_file(tmp_path / "two" / file.name)
        for key, value in load_file(file).items():
            # Stored in bfloat16, the nearly same may be rounded to either side.
            rtol = max(1e-3, torch.finfo(value.dtype).eps)
            assert torch.allclose(value, other[key], rtol=rtol, atol=1e-5), key
