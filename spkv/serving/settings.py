"""Setting vLLM up for a self-pruned model, and saying what cannot be had with one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from spkv.config import CONFIG_FILE, SPKVConfig, check_threshold, read_stored
from spkv.fingerprint import check_sizes

logger = logging.getLogger("vllm.spkv")  # vLLM sets up the loggers below its own

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
    (
        "vLLM's own LoRA",
        lambda c: c.lora_config,
        'drop --enable-lora; an adapter by `spkv adapt` is named with --hf-overrides \'{"spkv_adapter": "DIR"}\'',
    ),
)
# Of --additional-config, and of --hf-overrides.
_DENSITY, _THRESHOLD = "spkv_density", "spkv_threshold"
_ADAPTER = "spkv_adapter"
_LOAD_FORMATS = ("auto", "hf", "safetensors", "pt", "dummy")


class _Hooks:
    """What vLLM calls when it has put together a configuration; all is done in `verify_and_update_config`."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing to change."""


class Settings(_Hooks):
    """Called for our own models."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Set up what a self-pruned model needs.

        Raises:
            ValueError: if the model, or a feature that was asked for, is not supported.
        """
        from spkv.serving import versions

        versions.check_version()
        model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
        options = read_options(vllm_config)
        stored = read_stored(model_file(model_config, CONFIG_FILE))
        check_features(vllm_config)
        versions.check_runner(vllm_config)
        adapter = adapter_directory(model_config)
        if adapter is not None:
            check_base(vllm_config)
            setattr(model_config.hf_config, _ADAPTER, str(adapter))
        config = check_model(stored, model_config.hf_config, adapter)
        stored = with_options(stored, options)
        model_config.hf_config.spkv = stored  # it travels to all processes
        vllm_config.kv_transfer_config = versions.connector_config()
        # On by default, and nobody's explicit wish can be told from that.
        if cache_config.enable_prefix_caching:
            logger.info("Prefix caching is off: self-pruned models are served without it.")
            cache_config.enable_prefix_caching = False
        if not cache_config.user_specified_block_size:
            cache_config.block_size, cache_config.user_specified_block_size = config.page_size, True
        versions.choose_execution(vllm_config)


class BaseSettings(_Hooks):
    """As `Settings`, called for every model of a family, and does so if it is self-pruned or an adapter is named."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        from spkv.serving import versions

        model_config = vllm_config.model_config
        if _is_self_pruned(model_config):
            model_config.hf_config.architectures = [versions.ARCHITECTURES[model_config.architecture]]
            Settings.verify_and_update_config(vllm_config)
        elif options := read_options(vllm_config):
            raise ValueError(f"{', '.join(options)} given, but {model_config.model!r} is no self-pruned model")


class OtherSettings(_Hooks):
    """Called for other models, but for those with settings of their own; refuses what would have no effect."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        from spkv.serving import versions

        model_config = vllm_config.model_config
        if _is_self_pruned(model_config) or read_options(vllm_config):
            served = ", ".join(versions.ARCHITECTURES)
            raise ValueError(
                f"self-pruned models of {model_config.architecture} cannot be served; those of {served} can"
            )


def _is_self_pruned(model_config: Any) -> bool:
    # Of a model on the hub it would be one more request for every one; there the architecture must be named.
    named = adapter_directory(model_config) is not None
    return named or (Path(model_config.model) / CONFIG_FILE).is_file()


def check_features(vllm_config: Any) -> None:
    """Raise a ValueError that names every feature asked for that self-pruned models lack, and what to do."""
    refused = [f"{name} ({advice})" for name, asked, advice in _REFUSED if asked(vllm_config)]
    if refused:
        raise ValueError(f"self-pruned models are served without: {', '.join(refused)}")


