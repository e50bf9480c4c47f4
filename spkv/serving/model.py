"""vLLM's models with utility predictors and our attention layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from spkv.config import PREDICTOR_FILE, SPKVConfig
from spkv.gates import HardGate, OpenGate, ThresholdGate, open_sinks, sink_mask
from spkv.predictor import UtilityPredictor
from spkv.serving import settings
from spkv.serving.adapter import Adapter
from spkv.serving.attention import SelfPrunedAttention

_ATTENTION = ".self_attn"


class _SelfPruned(nn.Module):
    """Stands in front of a model class of vLLM's, whose attentions project and rotate and hand on to a layer `attn`.

    That layer is replaced by ours, under its name. What to keep is decided from the attention's input before it runs.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.predictor_file = settings.model_file(vllm_config.model_config, PREDICTOR_FILE)
        directory = settings.adapter_directory(vllm_config.model_config)
        self.adapter = None if directory is None else Adapter(directory)
        config = settings.stored_config(vllm_config)
        attentions = [(name, module) for name, module in self.named_modules() if name.endswith(_ATTENTION)]
        for name, attention in attentions:
            replaced = attention.attn
            attention.attn = SelfPrunedAttention(
                vllm_config,
                replaced.layer_name,
                attention.num_heads,
                attention.num_kv_heads,
                attention.head_dim,
                attention.scaling,
            )
            decision = _Decision(config, attention, extract_layer_index(name))
            if decision.predictor is not None:
                attention.utility_predictor = decision.predictor
            attention.register_forward_pre_hook(decision, with_kwargs=True)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the model's weights, with an adapter's if one was named, and the predictors from their own file."""
        base: Any = super()
        if self.adapter is None:
            # vLLM may hand over all safetensors files of the directory; the predictors' names begin with "layers.".
            weights = (item for item in weights if not item[0].startswith("layers."))
        else:
            weights = self.adapter.merge(weights)
        loaded: set[str] = base.load_weights(weights)
        return loaded | self._load_predictors()

    @torch.no_grad()
    def _load_predictors(self) -> set[str]:
        stored, loaded = load_file(self.predictor_file), set()
        for name, parameter in self.named_parameters():
            before, _, after = name.partition(f"{_ATTENTION}.utility_predictor.")
            if after:
                parameter.copy_(stored[f"{before.removeprefix('model.')}.{after}"])
                loaded.add(name)
        return loaded


class _Decision:
    """Called before an attention: says to its layer which of the pairs to come are kept."""

    def __init__(self, config: SPKVConfig, attention: Any, layer: int) -> None:
        self.layer = layer
        self.predictor: UtilityPredictor | None = None
        self.gate: HardGate = OpenGate()
        self.sinks = config.sinks
        if config.layers is None or self.layer in config.layers:
            self.gate = ThresholdGate(config.threshold)
            self.predictor = UtilityPredictor(
                attention.hidden_size,
                attention.total_num_kv_heads,
                config.predictor_width,
                config.initial_bias,
                config.predictor_depth,
            )
        # Every worker computes the utilities of all heads, which costs little, and uses those of its own.
        workers = get_tensor_model_parallel_world_size()
        first = get_tensor_model_parallel_rank() * attention.total_num_kv_heads // workers
        self.own_heads = slice(first, first + attention.num_kv_heads)

    def __call__(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states, position = kwargs["hidden_states"], kwargs["positions"]
        if self.predictor is None:
            utility = hidden_states.new_ones(1, attention.num_kv_heads, hidden_states.shape[0])
        else:
            utility = self.predictor(hidden_states.unsqueeze(0))[:, self.own_heads]
            utility = open_sinks(utility, sink_mask(position.unsqueeze(0), self.sinks))
        attention.attn.keep = self.gate.keep(utility, layer=self.layer, position=position)


class SPKVLlamaForCausalLM(_SelfPruned, LlamaForCausalLM):  # type: ignore[misc]
    pass


class SPKVMistralForCausalLM(_SelfPruned, MistralForCausalLM):  # type: ignore[misc]
    pass


class SPKVQwen2ForCausalLM(_SelfPruned, Qwen2ForCausalLM):  # type: ignore[misc]
    pass


class SPKVQwen3ForCausalLM(_SelfPruned, Qwen3ForCausalLM):  # type: ignore[misc]
    pass
