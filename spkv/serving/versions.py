"""What differs between versions of vLLM, or may: the rest of this package takes these names from here.

vLLM promises none of them but the entry point and `ModelRegistry`, so only versions that were tested are served.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor

try:
    import vllm
    from vllm import ModelRegistry
except ModuleNotFoundError as error:
    if error.name != "vllm":
        raise
    raise ModuleNotFoundError("serving needs vLLM: pip install 'spkv[vllm]'", name="vllm") from error

# By a model's own name in `config.json`: the name that selects our class for it.
ARCHITECTURES = {
    f"{family}ForCausalLM": f"SPKV{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
}
CONNECTOR = "SPKVConnector"
_TESTED = ("0.26", "0.32")


def check_version(version: str | None = None) -> None:
    """Raise an ImportError for a vLLM that this version of spkv was not tested with."""
    version = vllm.__version__ if version is None else version
    if not any(version.startswith(tested + ".") for tested in _TESTED):
        raise ImportError(
            f"spkv serves through vLLM {' and '.join(_TESTED)}, and this is {version}: vLLM's interfaces for caches "
            "change from version to version. pip install 'spkv[vllm]' takes one that fits"
        )


def register() -> None:
    """Enter our parts in vLLM's registries; calling it again changes nothing.

    With a version that was not tested only what refuses our models is entered; others are not affected.
    """
    from spkv.serving import settings

    for ours in ARCHITECTURES.values():
        ModelRegistry.register_model(ours, f"spkv.serving.model:{ours}")
    with contextlib.suppress(ImportError):
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        for base, ours in ARCHITECTURES.items():
            MODELS_CONFIG_MAP[ours] = settings.Settings
            MODELS_CONFIG_MAP.setdefault(base, settings.BaseSettings)
    try:
        check_version()
    except ImportError:
        return
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for other in ModelRegistry.get_supported_archs():
        MODELS_CONFIG_MAP.setdefault(other, settings.OtherSettings)
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from spkv.serving.manager import SlabManager, SlabSpec

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "spkv.serving.connector", CONNECTOR)
    KVCacheSpecRegistry._ensure_registered()  # a registry that holds anything is taken to be complete
    KVCacheSpecRegistry.register(SlabSpec, SlabManager, uniform_type_base_spec=SlabSpec)


def connector_config() -> Any:
    """The KV transfer config that puts our connector between scheduler and workers; it transfers no pairs."""
    from vllm.config import KVTransferConfig

    return KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_both")


def choose_execution(vllm_config: Any) -> None:
    """Compile nothing; on a GPU, replay steps of single tokens from CUDA graphs of the model, unless told not to."""
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.platforms import current_platform

    compilation = vllm_config.compilation_config
    # vLLM's compiler would cut the model at attention layers of its own.
    compilation.mode = CompilationMode.NONE
    if not current_platform.support_static_graph_mode():
        vllm_config.model_config.enforce_eager = True
    elif compilation.cudagraph_mode != CUDAGraphMode.NONE and vllm_config.optimization_level > 0:
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY


def device_type() -> str:
    """What a worker computes on, as torch calls it."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def reports_come_late() -> bool:
    """Whether the slabs used in a step are known a step later (see `slabs.UseReader`)."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def steps_before_report(vllm_config: Any) -> int:
    """Steps that may have been scheduled, at most, before it is known what the first of them used."""
    return int(vllm_config.max_concurrent_batches) + reports_come_late()


class OneMemoryBackend:
    """A backend for which all layers lie in one piece of memory, block by block."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        """From 0.30 on."""
        from vllm.v1.kv_cache_layout import KVCacheLayout

        return (KVCacheLayout.BLHNC,)

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """Up to 0.28, of a layer."""
        return num_blocks, 2, block_size, num_kv_heads, head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Up to 0.28: blocks outside of layers."""
        return (1, 0, 2, 3, 4, 5) if include_num_layers_dimension else (0, 1, 2, 3, 4)


def check_runner(vllm_config: Any) -> None:
    """Raise a ValueError where vLLM would give each layer memory of its own, and it is known how to avoid that."""
    if vllm.__version__.startswith("0.26.") and vllm_config.use_v2_model_runner:
        raise ValueError(
            "vLLM 0.26 serves self-pruned models with its first model runner only: set VLLM_USE_V2_MODEL_RUNNER=0"
        )


def memory(kv_caches: dict[str, Tensor]) -> Tensor:
    """The one piece of memory behind the caches of all layers, flat, of their dtype."""
    caches = list(kv_caches.values())
    first = caches[0]
    blocks, block_size = first.shape[0], first[0].numel() * len(caches)
    storage = first.untyped_storage()
    if any(cache.untyped_storage().data_ptr() != storage.data_ptr() for cache in caches) or (
        blocks > 1 and first.stride(0) != block_size
    ):
        raise RuntimeError("vLLM did not lay the KV cache out block by block for all layers, as it was asked to")
    return first.new_empty(0).set_(storage)[: blocks * block_size]  # type: ignore[call-overload]
