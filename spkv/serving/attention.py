"""The attention layer that stands where vLLM's own would, and what vLLM asks of one: a backend and a spec.

Legend: n tokens of a batch, H query heads, Hkv KV heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
)

from spkv.ops.triton import limits
from spkv.serving import settings, versions
from spkv.serving.chunks import Group, groups
from spkv.serving.ledger import SlabSizes
from spkv.serving.manager import SlabSpec
from spkv.serving.slabs import SlabCache, Step

# Of the queries: what the attention of prompts takes at most, for pairs and outputs, padded, and of far and near.
_COPIES = 8


@dataclass
class Batch(AttentionMetadata):  # type: ignore[misc]
    """The requests of a step.

    Attributes:
        single: how many, at the front, have one token only.
        others: the other requests.
        first_slabs: [requests], what tells them.
        step: the cache's part in it; begun by the first layer, ended by the last.
    """

    single: int
    others: list[Group]
    first_slabs: Tensor
    step: Step | None = None


class BatchBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    reorder_batch_threshold = 1  # requests with one token come first

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # abstract in the base class

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Single tokens, if the kernels can run them: these wait for nothing, and the operators' definitions do."""
        heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        group, place = heads // kv_cache_spec.num_kv_heads, torch.device(versions.device_type())
        refused = limits.model(kv_cache_spec.head_size, group, kv_cache_spec.dtype, place)
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if refused is None else AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Batch:
        requests = common_attn_metadata.num_reqs
        starts = common_attn_metadata.query_start_loc_cpu[: requests + 1].tolist()
        single = 0
        while single < requests and starts[single + 1] - starts[single] == 1:
            single += 1
        first_slabs = common_attn_metadata.block_table_tensor[:requests, 0]
        return Batch(single, list(groups(starts, single, first_slabs.device)), first_slabs)


class SlabBackend(versions.OneMemoryBackend, AttentionBackend):  # type: ignore[misc]
    """Tells vLLM how the memory must lie; the layer itself computes."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        return "SPKV"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        raise NotImplementedError("SelfPrunedAttention computes its attention itself")

    @staticmethod
    def get_builder_cls() -> type[BatchBuilder]:
        return BatchBuilder


class SelfPrunedAttention(nn.Module, AttentionLayerBase):  # type: ignore[misc]
    """Attention over what the layer's slabs hold, in place of the vLLM layer of the same name.

    Attributes:
        config: the SPKVConfig.
        keep: [1, Hkv, n] bool, which pairs of the coming call are kept; set before each.
        cache: of all the worker's layers; the connector sets it once vLLM has allocated the memory.
        index: the layer's place among them; set likewise.
    """

    cache: SlabCache | None = None
    keep: Tensor
    index: int

    def __init__(self, vllm_config: Any, name: str, heads: int, kv_heads: int, head_size: int, scale: float) -> None:
        super().__init__()
        self.config = settings.stored_config(vllm_config)
        self.name, self.num_heads, self.kv_heads = name, heads, kv_heads
        self.head_size, self.scale = head_size, scale
        self.kv_cache = torch.empty(0)
        vllm_config.compilation_config.static_forward_context[name] = self

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [n, H * D], key and value [n, Hkv * D] -> [n, H * D]."""
        out = torch.zeros_like(query)
        batches = get_forward_context().attn_metadata
        if batches is None or self.cache is None:
            # vLLM measures memory: of activations without any batches, of CUDA graphs before there is a cache.
            del out
            return torch.empty(_COPIES, *query.shape, dtype=query.dtype, device=query.device)[0].zero_()
        batch: Batch = batches[self.name]
        if batch.step is None:
            batch.step = self.cache.begin(batch.first_slabs)
        queries, outs = (t.view(-1, self.num_heads, self.head_size) for t in (query, out))
        keys, values = (t.view(-1, self.kv_heads, self.head_size) for t in (key, value))
        keeps = self.keep[0].T  # [n, Hkv]
        n = batch.single
        if n:
            new = [t[:n].unsqueeze(2) for t in (queries, keys, values, keeps)]
            outs[:n] = batch.step.attend(self.index, slice(0, n), *new, scale=self.scale)[:, :, 0]
        for group in batch.others:
            new = [group.side_by_side(t) for t in (queries, keys, values, keeps)]
            attended = batch.step.attend(
                self.index, group.requests, *new, lengths=group.lengths, valid=group.valid, scale=self.scale
            )
            outs[group.tokens] = group.one_after_another(attended)
        if self.index == self.cache.layers - 1:
            batch.step.end()
            batch.step = None
        return out

    def get_attn_backend(self) -> type[AttentionBackend]:
        return SlabBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> SlabSpec:
        scheduler, block_size = vllm_config.scheduler_config, vllm_config.cache_config.block_size
        chunk = scheduler.long_prefill_token_threshold or scheduler.max_num_batched_tokens
        sizes = SlabSizes(
            window=self.config.window,
            page_size=self.config.page_size,
            slab_tokens=block_size,
            density=settings.expected_density(vllm_config),
            chunk=chunk * versions.steps_before_report(vllm_config),
        )
        return SlabSpec(
            block_size=block_size,
            num_kv_heads=self.kv_heads,
            head_size=self.head_size,
            dtype=vllm_config.model_config.dtype,
            sizes=sizes,
        )
