"""Measuring on a CUDA device: times, the device's own limits, and the rows that they make.

Times are milliseconds of CUDA events around one call: medians, with 20 and 80 % quantiles. A row is a dict with the
keys of `FIELDS`. Nothing is timed before its result was compared with a reference in the same process.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]

FIELDS = (
    *("operator", "pass", "batch", "length", "queries", "heads", "kv_heads", "head_dim", "density", "skewed"),
    *("implementation", "milliseconds", "p20", "p80", "graph", "gb_per_s", "tflop_per_s", "percent_of_limit"),
    *("versus_fastest_dense", "relative_error", "note", "error"),
)
_CASE = FIELDS[:8]
_OURS = "spkv"
TOLERANCE = 0.02  # relative norm error of a bfloat16 result

_GRAPH_MILLISECONDS = 1.0  # a captured graph repeats its calls until it takes about this long
MAX_GRAPH_REPEATS = 64


class IncorrectError(RuntimeError):
    """A result is too far from its reference to be timed."""


class DeviceLostError(RuntimeError):
    """The device answers no more; nothing measured after this would mean anything. `row` is the one that lost it."""

    def __init__(self, message: str, row: Row) -> None:
        super().__init__(message)
        self.row = row


@dataclass(frozen=True)
class Shape:
    """Sizes of a case. `length` counts the keys of a sequence, `queries` its queries (None: as many)."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    queries: int | None = None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call; `graph` says whether calls were replayed from a CUDA graph, without host gaps."""

    milliseconds: float
    p20: float
    p80: float
    graph: bool


@dataclass(frozen=True)
class Limits:
    """What the device reaches on plain work: a copy (bytes read and written) and a bfloat16 product."""

    copy_gb_per_s: float
    matmul_tflop_per_s: float


@dataclass(frozen=True)
class Job:
    """A row's work, ready to run.

    Attributes:
        calls: equal calls on independent buffers; they are timed in turns.
        error: returns the relative norm error of the first call's result.
        bytes: that one call must read and write, for rows bound by memory.
        flops: useful floating-point operations of one call, for rows bound by arithmetic.
        graph: time replays of a CUDA graph, if the calls can be captured.
        prepare: called before every sample, outside of what is timed.
        note: for the row.
    """

    calls: Sequence[Callable[[], object]]
    error: Callable[[], float]
    bytes: float | None = None
    flops: float | None = None
    graph: bool = False
    prepare: Callable[[], None] | None = None
    note: str | None = None


@dataclass
class Session:
    """What all cases of a run share.

    Attributes:
        limits: for percent_of_limit.
        quick: small sizes, few repetitions.
        filters: a row runs if its label holds any of these; empty: all run.
        deadline: time.monotonic() after which no case starts; None for none.
        flashinfer: why FlashInfer's kernels cannot run, by (kernel, heads, KV heads, head size); absent: they can.
            None: they were not asked for.
    """

    limits: Limits
    quick: bool = False
    filters: Sequence[str] = ()
    deadline: float | None = None
    flashinfer: dict[tuple[str, int, int, int], str] | None = None
    l2_bytes: int = field(default_factory=lambda: _l2_bytes())

    def time_left(self) -> bool:
        """Whether another case may start."""
        return self.deadline is None or time.monotonic() < self.deadline

    def wants(self, row: Row) -> bool:
        return not self.filters or any(part in label(row) for part in self.filters)

    def buffers(self, call_bytes: float) -> int:
        """Independent buffers that a case of `call_bytes` a call rotates over, so that no call finds its data in L2."""
        return min(64, max(1, math.ceil(4 * self.l2_bytes / call_bytes)))

    def run(self, row: Row, build: Callable[[], Job]) -> list[Row]:
        """Build, check and time one row. Returns it filled, or with an error and no time; [] if filtered out.

        Raises:
            DeviceLostError: if the device is of no use any more.
        """
        if not self.wants(row):
            return []
        print(f"{label(row)} ...", file=sys.stderr, flush=True)
        try:
            self._measure(row, build())
        except Exception as error:  # whatever a library does, the other rows are still worth having
            row["error"] = f"{type(error).__name__}: {str(error).strip()[:400]}"
            print(f"    {row['error']}", file=sys.stderr, flush=True)
        gc.collect()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            row["error"] = row["error"] or f"{type(error).__name__}: {str(error).strip()[:400]}"
            raise DeviceLostError(f"the device was lost after {label(row)}", row) from error
        return [row]

    def _measure(self, row: Row, job: Job) -> None:
        relative = job.error()
        row["note"] = job.note
        row["relative_error"] = relative if math.isfinite(relative) else None
        if not relative <= TOLERANCE:  # NaN is no better
            raise IncorrectError(f"relative error {relative:.3g} is above {TOLERANCE}: not timed")
        seconds = 0.05 if self.quick else 0.3
        timing = measure(job.calls, graph=job.graph, prepare=job.prepare, seconds=seconds)
        fill(row, timing, self.limits, bytes=job.bytes, flops=job.flops)


