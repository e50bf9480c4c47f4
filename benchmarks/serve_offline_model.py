"""The model of `benchmarks.serve_offline`: random weights, and predictors that keep a given share.

Legend: Hkv KV heads.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import spkv
from benchmarks.serve_offline import shape
from spkv.config import CONFIG_FILE, FORMAT, PREDICTOR_FILE
from spkv.predictor import UtilityPredictor

_CALIBRATIONS = 4  # what a layer keeps changes the inputs of later ones, so that once is not enough
_CALIBRATED = 0.01  # how far a head's share may lie from the one asked for
_DENSITY_MARGIN = 0.2  # of the density asked for, by which the cache's may differ, on texts not calibrated with


def write_directory(implementation: str, options: argparse.Namespace, folder: Path) -> Path:
    """Write a model's config, and for `spkv` what says that it is self-pruned; vLLM makes up weights itself."""
    config = copy.deepcopy(shape(options))
    config.architectures, config.dtype = ["LlamaForCausalLM"], options.dtype
    config.save_pretrained(folder)
    if implementation == "spkv":
        own = spkv.SPKVConfig(window=options.window, initial_bias=0.0).to_dict()
        stored = {"format": FORMAT, "config": own, "base": None, "training": {"density": options.density}}
        (folder / CONFIG_FILE).write_text(json.dumps(stored), encoding="utf-8")
        save_file({"unused": torch.zeros(1)}, folder / PREDICTOR_FILE)  # it must be there
    return folder


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Draw weights as those of an untrained model, in place, so that captured graphs see them.

    vLLM's own are so small that all tokens come out the same.
    """
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)  # a norm's; there are no biases but the predictors'
        elif parameter.is_floating_point():
            parameter.normal_(std=0.02)
    for predictor in predictors(model):
        predictor.reset_parameters()


def predictors(model: nn.Module) -> list[UtilityPredictor]:
    """Those of all layers, in their order."""
    return [module for module in model.modules() if isinstance(module, UtilityPredictor)]


@torch.no_grad()
def calibrate(model: nn.Module, density: float, read: Callable[[], object]) -> list[dict[str, float]]:
    """Shift every predictor's bias, in place, so that each head keeps its share of a text.

    Args:
        model: with predictors.
        density: the share.
        read: has the model read the text.

    Returns:
        For each pass over the text the mean of all heads' shares, the least and the most; of the last nothing was
        shifted any more.
    """
    passes: list[dict[str, float]] = []
    while True:
        logits = _read_logits(model, read)
        shares = torch.stack([(layer >= 0).double().mean(1) for layer in logits])  # [layers, Hkv]
        passes.append({"mean": float(shares.mean()), "least": float(shares.min()), "most": float(shares.max())})
        if (shares - density).abs().max() < _CALIBRATED or len(passes) == _CALIBRATIONS:
            return passes
        for predictor, layer in zip(predictors(model), logits, strict=True):
            predictor.down.bias -= torch.quantile(layer, 1 - density, dim=1).to(predictor.down.bias.dtype)


def _read_logits(model: nn.Module, read: Callable[[], object]) -> list[Tensor]:
    """What predictors say of a text, before the sigmoid: [Hkv, tokens] of each."""
    found: list[list[Tensor]] = []
    handles = []
    for predictor in predictors(model):
        chunks: list[Tensor] = []
        found.append(chunks)
        handles.append(predictor.register_forward_hook(lambda _, inputs, out, to=chunks: to.append(out[0].clone())))
    try:
        read()
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(chunks, 1).double().logit() for chunks in found]


def cache_of(model: nn.Module) -> Any:
    """The SlabCache of a self-pruned model."""
    from spkv.serving.attention import SelfPrunedAttention

    return next(module for module in model.modules() if isinstance(module, SelfPrunedAttention)).cache


def read_density(cache: Any, asked: float) -> dict[str, float]:
    """What the cache's rows hold, which stays there until another request starts in them: density and kept fraction.

    Raises:
        RuntimeError: if the density is not the one asked for.
    """
    seen = cache.seen[:, : cache.padding_row].double()
    pairs = cache.kv_heads * seen.sum()
    held = cache.kv_heads * seen.clamp_max(cache.window).sum()
    kept = cache.kept[:, : cache.padding_row * cache.kv_heads].double().sum()
    density = float(kept / (pairs - held))
    if not abs(density - asked) <= _DENSITY_MARGIN * asked:
        raise RuntimeError(f"the cache keeps {density:.3f} of the pairs past the window, and {asked:g} was asked for")
    return {"density": density, "kept_fraction": float((kept + held) / pairs)}
