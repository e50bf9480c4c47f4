"""vLLM's manager of the blocks of our layers: it hands them out as slabs and takes back what was not used."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from spkv.serving.ledger import Ledger, SlabSizes


@dataclass(frozen=True, kw_only=True)
class SlabSpec(FullAttentionSpec):  # type: ignore[misc]
    """A layer's share of the slabs: as large as dense blocks, and expected to be needed less often."""

    sizes: SlabSizes

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """What the longest request is expected to take; vLLM checks that it fits, and reports concurrency by it."""
        return self.sizes.expected(vllm_config.model_config.max_model_len) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Most slabs that a request holds; a window that is no whole number of pages makes it one more than dense."""
        return self.sizes.most(max_len)

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @classmethod
    def merge(cls, specs: list[SlabSpec]) -> SlabSpec:
        assert all(spec == specs[0] for spec in specs)
        return specs[0]


# By the id of the pool, which a manager keeps alive.
_OF_POOL: weakref.WeakValueDictionary[int, SlabManager] = weakref.WeakValueDictionary()


class SlabManager(SingleTypeKVCacheManager):  # type: ignore[misc]
    """Keeps the ledger, and the blocks that go with it.

    A request's blocks are told to vLLM's own tables once, when it starts; there only the first matters, by which
    attention knows the request. The worker learns of slabs from the connector.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ledger = Ledger(self.kv_cache_spec.sizes)
        assert id(self.block_pool) not in _OF_POOL, "one manager holds all layers' slabs"
        _OF_POOL[id(self.block_pool)] = self

    @staticmethod
    def of(block_pool: Any) -> SlabManager:
        """The manager of a pool's blocks."""
        return _OF_POOL[id(block_pool)]

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, apply_admission_cap: bool = False, **kwargs: Any
    ) -> int:
        if apply_admission_cap:  # will the whole request fit?
            return self.ledger.missing_expected(request_id, num_tokens)
        return self.ledger.missing(request_id, num_tokens)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        held = self.req_to_blocks[request_id]
        starts = not held
        new = self.block_pool.get_new_blocks(self.ledger.missing(request_id, num_tokens))
        held.extend(new)
        self.ledger.grant(request_id, num_tokens, [block.block_id for block in new])
        return new if starts else []

    def report(self, step: int, used: dict[str, int]) -> None:
        """A step has run: free what its requests do not need."""
        for request_id, count in self.ledger.report(step, used).items():
            blocks = self.req_to_blocks[request_id]
            self.block_pool.free_blocks(reversed(blocks[-count:]))
            del blocks[-count:]

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.ledger.release(request_id)
        return super().pop_blocks_for_free(request_id)

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """No block holds a prefix."""

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        """No block belongs to a position."""

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: Sequence[int], *args: Any, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        return tuple([] for _ in kv_cache_group_ids), 0
