"""The models that `benchmarks.serve` serves: the same weights in a directory for each implementation."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import spkv
from benchmarks.from_scratch import byte_tokenizer, configuration
from benchmarks.generate import SHAPE_8B
from benchmarks.serve_common import DEVICE
from benchmarks.serve_offline_model import calibrate
from spkv.checkpoint import resolve_model
from spkv.config import CONFIG_FILE, PREDICTOR_FILE, read_stored
from spkv.hf.packaged import PACKAGED_MODELS

IMPLEMENTATIONS = ("dense", "spkv", "open")
_CALIBRATED_TOKENS = 4096


def prepare(model: str, folder: Path, density: float = 0.25) -> dict[str, Path]:
    """Make a directory for each implementation, with the same weights.

    Args:
        model: a packaged model, "tiny" and "8b" for random weights, or a directory with a self-pruned model.
        folder: where to put them.
        density: of "8b".
    """
    if model == "tiny":
        _write_tiny(folder / "spkv")
    elif model == "8b":
        write_shape(SHAPE_8B, folder / "spkv", density)
    elif model in PACKAGED_MODELS:
        spkv.save(spkv.load(model), folder / "spkv")
        AutoTokenizer.from_pretrained(resolve_model(model)).save_pretrained(folder / "spkv")
    else:
        shutil.copytree(Path(model).resolve(), folder / "spkv", copy_function=os.symlink)
    source = (folder / "spkv").resolve()
    # A self-pruned model is told by its config, and to transformers and vLLM the rest is an ordinary one.
    for name, left_out in (("dense", (CONFIG_FILE, PREDICTOR_FILE)), ("open", (CONFIG_FILE,))):
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(*left_out), copy_function=os.symlink)
    stored = read_stored(source)
    stored["config"]["threshold"], stored["training"]["density"] = sys.float_info.min, 1.0
    (folder / "open" / CONFIG_FILE).write_text(json.dumps(stored), encoding="utf-8")
    return {name: folder / name for name in IMPLEMENTATIONS}


def _write_tiny(directory: Path) -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = configuration("tiny", len(tokenizer), 4096, tokenizer.eos_token_id)
    config.head_dim = 32  # the smallest that vLLM's attention takes
    config.initializer_range = 0.3  # far from uniform, so that greedy choices are clear
    model = LlamaForCausalLM(config).eval()
    spkv.attach(model, spkv.SPKVConfig(window=32, initial_bias=-1.0))
    for predictor in spkv.attachment(model).predictors.values():
        torch.nn.init.normal_(predictor.down.weight)
    spkv.save(model, directory, training={"density": 0.5})
    tokenizer.save_pretrained(directory)


@torch.no_grad()
def write_shape(shape: LlamaConfig, directory: Path, density: float) -> None:
    """Write a model of random weights whose heads keep a share of a text past their windows; it reads bytes."""
    torch.manual_seed(0)
    tokenizer, device = byte_tokenizer(), torch.device(DEVICE)
    with device:
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval()
    spkv.attach(model, spkv.SPKVConfig(initial_bias=0.0))
    text = tokenizer("\n".join(topics.values()), verbose=False).input_ids[:_CALIBRATED_TOKENS]
    ids = torch.tensor([text], device=device)
    calibrate(model, density, lambda: model(ids, use_cache=False, logits_to_keep=1))
    spkv.save(model, directory, training={"density": density})
    tokenizer.save_pretrained(directory)
