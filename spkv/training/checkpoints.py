"""What a checkpoint holds beside what transformers puts there: the run's own state, and predictors as it has them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from spkv.training.inputs import inputs_of, set_inputs
from spkv.training.parameters import PREDICTOR_PART
from spkv.training.recipes import Recipe

STATE_FILE = "spkv_training.json"
"""Written last into a checkpoint: one that lacks it is incomplete."""

# Not the predictors that others load: inputs may be standardised still.
_PREDICTOR_FILE = "trained_predictor.safetensors"


def last_checkpoint(directory: str | os.PathLike[str]) -> str | None:
    """Return the latest complete checkpoint in a directory, or None."""
    steps = [
        int(path.parent.name.removeprefix("checkpoint-")) for path in Path(directory).glob(f"checkpoint-*/{STATE_FILE}")
    ]
    return str(Path(directory, f"checkpoint-{max(steps)}")) if steps else None


def stored_batch_size(checkpoint: str) -> int | None:
    """Return the rows that each process of the run computed at once; None if an earlier version made the checkpoint."""
    state = json.loads(Path(checkpoint, STATE_FILE).read_text(encoding="utf-8"))
    return state.get("batch_size")  # type: ignore[no-any-return]


def check_same_run(stored: dict[str, Any], wanted: dict[str, Any], path: str) -> None:
    """Raise a ValueError that names the differences if a checkpoint has another recipe, data or seed."""
    # A field of the recipe that is newer than the checkpoint had what is now its default.
    new = (field for field in dataclasses.fields(Recipe) if field.name in wanted and field.name not in stored)
    stored = {**stored, **{field.name: field.default for field in new}}
    changed = sorted(key for key in {*stored, *wanted} if stored.get(key) != wanted.get(key))
    if changed:
        differences = ", ".join(f"{key}: {stored.get(key)!r} there, {wanted.get(key)!r} now" for key in changed)
        raise ValueError(
            f"{path} was made by another run ({differences}); use its recipe, data and seed, or another output"
        )


def save_trained_predictors(
    model: nn.Module, directory: Path, *, sharded: bool, write: bool, weights: bool = True
) -> None:
    """Store predictors as they are trained. To be called by all processes.

    Args:
        model: an attached model.
        directory: a checkpoint.
        sharded: whether FSDP has spread the model; weights are gathered then.
        write: whether this process writes.
        weights: store them, and not only what inputs are standardised by.
    """
    kept: dict[str, Any] = {}
    if weights and sharded:
        # With LoRA, what transformers stores of a sharded model is the LoRA weights alone.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        kept = get_model_state_dict(model, options=options)
    elif weights:
        kept = model.state_dict()
    kept = {name: weight.contiguous() for name, weight in kept.items() if PREDICTOR_PART in name}
    if write:
        save_file({**kept, **inputs_of(model)}, directory / _PREDICTOR_FILE)


def load_trained_predictors(model: nn.Module, directory: Path, *, weights: bool = True) -> None:
    """Fill predictors from a checkpoint, spread over the processes where they are sharded. To be called by all of them.

    Raises:
        FileNotFoundError, ValueError: if the directory holds none, or others.
    """
    file = directory / _PREDICTOR_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{os.fspath(directory)!r} holds no {_PREDICTOR_FILE}: an earlier version of spkv made it; start anew"
        )
    stored: dict[str, Any] = load_file(file)
    set_inputs(model, stored)
    if not weights:
        return
    stored = {name: weight for name, weight in stored.items() if PREDICTOR_PART in name}
    wanted = {name for name in model.state_dict() if PREDICTOR_PART in name}
    if stored.keys() != wanted:
        raise ValueError(f"{file} holds other predictors: {sorted(stored.keys() ^ wanted)[:3]} are not in both")
    set_model_state_dict(model, stored, options=StateDictOptions(full_state_dict=True, strict=False))