def new_row(
    operator: str, pass_: str, shape: Shape, implementation: str, density: float | None = None, skewed: bool = False
) -> Row:
    """A row without results. A density of None: it means nothing to this operator."""
    row: Row = dict.fromkeys(FIELDS)
    row |= {"operator": operator, "pass": pass_, "batch": shape.batch, "length": shape.length}
    row |= {"queries": shape.length if shape.queries is None else shape.queries}
    row |= {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    row |= {"density": density, "skewed": skewed, "implementation": implementation}
    return row


def fill(row: Row, timing: Timing, limits: Limits, *, bytes: float | None = None, flops: float | None = None) -> None:
    """Enter a time, and the rate that follows from the bytes or operations of one call."""
    row |= {"milliseconds": timing.milliseconds, "p20": timing.p20, "p80": timing.p80, "graph": timing.graph}
    if bytes is not None:
        row["gb_per_s"] = bytes / timing.milliseconds / 1e6
        row["percent_of_limit"] = 100 * row["gb_per_s"] / limits.copy_gb_per_s
    if flops is not None:
        row["tflop_per_s"] = flops / timing.milliseconds / 1e9
        row["percent_of_limit"] = 100 * row["tflop_per_s"] / limits.matmul_tflop_per_s


def is_dense(row: Row) -> bool:
    """Whether a row is of a baseline that knows no gates."""
    return not row["implementation"].startswith(_OURS)


def label(row: Row) -> str:
    """One line that names a row: what `--filter` looks into."""
    density = "" if row["density"] is None else f" density {row['density']:g}" + (" skewed" if row["skewed"] else "")
    return f"{case_label(row)}{density} {row['implementation']}"


def case_label(row: Row) -> str:
    chunk = "" if row["queries"] in (1, row["length"]) else f" chunk {row['queries']}"
    heads = f"{row['heads']}/{row['kv_heads']}x{row['head_dim']}"
    return f"{row['operator']} {row['pass']} {row['batch']}x{row['length']}{chunk} {heads}"


def compare_with_dense(rows: Sequence[Row]) -> None:
    """Set `versus_fastest_dense` everywhere: the time of the case's fastest dense baseline over the row's own."""
    fastest: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if is_dense(row) and row["milliseconds"] is not None:
            case = tuple(row[name] for name in _CASE)
            fastest[case] = min(fastest.get(case, math.inf), row["milliseconds"])
    for row in rows:
        dense = fastest.get(tuple(row[name] for name in _CASE))
        if dense is not None and row["milliseconds"] is not None:
            row["versus_fastest_dense"] = dense / row["milliseconds"]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected, in float64."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


def measure(
    calls: Sequence[Callable[[], object]],
    *,
    graph: bool = False,
    prepare: Callable[[], None] | None = None,
    seconds: float = 0.3,
) -> Timing:
    """Time one call, taking the given ones in turns, for about `seconds` and 3 to 50 samples.

    With `graph`, a sample is a replay of a CUDA graph of all calls, repeated until it takes about a millisecond, and
    counts as its mean call; if the calls cannot be captured, single calls are timed and `graph` is False in the result.
    """
    if prepare is not None:
        prepare()
    for call in calls:  # compiles
        call()
    torch.cuda.synchronize()
    units, per_sample, captured = list(calls), 1, False
    if graph:
        try:
            replay, per_sample = _graph_of(calls, prepare)
            units, captured = [replay], True
        except Exception as error:
            torch.cuda.synchronize()
            print(f"    no CUDA graph: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr, flush=True)
            per_sample = 1
    once = max(1e-3, min(_samples(units, 2, prepare)))
    count = max(3, min(50, int(1e3 * seconds / once)))
    samples = torch.tensor(_samples(units, count, prepare), dtype=torch.float64) / per_sample
    p20, median, p80 = samples.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Timing(median, p20, p80, captured)


def measure_limits(quick: bool = False) -> Limits:
    """The rates of a device-to-device copy of 4 GB (1 GB if quick) and of an 8192³ bfloat16 product on random data."""
    elements = 10**9 // 2 if quick else 4 * 10**9 // 2
    source = torch.empty(elements, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    copy = measure([lambda: target.copy_(source)])
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = torch.empty_like(a)
    matmul = measure([lambda: torch.matmul(a, b, out=product)])
    copied_bytes = 2 * source.numel() * source.element_size()
    return Limits(copied_bytes / copy.milliseconds / 1e6, 2 * size**3 / matmul.milliseconds / 1e9)


def _samples(units: Sequence[Callable[[], object]], count: int, prepare: Callable[[], None] | None) -> list[float]:
    """Milliseconds of `count` runs, units in turns. The host runs ahead, and waits at the end only."""
    events = []
    for i in range(count):
        if prepare is not None:
            prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        units[i % len(units)]()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _graph_of(
    calls: Sequence[Callable[[], object]], prepare: Callable[[], None] | None
) -> tuple[Callable[[], None], int]:
    """Capture all calls, repeated to about a millisecond; returns the replay and how many calls it makes."""
    graph = _capture(calls, prepare)
    once = max(1e-3, min(_samples([graph.replay], 3, prepare)))
    repeats = min(MAX_GRAPH_REPEATS, math.ceil(_GRAPH_MILLISECONDS / once))
    if repeats > 1:
        graph = _capture(list(calls) * repeats, prepare)
    return graph.replay, repeats * len(calls)


def _capture(calls: Sequence[Callable[[], object]], prepare: Callable[[], None] | None) -> torch.cuda.CUDAGraph:
    gc.collect()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Capturing needs a stream of its own; this context restores the old one whatever happens in between.
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        if prepare is not None:
            prepare()
        calls[0]()  # what a library sets up for a new stream happens here, not while capturing
        stream.synchronize()
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph


def _l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
