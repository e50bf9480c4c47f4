"""vLLM's Llama with utility predictors and our attention layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from spkv.config import PREDICTOR_FILE
from spkv.gates import OpenGate, ThresholdGate
from spkv.predictor import UtilityPredictor
from spkv.serving import settings
from spkv.serving.attention import SelfPrunedAttention


class SelfPrunedLlamaAttention(LlamaAttention):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = get_current_vllm_config()
        config, name = settings.stored_config(vllm_config), kwargs["prefix"]
        self.layer = extract_layer_index(name)
        # Its place in vLLM's list of layers is taken over with its name.
        self.attn = SelfPrunedAttention(
            vllm_config, f"{name}.attn", self.layer, self.num_heads, self.num_kv_heads, self.head_dim, self.scaling
        )
        self.utility_predictor: UtilityPredictor | None = None
        self.gate: OpenGate | ThresholdGate = OpenGate()
        if config.layers is None or self.layer in config.layers:
            self.gate = ThresholdGate(config.threshold)
            self.utility_predictor = UtilityPredictor(
                self.hidden_size,
                self.total_num_kv_heads,
                config.predictor_width,
                config.initial_bias,
                config.predictor_depth,
            )
        # Every worker computes the utilities of all heads, which costs little, and uses those of its own.
        workers = get_tensor_model_parallel_world_size()
        first = get_tensor_model_parallel_rank() * self.total_num_kv_heads // workers
        self.own_heads = slice(first, first + self.num_kv_heads)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        if self.utility_predictor is None:
            utility = hidden_states.new_ones(1, self.num_kv_heads, hidden_states.shape[0])
        else:
            utility = self.utility_predictor(hidden_states.unsqueeze(0))[:, self.own_heads]
        keep = self.gate.keep(utility, layer=self.layer, position=positions)
        out, _ = self.o_proj(self.attn(query, key, value, keep))
        return out


class SelfPrunedLlamaLayer(LlamaDecoderLayer):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, attn_layer_type=SelfPrunedLlamaAttention, **kwargs)


class SPKVLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=SelfPrunedLlamaLayer)
        self.predictor_file = settings.model_file(vllm_config.model_config, PREDICTOR_FILE)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the model's weights, and the predictors from their own file.

        vLLM may hand over the tensors of all safetensors files in the directory; the predictors' begin with "layers.".
        """
        loaded = super().load_weights(item for item in weights if not item[0].startswith("layers."))
        return loaded | self._load_predictors()

    @torch.no_grad()
    def _load_predictors(self) -> set[str]:
        stored, loaded = load_file(self.predictor_file), set()
        for name, parameter in self.named_parameters():
            before, _, after = name.partition(".self_attn.utility_predictor.")
            if after:
                parameter.copy_(stored[f"{before.removeprefix('model.')}.{after}"])
                loaded.add(name)
        return loaded
