"""What vLLM's log and its `/metrics` say of slabs, beside what vLLM says of blocks."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

# What `Ledger.totals` counts, and the words for it.
_GAUGES = {
    "slabs_held": "Slabs that requests hold.",
    "slabs_used": "Slabs of requests that have a page in use, as last reported.",
    "slabs_dense": "Slabs that a dense cache would hold for the same tokens.",
}
_COUNTERS = {"slabs_returned": "Slabs that requests gave back while they ran."}


class SlabStats(KVConnectorStats):  # type: ignore[misc]
    """The latest totals of the ledger."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: SlabStats) -> SlabStats:
        """What comes later replaces what came before: these are totals."""
        return SlabStats({**self.data, **other.data})

    def reduce(self) -> dict[str, int | float]:
        """What vLLM logs now and then."""
        return dict(self.data)

    def is_empty(self) -> bool:
        return not self.data


class SlabMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Each of the totals, for each engine, on the server's `/metrics`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._metrics: dict[str, dict[int, Any]] = {}  # name -> engine -> metric
        self._counted: dict[tuple[str, int], int] = {}
        for name, words in _GAUGES.items():
            gauge = self._gauge_cls(f"vllm:spkv_{name}", words, self._labelnames, multiprocess_mode="mostrecent")
            self._enter(name, gauge)
        for name, words in _COUNTERS.items():
            self._enter(name, self._counter_cls(f"vllm:spkv_{name}", words, self._labelnames))

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            metric = self._metrics[name][engine_idx]
            if name in _GAUGES:
                metric.set(value)
            else:
                metric.inc(value - self._counted.get((name, engine_idx), 0))
                self._counted[name, engine_idx] = value

    def _enter(self, name: str, metric: Any) -> None:
        labels = self.per_engine_labelvalues.items()
        self._metrics[name] = {engine: metric.labels(*values) for engine, values in labels}
