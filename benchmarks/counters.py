"""Runs each training and prefill kernel once between the profiler's start and stop, for Nsight Compute.

    ncu --profile-from-start off --clock-control none -k regex:"_forward|_backward|_attend|cudnn" \\
        --section SpeedOfLight --section ComputeWorkloadAnalysis --section WarpStateStats --section Occupancy \\
        --section MemoryWorkloadAnalysis --section SchedulerStats --csv --page raw --log-file ncu.csv \\
        python -m benchmarks.counters
    python -m benchmarks.counters --read ncu.csv > benchmarks/results/counters.json
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spkv.ops.attention import gated_attention, pruned_prefill

_WINDOW = 128
_COUNTERS = {
    "microseconds": ("gpu__time_duration.sum", 1e-3),
    "tensor_core_percent": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed", 1),
    "exp2_percent": ("sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_elapsed", 1),
    "alu_percent": ("sm__pipe_alu_cycles_active.avg.pct_of_peak_sustained_elapsed", 1),
    "fma_percent": ("sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_elapsed", 1),
    "issue_slots_percent": ("sm__issue_active.avg.pct_of_peak_sustained_elapsed", 1),
    "l2_percent": ("lts__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "dram_percent": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "warps_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1),
    "registers": ("launch__registers_per_thread", 1),
    "spilling_instructions": ("sass__inst_executed_register_spilling", 1),
}
_STALL = "smsp__average_warps_issue_stalled_"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", type=Path, metavar="CSV", help="print what ncu wrote, as JSON, instead of running")
    options = parser.parse_args()
    if options.read is not None:
        print(json.dumps(read(options.read), indent=2))
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks.counters needs a CUDA device, and torch finds none here.")
    _run_all()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    _run_all()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def read(path: Path) -> list[dict[str, Any]]:
    """A row a kernel: the counters that tell what bounds it, and the stalls that cost a warp the most cycles."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("==")]
    rows = []
    for entry in list(csv.DictReader(lines))[1:]:  # the first holds the units
        row: dict[str, Any] = {"kernel": entry["Kernel Name"], "grid": entry["Grid Size"], "block": entry["Block Size"]}
        row |= {name: _number(entry[column]) * factor for name, (column, factor) in _COUNTERS.items()}
        stalls = {
            column.removeprefix(_STALL).partition("_per_")[0]: _number(value)
            for column, value in entry.items()
            if column.startswith(_STALL) and "selected" not in column
        }
        row["stalled_warps_by_issue"] = dict(sorted(stalls.items(), key=lambda item: -item[1])[:4])
        rows.append(row)
    return rows


def _number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:  # "no data"
        return 0.0


def _run_all() -> None:
    for shape in ((1, 32, 8, 8192, 128), (8, 9, 3, 4096, 64)):
        _train(shape, lambda q, k, v: gated_attention(q, k, v, _gate(k), window=_WINDOW))
    for shape in ((1, 32, 8, 8192, 128), (8, 9, 3, 4096, 64)):
        _train(shape, _cudnn)
    for density in (1.0, 0.25):
        query, key, value = _inputs((1, 32, 8, 16_384, 128))
        keep = torch.rand(key.shape[:3], device="cuda") < density
        with torch.no_grad():
            pruned_prefill(query, key, value, keep, window=_WINDOW)


def _inputs(shape: tuple[int, ...]) -> list[Tensor]:
    B, H, Hkv, T, D = shape
    return [torch.randn(B, heads, T, D, device="cuda", dtype=torch.bfloat16) for heads in (H, Hkv, Hkv)]


def _gate(key: Tensor) -> Tensor:
    return torch.rand(key.shape[:3], device="cuda").log().requires_grad_()


def _train(shape: tuple[int, ...], attention: Callable[..., Tensor]) -> None:
    out = attention(*(tensor.requires_grad_() for tensor in _inputs(shape)))
    out.backward(torch.ones_like(out))


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


if __name__ == "__main__":
    main()
