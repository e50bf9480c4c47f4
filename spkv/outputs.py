"""Directories that a model is written to."""

from __future__ import annotations

import os
from pathlib import Path

from spkv.config import CONFIG_FILE


def check_holds_no_model(directory: str | os.PathLike[str]) -> None:
    """Raise a FileExistsError if writing a model to a directory would replace one, such as that which is read."""
    folder = Path(directory)
    found = [name for name in ("config.json", CONFIG_FILE, "adapter_config.json") if (folder / name).exists()]
    found += sorted(path.name for path in folder.glob("*.safetensors"))
    if found:
        raise FileExistsError(f"{folder} holds a model already ({', '.join(found[:3])}); choose another output")
