"""The result of a run: what it leaves in its output directory."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spkv
from spkv.checkpoint import save, save_adapter
from spkv.hf.attach import detach
from spkv.outputs import check_holds_no_model
from spkv.training.checkpoints import check_same_run, last_checkpoint
from spkv.training.inputs import fold_inputs, inputs_of, set_inputs
from spkv.training.parameters import ADAPTER_DTYPE
from spkv.training.trainer import AdaptationTrainer

SUMMARY_FILE = "summary.json"


def finished_run(output: Path, resume: bool, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Return the summary of a run that is finished already, or None if there is something to do.

    Args:
        output: its directory.
        resume: whether a run is to go on there.
        wanted: what the summary must say: "recipe", a dictionary, and model, data and seed.

    Raises:
        FileExistsError: if `output` holds a run, finished or not, and `resume` is not set; or another model.
        ValueError: if it holds another run that is finished.
    """
    if (output / SUMMARY_FILE).exists():
        if not resume:
            raise FileExistsError(f"{output} holds a finished run; choose another output")
        summary: dict[str, Any] = json.loads((output / SUMMARY_FILE).read_text(encoding="utf-8"))
        rest = wanted.keys() - {"recipe"}
        if "recipe" not in summary:
            raise ValueError(f"{output / SUMMARY_FILE} is not that of a run of `spkv adapt`; choose another output")
        stored, now = ({**run["recipe"], **{name: run.get(name) for name in rest}} for run in (summary, wanted))
        check_same_run(stored, now, str(output))
        return summary
    if not resume and any(output.glob("checkpoint-*")):
        raise FileExistsError(
            f"{output} holds the checkpoints of an unfinished run; resume it or choose another output"
        )
    if last_checkpoint(output) is None:
        check_holds_no_model(output)
    return None


def circumstances(trainer: AdaptationTrainer) -> dict[str, Any]:
    """Return what the run ran on: device, processes, versions."""
    packages = ("torch", "transformers", "accelerate", "peft")
    device = trainer.args.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": trainer.accelerator.num_processes,
        "versions": {
            "spkv": spkv.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def save_result(
    trainer: AdaptationTrainer, build: Callable[[], nn.Module], output: Path, summary: dict[str, Any]
) -> None:
    """Save what a run made, and its summary last.

    Args:
        trainer: the trainer, when it is done.
        build: makes the model anew, as it was before training; filled with the weights of one that is sharded.
        output: directory.
        summary: goes into `summary.json`, and into the model's own config.
    """
    model: Any = trainer.model
    if trainer.is_fsdp_enabled:
        # Gathered by all processes, then filled into a model that is whole.
        weights, inputs = trainer.accelerator.get_state_dict(model), inputs_of(model)
        if trainer.args.should_save:
            model = build()
            model.load_state_dict(weights)
            set_inputs(model, inputs)
            fold_inputs(model)
    if not trainer.args.should_save:
        return
    if trainer.recipe.is_control:
        detach(model)
        model.save_pretrained(output)
    elif trainer.recipe.makes_adapter:
        save_adapter(model, output, training=summary, dtype=ADAPTER_DTYPE)
    else:
        save(model, output, training=summary)
    if trainer.tokenizer is not None:
        trainer.tokenizer.save_pretrained(output)
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    # Last: it says that the run is finished.
    (output / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
