"""Model families: model_type -> where its attention lives. To add a family, add a row and a tiny config in its test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """How a family names its parts.

    Attributes:
        layers: attribute of the decoder that lists its layers.
        attention: attribute of a layer that is its self-attention.
        passes_keywords: whether keywords of the decoder's forward reach its attentions. Where they do not, the
            context of a pass is read from the attachment, which rules out gradient checkpointing.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    passes_keywords: bool = True


FAMILIES: dict[str, Family] = {
    "cohere2": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "glm4": Family(),
    "gpt_oss": Family(),
    "granite": Family(),
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "olmo2": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "smollm3": Family(),
    "stablelm": Family(passes_keywords=False),
    "starcoder2": Family(),
}


@dataclass(frozen=True)
class Decoder:
    """The parts of a model that attaching needs.

    Attributes:
        family: its row in the table.
        module: the decoder stack, whose forward takes the cache.
        config: its config.
        attentions: every layer's self-attention, in order.
        global_layers: indices of those that see the whole text; the others have a local window by design.
    """

    family: Family
    module: PreTrainedModel
    config: PreTrainedConfig
    attentions: list[nn.Module]
    global_layers: tuple[int, ...]

    @property
    def kv_heads(self) -> int:
        return self.config.num_key_value_heads

    @property
    def head_size(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder of a causal language model, also inside a PEFT model.

    Raises:
        TypeError: if `model` is not a transformers model.
        ValueError: if its family is not supported, or all its layers are local.
    """
    base = unwrap(model)
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, not {type(model).__name__}")
    model_type = base.config.model_type
    if model_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[model_type]
    module = base.get_decoder()
    attentions = [getattr(layer, family.attention) for layer in getattr(module, family.layers)]
    global_layers = tuple(i for i in range(len(attentions)) if not _is_local(module.config, i))
    if not global_layers:
        raise ValueError(
            f"every layer of this {model_type} model has a sliding window ({module.config.sliding_window}); "
            "there is no global attention layer whose cache could be pruned"
        )
    return Decoder(family, module, module.config, attentions, global_layers)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(model, "get_base_model") else model


def _is_local(config: PreTrainedConfig, layer: int) -> bool:
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    # A window as long as the model's positions hides nothing.
    hides = window is not None and window < config.max_position_embeddings
    if layer_types is None:
        return hides
    if layer_types[layer] not in ("full_attention", "sliding_attention"):
        raise ValueError(
            f"layer {layer} is of type {layer_types[layer]!r}; supported are full_attention and sliding_attention"
        )
    return hides and layer_types[layer] == "sliding_attention"