def check_model(stored: dict[str, Any], hf_config: Any, adapter: Path | None = None) -> SPKVConfig:
    """Return the config of a model that can be served, else raise a ValueError."""
    if adapter is not None:
        check_sizes(stored["base"], hf_config, adapter)
    elif stored["base"] is not None:
        raise ValueError(
            "this directory holds an adapter: serve the model that it was trained on, with "
            f'--hf-overrides \'{{"{_ADAPTER}": "DIR"}}\''
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
    """The config that the model was saved with, or what was said in its place."""
    return SPKVConfig.from_dict(vllm_config.model_config.hf_config.spkv["config"])


def adapter_directory(model_config: Any) -> Path | None:
    """The adapter that was named, if any.

    Raises:
        FileNotFoundError: if it is none.
    """
    said = getattr(model_config.hf_config, _ADAPTER, None)
    if said is None:
        return None
    if not (Path(said) / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{_ADAPTER} {said!r} is no adapter: it holds no {CONFIG_FILE}")
    return Path(said).absolute()


def read_options(vllm_config: Any) -> dict[str, Any]:
    """The options in vLLM's `additional_config` that are ours.

    Raises:
        ValueError: for one that does not exist, there or in `hf_overrides`.
    """
    said = vllm_config.additional_config
    options = {name: said[name] for name in said if name.startswith("spkv_")} if isinstance(said, dict) else {}
    overrides = [
        name for name in getattr(vllm_config.model_config.hf_config, "__dict__", {}) if name.startswith("spkv_")
    ]
    unknown = sorted(({*options} - {_DENSITY, _THRESHOLD}) | ({*overrides} - {_ADAPTER}))
    if unknown:
        raise ValueError(
            f"no such options there: {', '.join(unknown)}; "
            f"there are {_DENSITY} and {_THRESHOLD} in --additional-config, and {_ADAPTER} in --hf-overrides"
        )
    return options


def with_options(stored: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself, with options in force.

    The density measured in training belongs to the threshold that it was measured at.

    Raises:
        ValueError: for a value that is not allowed.
    """
    config, training = dict(stored["config"]), dict(stored["training"] or {})
    threshold, density = options.get(_THRESHOLD), options.get(_DENSITY)
    if threshold is not None:
        try:
            check_threshold(threshold)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{_THRESHOLD}: {error}") from error
        if threshold != config["threshold"]:
            config["threshold"] = threshold
            training.pop("density", None)
    if density is not None:
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0.0 <= density <= 1.0:
            raise ValueError(f"{_DENSITY} must lie in [0, 1], not {density!r}")
        training["density"] = density
    if training.get("density") is None:
        logger.warning(
            "No density is known at threshold %s: requests are admitted as if they kept every pair. Say %s.",
            config["threshold"],
            _DENSITY,
        )
    return {**stored, "config": config, "training": training}


def check_base(vllm_config: Any) -> None:
    """Have vLLM read the base of an adapter as transformers names its weights, or raise a ValueError."""
    model_config, load_config = vllm_config.model_config, vllm_config.load_config
    if model_config.quantization is not None:
        raise ValueError(
            f"an adapter cannot be merged into weights quantised by {model_config.quantization}; "
            "name the model that it was trained on"
        )
    if model_config.hf_config.model_type == "transformer":  # as vLLM calls what Mistral's own files describe
        raise ValueError("an adapter needs the model's config as transformers writes it: add --config-format hf")
    if load_config.load_format not in _LOAD_FORMATS:
        raise ValueError(
            f"an adapter is merged into weights as they are loaded, which --load-format {load_config.load_format} "
            f"does not show; those that do are {', '.join(_LOAD_FORMATS)}"
        )
    if load_config.load_format == "auto":  # which prefers Mistral's own names, where there are such files
        load_config.load_format = "hf"


def expected_density(vllm_config: Any) -> float:
    """The density that requests are admitted by: as said, else as measured in training, else 1."""
    density = vllm_config.model_config.hf_config.spkv["training"].get("density")
    return 1.0 if density is None else float(density)


def model_file(model_config: Any, name: str) -> Path:
    """A file of the adapter that was named, or else of the model, which is a directory or on the hub.

    Raises:
        FileNotFoundError: if it does not have it.
    """
    if (adapter := adapter_directory(model_config)) is not None:
        return adapter / name
    try:
        found: Any = cached_file(model_config.model, name, revision=model_config.revision)
    except OSError as error:
        raise FileNotFoundError(f"{model_config.model!r} holds no {name}: it is no self-pruned model") from error
    return Path(found)
