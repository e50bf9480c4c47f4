"""From a command's options to the model that it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")


def tokenizer_and_config(model: str) -> tuple[Any, Any]:
    """Load what is needed to check a text before the weights are."""
    from transformers import AutoConfig, AutoTokenizer

    from spkv.checkpoint import check_no_adapter, resolve_model

    check_no_adapter(model)
    path = resolve_model(model)
    looks_like_path = path.startswith((".", "/")) or path.count("/") > 1 or path.endswith("/")
    if looks_like_path and not Path(path).is_dir():
        raise FileNotFoundError(f"no such model directory: {path}")
    try:
        return AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
    except OSError as error:
        if Path(path).is_dir():
            raise
        # Without a network, transformers' own words leave the name out.
        raise OSError(f"cannot find or download the model {model!r}: {error}") from error


@contextlib.contextmanager
def opened(
    model: str,
    adapter: Path | None,
    device: str | None,
    dtype: str | None,
    threshold: float | None = None,
    dense: bool = False,
    page_dtype: str | None = None,
) -> Iterator[PreTrainedModel]:
    """The model to run; inside this context it is dense if asked for."""
    import spkv
    from spkv.checkpoint import load_base
    from spkv.config import CONFIG_FILE

    place, kind = place_and_kind(device, dtype)
    if dense and adapter is None and not (Path(model) / CONFIG_FILE).is_file():
        yield load_base(model, dtype=kind).to(place).eval()  # type: ignore[arg-type]
        return
    loaded = spkv.load(model, adapter=adapter, dtype=kind, device=place, threshold=threshold)
    if page_dtype is not None:
        spkv.attachment(loaded).page_dtype = page_dtype
    with spkv.dense(loaded) if dense else contextlib.nullcontext():
        yield loaded


def loader(
    bases: Sequence[str], device: str | None, dtype: str | None, page_dtype: str | None = None
) -> Callable[[str], PreTrainedModel]:
    """A function that loads another model from a path: an adapter, a self-pruned model, or a plain one.

    `bases` are models that an adapter may belong to.
    """

    def load(path: str) -> PreTrainedModel:
        import spkv
        from spkv.checkpoint import is_adapter, load_base
        from spkv.config import CONFIG_FILE

        place, kind = place_and_kind(device, dtype)
        if not (Path(path) / CONFIG_FILE).is_file():
            return load_base(path, dtype=kind).to(place).eval()  # type: ignore[arg-type]
        if is_adapter(path):
            loaded = _on_its_base(path, bases, kind).to(place)  # type: ignore[arg-type]
        else:
            loaded = spkv.load(path, dtype=kind, device=place)
        spkv.attachment(loaded).page_dtype = page_dtype or spkv.attachment(loaded).page_dtype
        return loaded

    return load


def _on_its_base(adapter: str, bases: Sequence[str], dtype: torch.dtype | None) -> PreTrainedModel:
    """Load an adapter on that of several models, alike perhaps, which it was trained on."""
    from spkv.checkpoint import fingerprint, is_adapter, load_adapter, load_base
    from spkv.config import read_stored
    from spkv.fingerprint import deviation

    expected = read_stored(Path(adapter))["base"]
    models = [load_base(base, dtype=dtype) for base in bases if not is_adapter(base)]  # type: ignore[arg-type]
    closest = min(models, key=lambda model: deviation(expected, fingerprint(model)))
    return load_adapter(closest, adapter).eval()


def place_and_kind(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype | None]:
    """Where to run and in which dtype; None is the checkpoint's. Without a choice it is float32 on a CPU."""
    place = device_called(device)
    # One without instructions for bfloat16 took five times as long in it.
    return place, dtype_called("float32" if dtype is None and place.type == "cpu" else dtype)


def device_called(name: str | None) -> torch.device:
    """The device to use: the one called `name`, or a GPU if there is one."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; give one such as cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def dtype_called(name: str | None) -> torch.dtype | None:
    """The dtype called `name`, or None for the checkpoint's own."""
    import torch

    if name is not None and name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; known are {', '.join(DTYPES)}")
    return None if name is None else getattr(torch, name)
