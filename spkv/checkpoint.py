"""Save and load: a whole model as an ordinary Hugging Face directory, or an adapter of a few megabytes.

An adapter directory holds `spkv_config.json` (config, what the base was, what it was trained to), the predictors in
`predictor.safetensors`, and, if the model was trained with LoRA, PEFT's own two files. A whole model is a directory
that transformers reads as usual, with the first two files beside. A static layout stands in the config and has no
predictors. Only safetensors are read or written.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from spkv.config import CONFIG_FILE, FORMAT, PREDICTOR_FILE, SPKVConfig, read_stored
from spkv.fingerprint import check_magnitude, check_sizes, sizes
from spkv.gates import ThresholdGate
from spkv.hf.attach import attach, attachment
from spkv.hf.families import find_decoder
from spkv.hf.packaged import PACKAGED_MODELS

_LORA_FILE = "adapter_config.json"
_DTYPES = ("auto", "float32", "bfloat16", "float16")
SHIPPED_ADAPTERS = Path(__file__).parent / "adapters"


def load(
    model: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    threshold: float | None = None,
) -> PreTrainedModel:
    """Load a self-pruning model, ready for `generate()`.

    Args:
        model: a directory saved by `spkv.save`; or, with `adapter`, the base model (a directory, a hub name, or
            one of `spkv.hf.packaged`: "gemma3-270m", or "smollm2", whose own adapter is taken if none is given).
        adapter: an adapter directory.
        dtype: weights' type, or its name, such as "bfloat16"; None or "auto" takes the checkpoint's own.
        device: where to put it; None leaves it on the CPU.
        threshold: overrides the stored threshold, in (0, 1).

    Returns:
        The attached model in evaluation mode. `spkv.attachment(model)` has its switches.

    Raises:
        FileNotFoundError: if a file of the adapter or model is missing.
        ValueError: if the adapter belongs to another model, or its files do not fit together; if `model` is an
            adapter, or there is no such dtype.
    """
    check_no_adapter(model)
    path = resolve_adapter(model, adapter)
    if path is None and not (Path(model) / CONFIG_FILE).is_file():
        missing = f"{os.fspath(model)!r} holds no {CONFIG_FILE}"
        if _holds_predictors(Path(model)):
            raise FileNotFoundError(
                f"{missing}: the model was saved with save_pretrained; use spkv.save(model, directory)"
            )
        raise FileNotFoundError(
            f"{missing}: it is not a self-pruned model. Pass adapter=DIR (--adapter DIR), or make one with "
            "`spkv adapt`; `spkv eval` compares with a dense model given as --reference"
        )
    base = load_base(model, dtype=dtype)
    loaded = load_adapter(base, path) if path is not None else _attach_stored(base, Path(model))
    if threshold is not None:
        attachment(loaded).threshold = threshold
    if device is not None:
        nn.Module.to(loaded, device)
    return loaded.eval()


def load_base(model: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
    """Load the plain transformers model behind a directory, hub name or packaged model.

    Raises:
        ValueError: if `model` is an adapter, or there is no such dtype.
    """
    if not (dtype is None or isinstance(dtype, torch.dtype) or dtype in _DTYPES):
        raise ValueError(f"dtype must be a torch.dtype or one of {', '.join(_DTYPES)}, not {dtype!r}")
    check_no_adapter(model)
    loaded = AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype=dtype or "auto")
    if model in PACKAGED_MODELS:
        # What PEFT writes into an adapter: the name means the same elsewhere, the directory does not.
        loaded.name_or_path = str(model)
    return loaded


def stored_config(model: str | os.PathLike[str]) -> SPKVConfig | None:
    """The config in a directory that `save` or `save_adapter` wrote; None where there is none."""
    path = Path(model)
    return SPKVConfig.from_dict(read_stored(path)["config"]) if (path / CONFIG_FILE).is_file() else None


def resolve_model(model: str | os.PathLike[str]) -> str:
    """The path or hub name that transformers takes; converts a packaged model on first use."""
    return str(PACKAGED_MODELS[str(model)].directory()) if model in PACKAGED_MODELS else os.fspath(model)


def resolve_adapter(model: str | os.PathLike[str], adapter: str | os.PathLike[str] | None) -> Path | None:
    """The adapter directory to use with `model`: the one given, the one shipped for a packaged model, or None."""
    if adapter is not None:
        if not (Path(adapter) / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{os.fspath(adapter)!r} is no adapter: it holds no {CONFIG_FILE}")
        return Path(adapter)
    if model in PACKAGED_MODELS:
        shipped = SHIPPED_ADAPTERS / str(model)
        if not (shipped / CONFIG_FILE).is_file():
            raise FileNotFoundError(
                f"no adapter for {model!r} ships with this version of spkv; pass one "
                "(adapter=DIR, --adapter DIR), or make it with `spkv adapt`"
            )
        return shipped
    return None


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds an adapter, rather than a whole model."""
    return (Path(path) / CONFIG_FILE).is_file() and read_stored(Path(path))["base"] is not None


