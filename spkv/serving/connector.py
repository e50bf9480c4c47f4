"""What travels between scheduler and workers: slabs granted before a step, slabs used after it. No pairs do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from spkv.serving import versions
from spkv.serving.attention import SelfPrunedAttention
from spkv.serving.ledger import Orders
from spkv.serving.manager import SlabManager
from spkv.serving.metrics import SlabMetrics, SlabStats
from spkv.serving.slabs import SlabCache, UseReader


@dataclass
class StepOrders(KVConnectorMetadata):  # type: ignore[misc]
    """To the workers."""

    orders: Orders


@dataclass
class StepReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """From the workers: slabs in use after a step."""

    step: int
    used: dict[str, int]

    def aggregate(self, other: StepReport) -> StepReport:
        """Workers hold different heads or layers, and so differ; a slab is free when none of them uses it."""
        assert self.step == other.step
        return StepReport(self.step, {name: max(slabs, other.used[name]) for name, slabs in self.used.items()})


class SPKVConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """vLLM makes one for its scheduler and one for each worker."""

    cache: SlabCache  # a worker's
    uses: UseReader  # a worker's
    manager: SlabManager  # the scheduler's

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        """Up to vLLM 0.28: whether all layers shall lie in one piece of memory."""
        return True

    def register_cross_layers_kv_cache(self, kv_cache: Tensor, attn_backend: Any) -> None:
        """Up to vLLM 0.28, in place of `register_kv_caches`."""
        self._put_cache_into(kv_cache.view(-1))

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """vLLM has allocated the memory."""
        self._put_cache_into(versions.memory(kv_caches))

    def _put_cache_into(self, memory: Tensor) -> None:
        """Put our cache into the memory of all layers, and show it to them."""
        layers = list(get_layers_from_vllm_config(self._vllm_config, SelfPrunedAttention).values())
        config, kv_heads, head_size = layers[0].config, layers[0].kv_heads, layers[0].head_size
        self.cache = SlabCache(
            memory.view(-1, 2, config.page_size, head_size),
            len(layers),
            kv_heads,
            config.window,
            self._vllm_config.cache_config.block_size,
            self._vllm_config.scheduler_config.max_num_seqs,
            self._vllm_config.model_config.max_model_len,
        )
        self.uses = UseReader(self.cache, versions.reports_come_late())
        for index, layer in enumerate(layers):
            layer.cache, layer.index = self.cache, index

    def bind_connector_metadata(self, connector_metadata: StepOrders) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.cache.apply(connector_metadata.orders)

    def build_connector_worker_meta(self) -> StepReport | None:
        report = self.uses.after(self._connector_metadata.orders)
        return None if report is None else StepReport(*report)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self.manager = SlabManager.of(gpu_block_pool)

    def build_connector_meta(self, scheduler_output: Any) -> StepOrders:
        return StepOrders(self.manager.ledger.orders())

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        if report is not None:
            self.manager.report(report.step, report.used)

    def get_kv_connector_stats(self) -> SlabStats | None:
        """The scheduler asks after each step; workers, whose share this is not, too."""
        return SlabStats(self.manager.ledger.totals()) if hasattr(self, "manager") else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> SlabStats:
        return SlabStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> SlabMetrics:
        return SlabMetrics(*args)

    # The rest of the interface is about pairs that come and go.

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None: ...

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None: ...

    def request_finished_all_groups(self, request: Any, block_ids: Iterable[list[int]]) -> tuple[bool, None]:
        return False, None
