"""The small operations of a decode step, fused by torch.compile while a CUDA graph is captured.

A step of a stock model is some forty kernels a layer, most of them a few elements wide: norms, rotary embedding,
activations, predictors. Compiling them one by one, not the model as a whole, takes seconds instead of minutes, since
all layers share the same three functions, and it leaves attention, cache and hooks as they are. MLPs are left alone:
`concurrent.py` runs their halves side by side, which saves more than a fused activation.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spkv.hf.families import find_decoder
from spkv.predictor import UtilityPredictor

_ROTARY = "apply_rotary_pos_emb"


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # Round where the model rounds, so that compiled and eager steps choose the same tokens.
    return torch.compile(function, options={"emulate_precision_casts": True})


@contextlib.contextmanager
def compiled_parts(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the norms, predictors and rotary embeddings of a causal LM run compiled.

    Nothing else may use a model of the same family meanwhile: rotary embedding is a function of its module.
    """
    parts = [module for module in model.modules() if _is_part(module)]
    sources = {sys.modules[type(attention).__module__] for attention in find_decoder(model).attentions}
    rotary = [(source, getattr(source, _ROTARY)) for source in sources if hasattr(source, _ROTARY)]
    try:
        module: Any
        for module in parts:
            module.forward = functools.partial(_compile(type(module).forward), module)
        for source, function in rotary:
            setattr(source, _ROTARY, _compile(function))
        yield
    finally:
        for module in parts:
            module.__dict__.pop("forward", None)
        for source, function in rotary:
            setattr(source, _ROTARY, function)


def _is_part(module: nn.Module) -> bool:
    """A norm or a predictor whose forward pass is its class's."""
    if "forward" in vars(module):
        return False
    is_norm = "Norm" in type(module).__name__ and not any(True for _ in module.children())
    return is_norm or isinstance(module, UtilityPredictor)