def check_no_adapter(model: str | os.PathLike[str]) -> None:
    """Raise a ValueError if an adapter's directory is given as a model."""
    # transformers would load one with LoRA by itself, on whatever the name of its base means here.
    if model not in PACKAGED_MODELS and is_adapter(model):
        raise ValueError(
            f"{os.fspath(model)!r} is an adapter; give the model that it was made for, and this as adapter= (--adapter)"
        )


def save(model: nn.Module, path: str | os.PathLike[str], *, training: dict[str, Any] | None = None) -> None:
    """Save a whole model: an ordinary Hugging Face directory, plus the predictors.

    The tokenizer is not part of it: `tokenizer.save_pretrained(path)` puts it beside, where commands and servers look.

    Args:
        model: an attached model, without LoRA (see `save_adapter`).
        path: directory, made if needed.
        training: what to remember of the training (recipe, densities); any JSON. None repeats what the checkpoint
            remembers that the model was loaded from.

    Raises:
        ValueError: if the model carries LoRA weights.
    """
    found, path = attachment(model), Path(path)
    if hasattr(model, "get_base_model"):
        raise ValueError("the model carries LoRA weights: use spkv.checkpoint.save_adapter, or merge_and_unload first")
    path.mkdir(parents=True, exist_ok=True)
    weights = {k: v for k, v in model.state_dict().items() if ".utility_predictor." not in k}
    pretrained: Any = model
    pretrained.save_pretrained(path, state_dict=weights)
    _save_predictors(model, path, base=None, config=found.config, training=training)


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    training: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Save what adaptation added: predictors, and LoRA weights if the model is wrapped by PEFT.

    Args:
        model: an attached model.
        path: directory, made if needed.
        training: as in `save`.
        dtype: type to store weights in; None keeps theirs.
    """
    found, path = attachment(model), Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "get_base_model"):
        peft: Any = model
        peft.save_pretrained(path, safe_serialization=True)
        (path / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        if dtype is not None:
            weights = load_file(path / "adapter_model.safetensors")
            save_file({k: v.to(dtype) for k, v in weights.items()}, path / "adapter_model.safetensors")
    _save_predictors(model, path, base=fingerprint(model), config=found.config, training=training, dtype=dtype)


def load_adapter(base: PreTrainedModel, path: str | os.PathLike[str]) -> PreTrainedModel:
    """Attach an adapter to its base model; LoRA weights are merged into it.

    Raises:
        ValueError: if the adapter was trained for another model.
    """
    path = Path(path)
    stored = read_stored(path)
    check_fingerprint(base, stored.get("base"), path)
    if (path / _LORA_FILE).is_file():
        from peft import PeftModel

        with warnings.catch_warnings():
            # PEFT asks for an attribute that transformers has renamed; nothing that a user could do about.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            base = PeftModel.from_pretrained(base, path).merge_and_unload()
    return _attach_stored(base, path)


def load_predictors(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Fill an attached model's predictors from a directory's `predictor.safetensors`.

    Raises:
        FileNotFoundError, ValueError: if the file is missing, unreadable, or of other layers or sizes.
    """
    if not attachment(model).layers:
        return  # a static layout
    file = Path(path) / PREDICTOR_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{os.fspath(path)!r} holds no {PREDICTOR_FILE}")
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
    # By names that no wrapper changes.
    parameters = {
        f"layers.{layer}.{name}": parameter
        for layer, predictor in attachment(model).predictors.items()
        for name, parameter in predictor.named_parameters()
    }
    if {k: tuple(v.shape) for k, v in weights.items()} != {k: tuple(v.shape) for k, v in parameters.items()}:
        raise ValueError(
            f"{file} does not fit this model: it holds {_describe(weights)}, the model needs {_describe(parameters)}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Describe a base model so that its adapter can tell it from others: sizes, and statistics of some weights.

    Adapters, predictors and the storage type do not change it.
    """
    decoder = find_decoder(model)
    weights = {
        name.replace(".base_layer", ""): parameter
        for name, parameter in decoder.module.named_parameters()
        if parameter.dim() == 2 and "lora_" not in name and ".utility_predictor." not in name
    }
    chosen = sorted(weights)[:: max(1, len(weights) // 8)]
    return {
        **sizes(decoder.config),
        "mean_magnitudes": {name: weights[name].detach().float().abs().mean().item() for name in chosen},
    }


def check_fingerprint(model: nn.Module, expected: dict[str, Any] | None, path: Path) -> None:
    """Raise a ValueError that names the differences if `model` is not the base that `expected` describes."""
    check_sizes(expected, find_decoder(model).config, path)
    assert expected is not None
    actual = fingerprint(model)["mean_magnitudes"]
    for name in expected["mean_magnitudes"]:
        check_magnitude(expected, name, actual.get(name), path)


def _holds_predictors(path: Path) -> bool:
    """Whether transformers saved an attached model in a directory, as the names of its weights tell."""
    for file in path.glob("*.safetensors"):
        with contextlib.suppress(SafetensorError), safe_open(file, "pt") as weights:
            if any(".utility_predictor." in name for name in weights.keys()):  # noqa: SIM118  (no mapping)
                return True
    return False


def _attach_stored(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    stored = read_stored(path)
    attach(model, SPKVConfig.from_dict(stored["config"]))
    attachment(model).training = stored["training"]
    load_predictors(model, path)
    return model


def _save_predictors(
    model: nn.Module,
    path: Path,
    *,
    base: dict[str, Any] | None,
    config: SPKVConfig,
    training: dict[str, Any] | None,
    dtype: torch.dtype | None = None,
) -> None:
    weights = {
        f"layers.{layer}.{name}": value.to("cpu", dtype or value.dtype).contiguous()
        for layer, predictor in attachment(model).predictors.items()
        for name, value in predictor.plain_parameters().items()
    }
    if weights:
        save_file(weights, path / PREDICTOR_FILE, metadata={"format": "pt"})
    found = attachment(model)
    if training is None:
        training = dict(found.training)
        if found.threshold != config.threshold:  # at which they were measured
            for name in ("density", "densities"):
                training.pop(name, None)
    if isinstance(found.gate, ThresholdGate):  # it may have been moved since
        config = config.replace(threshold=found.gate.threshold)
    stored = {"format": FORMAT, "config": config.to_dict(), "base": base, "training": training}
    (path / CONFIG_FILE).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def _describe(tensors: Mapping[str, Tensor]) -> str:
    shapes = sorted({f"{k.split('.', 2)[2]} {list(v.shape)}" for k, v in tensors.items()})
    return f"layers {sorted({int(k.split('.')[1]) for k in tensors})} with {', '.join(shapes)}"
