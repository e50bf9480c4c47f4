"""Which parameters are trained, and how: LoRA, and the optimiser's groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spkv.hf.attach import attachment
from spkv.hf.families import find_decoder
from spkv.training.recipes import Recipe

ADAPTER_DTYPE = torch.bfloat16
"""What adapters are stored in."""

PREDICTOR_PART = ".utility_predictor."
"""What the names of all predictor parameters contain."""


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Sort the trained parameters into AdamW groups, the model's matrices first.

    Each group has, beside AdamW's own keys, `predictor`: True for the utility predictors.

    Raises:
        ValueError: if nothing of the model is trained, and the recipe does not say so.
    """
    embeddings = {
        id(parameter)
        for m in model.modules()
        if isinstance(m, nn.Embedding)
        for parameter in m.parameters(recurse=False)
    }
    decayed, plain, predictor = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if PREDICTOR_PART in name:
            predictor.append(parameter)
        elif parameter.dim() >= 2 and id(parameter) not in embeddings:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    if not decayed and not recipe.freeze_model:
        raise ValueError("no matrix of the model is trained; set freeze_model to train the predictors alone")
    model_lr, predictor_lr = recipe.learning_rate, recipe.learning_rate * recipe.predictor_lr_multiplier
    groups = [
        {"params": decayed, "lr": model_lr, "weight_decay": recipe.weight_decay, "predictor": False},
        {"params": plain, "lr": model_lr, "weight_decay": 0.0, "predictor": False},
        {"params": predictor, "lr": predictor_lr, "weight_decay": recipe.predictor_weight_decay, "predictor": True},
    ]
    return [group for group in groups if group["params"]]


def prepare_parameters(model: PreTrainedModel, recipe: Recipe) -> nn.Module:
    """Make an attached model ready for a recipe: wrap it with LoRA, and say what is trained.

    LoRA goes to all linear layers of the decoder's blocks, not to the predictors, which are trained in full, nor to
    the output layer.

    Returns:
        The model, or the PEFT model around it.
    """
    prepared: nn.Module = model
    if recipe.lora_rank is not None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_rank if recipe.lora_alpha is None else recipe.lora_alpha,
            target_modules=linear_names(model),
            task_type="CAUSAL_LM",
        )
        prepared = get_peft_model(model, config)
    if recipe.freeze_model:
        model.requires_grad_(False)
    for predictor in attachment(prepared).predictors.values():
        predictor.float().requires_grad_(recipe.gates)
    return prepared


def enable_recomputation(model: PreTrainedModel) -> None:
    """Let the backward pass compute activations again, layer by layer, instead of keeping them."""
    # Not reentrant: the utilities leave a layer beside its output, and need their graph.
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.23
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


@torch.no_grad()
def round_trained_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Round trained parameters to what `dtype` can hold; they keep their own type."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or PREDICTOR_PART in name:
            parameter.copy_(parameter.to(dtype))


def linear_names(model: PreTrainedModel) -> list[str]:
    """Return the names, within their parent, of the linear layers in the decoder's blocks, predictors left out.

    PEFT matches ends of names. Naming the layers, rather than "all but the predictors", lets the adapter be loaded
    into a model that is not attached yet.
    """
    decoder = find_decoder(model)
    names = {
        name.rpartition(".")[2]
        for name, module in decoder.module.named_modules()
        if isinstance(module, nn.Linear) and PREDICTOR_PART not in f".{name}."
    }
    taken = {
        name.rpartition(".")[2]
        for name, module in decoder.module.named_modules()
        if isinstance(module, nn.Linear) and PREDICTOR_PART in f".{name}."
    }
    if names & taken:
        raise ValueError(
            f"linear layers {sorted(names & taken)} are named as the predictor's are; LoRA cannot tell them apart"
        )
    return sorted(names)
