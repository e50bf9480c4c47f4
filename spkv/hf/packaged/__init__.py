"""Small real models that a package registry can deliver: to try things out and to test, without a model hub.

To add one, write a module with a `PackagedModel` and add a row here.
"""

from __future__ import annotations

from spkv.hf.packaged.gemma3 import GEMMA3_270M
from spkv.hf.packaged.package import PackagedModel
from spkv.hf.packaged.smollm2 import SMOLLM2

PACKAGED_MODELS: dict[str, PackagedModel] = {
    "gemma3-270m": GEMMA3_270M,
    "smollm2": SMOLLM2,
}
