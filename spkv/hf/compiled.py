"""The small operations of a stock model, fused by torch.compile.

A layer is some forty kernels: in a decode step most of them are a few elements wide, in training most of them move
activations through memory and compute next to nothing. Compiling norms, rotary embedding and predictors (in training
MLPs and the loss, too) one by one, not the model as a whole, takes seconds instead of minutes, since all layers share
the same few functions, and it leaves attention, cache and hooks as they are. What follows the last wide layer of a
predictor, with the comparison of utilities and threshold, is one kernel of ours in a decode step.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config as inductor
from torch import Tensor, nn
from transformers import PreTrainedModel

from spkv.hf.families import find_decoder
from spkv.predictor import UtilityPredictor

_ROTARY = "apply_rotary_pos_emb"
# A function is compiled anew for every shape of layer, and for training and evaluation; dynamo's usual 8 are soon used
# up by several models in one process, and then it gives up.
_VARIANTS = 64


@functools.cache
def _compile(function: Callable[..., Any], reproducible: bool) -> Callable[..., Any]:
    # Round where the model rounds, so that compiled and eager steps choose the same tokens.
    options: dict[str, Any] = {"emulate_precision_casts": True}
    if reproducible and hasattr(inductor, "deterministic"):
        # Kernels that sum are chosen by rule and not by a race, so that another process computes the same.
        options["deterministic"] = True
    return torch.compile(function, options=options)


@contextlib.contextmanager
def compiled_parts(model: PreTrainedModel, training: bool = False) -> Iterator[None]:
    """Inside, the norms, predictors and rotary embeddings of a causal LM run compiled.

    With `training` its gated MLPs and the loss do, too. (In a decode step `concurrent.py` runs the halves of an MLP
    side by side, which saves more than a fused activation.) Nothing else may use a model of the same family meanwhile:
    rotary embedding is a function of its module.
    """
    sources = {sys.modules[type(attention).__module__] for attention in find_decoder(model).attentions}
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch._dynamo.config.patch(recompile_limit=_VARIANTS))  # type: ignore[no-untyped-call]
        module: Any
        for module in model.modules():
            if not training and _ends_in_one_kernel(module):
                module.decide = functools.partial(_decide, module)
                undo.callback(vars(module).pop, "decide")
            if _is_part(module) or (training and _is_plain_mlp(module)):
                module.forward = functools.partial(_compile(type(module).forward, training), module)
                undo.callback(vars(module).pop, "forward")
        for source in sources:
            if (function := getattr(source, _ROTARY, None)) is not None:
                setattr(source, _ROTARY, _compile(function, training))
                undo.callback(setattr, source, _ROTARY, function)
        if training and hasattr(model, "loss_function"):
            # A property of the class, which keeps what it is set to under another name.
            before = vars(model).copy()
            model.loss_function = _compile(model.loss_function, training)
            for name, value in vars(model).items():
                if value is not before.get(name):
                    undo.callback(_put_back, model, name, before)
        yield


def _put_back(model: nn.Module, name: str, before: dict[str, Any]) -> None:
    del vars(model)[name]
    if name in before:
        vars(model)[name] = before[name]


def _is_part(module: nn.Module) -> bool:
    """A norm or a predictor whose forward pass is its class's."""
    if "forward" in vars(module):
        return False
    is_norm = "Norm" in type(module).__name__ and not any(True for _ in module.children())
    return is_norm or isinstance(module, UtilityPredictor)


def _ends_in_one_kernel(module: nn.Module) -> bool:
    """A predictor for which `_decide` can stand."""
    return (
        isinstance(module, UtilityPredictor)
        and _is_bare(module)
        and module.depth > 1
        and module.input_mean is None
        and _is_plain(module.down)
        and module.down.weight.is_cuda
        and module.down.weight.dtype == module.hidden_layers[-1].weight.dtype
    )


def _is_plain(module: Any) -> bool:
    """A linear layer and nothing more: no wrapper, no hooks, no quantised weight."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and _is_bare(module)


def _is_bare(module: nn.Module) -> bool:
    """A call of it is its class's forward pass and no more."""
    return "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


def _decide(predictor: UtilityPredictor, hidden_states: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Utilities and what is kept, for the few tokens of a decode step."""
    if torch.is_autocast_enabled(hidden_states.device.type):  # which casts for torch's own operators alone
        utility = predictor(hidden_states)
        return utility, utility >= threshold
    from spkv.ops.triton.utility import decide  # here is Triton, since here is a graph

    *first, last = predictor.hidden_layers
    for layer in first:
        hidden_states = predictor.act(layer(hidden_states))
    return decide(last(hidden_states), predictor.down.weight, predictor.down.bias, threshold)


def _is_plain_mlp(module: nn.Module) -> bool:
    """A gated MLP of linear layers, none of them wrapped (LoRA) or with a forward pass of its own."""
    projections = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return "forward" not in vars(module) and all(map(_is_plain, projections))
