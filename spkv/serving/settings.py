"""Setting vLLM up for a self-pruned model, and saying what cannot be had with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from spkv.config import CONFIG_FILE, SPKVConfig, read_stored

# What is off, how to tell that it was asked for, and what to do.
_REFUSED: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
    ("speculative decoding", lambda c: c.speculative_config, "drop --speculative-config"),
    (
        "context parallelism",
        lambda c: (
            c.parallel_config.decode_context_parallel_size > 1 or c.parallel_config.prefill_context_parallel_size > 1
        ),
        "leave context parallel sizes at 1",
    ),
    (
        "disaggregated prefill and other KV transfer",
        lambda c: c.kv_transfer_config and c.kv_transfer_config.kv_connector,
        "drop --kv-transfer-config",
    ),
    ("KV offloading", lambda c: c.cache_config.kv_offloading_size, "drop --kv-offloading-size"),
    ("a quantised KV cache", lambda c: c.cache_config.cache_dtype != "auto", "drop --kv-cache-dtype"),
    ("LoRA", lambda c: c.lora_config, "merge the adapter into the model"),
)
_DENSITY = "spkv_density"


class Settings:
    """vLLM calls these when it has put together the configuration of one of our models."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing to change."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Set up what a self-pruned model needs.

        Raises:
            ValueError: if the model, or a feature that was asked for, is not supported.
        """
        from spkv.serving import versions

        versions.check_version()
        model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
        stored = _read(model_config)
        check_features(vllm_config)
        versions.check_runner(vllm_config)
        config = check_model(stored, model_config.hf_config)
        model_config.hf_config.spkv = stored  # it travels to all processes
        vllm_config.kv_transfer_config = versions.connector_config()
        # On by default, and nobody's explicit wish can be told from that.
        cache_config.enable_prefix_caching = False
        if not cache_config.user_specified_block_size:
            cache_config.block_size, cache_config.user_specified_block_size = config.page_size, True
        versions.choose_execution(vllm_config)


class BaseSettings:
    """As `Settings`, called for every model of a family: a directory that says it is self-pruned is served as such."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing to change."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        from spkv.serving import versions

        # On the hub this would be one more request for every model; there the architecture must be named.
        if (Path(vllm_config.model_config.model) / CONFIG_FILE).is_file():
            model_config = vllm_config.model_config
            model_config.hf_config.architectures = [versions.ARCHITECTURES[model_config.architecture]]
            Settings.verify_and_update_config(vllm_config)


def check_features(vllm_config: Any) -> None:
    """Raise a ValueError that names every feature asked for that self-pruned models lack, and what to do."""
    refused = [f"{name} ({advice})" for name, asked, advice in _REFUSED if asked(vllm_config)]
    if refused:
        raise ValueError(f"self-pruned models are served without: {', '.join(refused)}")


def check_model(stored: dict[str, Any], hf_config: Any) -> SPKVConfig:
    """Return the config of a model that can be served, else raise a ValueError."""
    if stored["base"] is not None:
        raise ValueError(
            "this directory holds an adapter; make a whole model of it first: "
            "spkv.save(spkv.load(BASE, adapter=DIR), OUTPUT)"
        )
    config = SPKVConfig.from_dict(stored["config"])
    if config.page_dtype is not None:
        raise ValueError(f"page_dtype is {config.page_dtype!r}; only pages that are not coded can be served yet")
    if config.layout is not None:
        raise ValueError("models with a static layout cannot be served yet")
    if any(kind != "full_attention" for kind in getattr(hf_config, "layer_types", None) or ()):
        raise ValueError("models with sliding-window layers cannot be served yet")
    if getattr(hf_config, "dual_chunk_attention_config", None):
        raise ValueError("models with dual-chunk attention cannot be served")
    return config


def stored_config(vllm_config: Any) -> SPKVConfig:
    """The config that the model was saved with."""
    return SPKVConfig.from_dict(vllm_config.model_config.hf_config.spkv["config"])


def expected_density(vllm_config: Any) -> float:
    """The density that requests are admitted by: as said, else as measured in training, else 1."""
    said = vllm_config.additional_config
    density = said.get(_DENSITY) if isinstance(said, dict) else None
    if density is None:
        density = vllm_config.model_config.hf_config.spkv["training"].get("density")
    density = 1.0 if density is None else float(density)
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"{_DENSITY} must lie in [0, 1], not {density!r}")
    return density


def model_file(model_config: Any, name: str) -> Path:
    """A file of the model, which is a directory or on the hub.

    Raises:
        FileNotFoundError: if it does not have it.
    """
    try:
        found: Any = cached_file(model_config.model, name, revision=model_config.revision)
    except OSError as error:
        raise FileNotFoundError(f"{model_config.model!r} holds no {name}: it is no self-pruned model") from error
    return Path(found)


def _read(model_config: Any) -> dict[str, Any]:
    return read_stored(model_file(model_config, CONFIG_FILE))
