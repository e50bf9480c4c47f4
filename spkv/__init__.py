"""spkv: a KV cache that prunes itself, for any Hugging Face causal language model.

Importing this module changes nothing and loads nothing heavy; names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spkv.checkpoint import load as load
    from spkv.checkpoint import save as save
    from spkv.config import SPKVConfig as SPKVConfig
    from spkv.hf.attach import attach as attach
    from spkv.hf.attach import attachment as attachment
    from spkv.hf.attach import dense as dense
    from spkv.hf.attach import detach as detach
    from spkv.hf.cache import SPKVCache as SPKVCache

__version__ = "0.1.0"

_HOME = {
    "SPKVCache": "spkv.hf.cache",
    "SPKVConfig": "spkv.config",
    "attach": "spkv.hf.attach",
    "attachment": "spkv.hf.attach",
    "dense": "spkv.hf.attach",
    "detach": "spkv.hf.attach",
    "load": "spkv.checkpoint",
    "save": "spkv.checkpoint",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spkv' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
