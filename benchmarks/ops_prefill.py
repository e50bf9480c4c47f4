"""Prefill: `pruned_prefill` with its compaction, of a whole text and of a chunk against a cache; dense beside it.

Useful work is the pairs that queries see: those in their window, and the kept ones before it. Legend as in
`spkv.ops.attention`; a recent pair is one of the ring, oldest first, or of the chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.ops_decode import SKEWED, WINDOW, head_densities, packed_layers
from benchmarks.timing import Job, Row, Session, Shape, new_row, relative_error
from spkv.ops import reference

_FULL = Shape(1, 32768, 32, 8, 128)
_QUICK = Shape(1, 4096, 32, 8, 128)
_DENSITIES = (1.0, 0.25, 0.1)
_CHUNK, _CHUNK_DENSITY = 2048, 0.25
_FLEX_DENSITY = 0.25  # the others would each be compiled anew
_CHECKED = 128  # queries compared with the reference

# Inputs of `pruned_prefill`: query, key, value, keep, past.
Inputs = dict[str, Any]


def flashinfer_kernels() -> set[tuple[str, int, int, int]]:
    """What `baselines.compile_flashinfer` must compile for these cases."""
    return {("prefill", _FULL.heads, _FULL.kv_heads, _FULL.head_dim)}


def rows(session: Session) -> Iterator[Row]:
    full = _QUICK if session.quick else _FULL
    if not session.time_left():
        return
    yield from _dense(session, full)
    for density in _DENSITIES:
        yield from _pruned(session, full, density)
    yield from _pruned(session, full, sum(SKEWED) / len(SKEWED), skewed=True)

    chunk = Shape(1, full.length + _CHUNK, full.heads, full.kv_heads, full.head_dim, queries=_CHUNK)
    if session.time_left():
        yield from _dense(session, chunk)
        yield from _pruned(session, chunk, _CHUNK_DENSITY)


def make_inputs(shape: Shape, densities: list[float], device: torch.device) -> Inputs:
    """Random queries, pairs and gates; where the shape has fewer queries than keys, the rest is in a cache."""
    T = shape.length if shape.queries is None else shape.queries
    query, key, value = (
        torch.empty(1, heads, T, shape.head_dim, dtype=torch.bfloat16, device=device).normal_()
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    keep = torch.rand(1, shape.kv_heads, T, device=device) < torch.tensor(densities, device=device)[:, None]
    past = None
    if shape.length > T:
        before = Shape(1, shape.length - T, shape.heads, shape.kv_heads, shape.head_dim)
        (past,) = packed_layers(before, densities, 1, device)
    return {"query": query, "key": key, "value": value, "keep": keep, "past": past}


def _recent(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, int]:
    """Recent keys and values [Hkv, R, D] and keep bits [Hkv, R], and how many of them come from the ring."""
    return reference.recent_pairs(inputs["past"], 0, inputs["key"][0], inputs["value"][0], inputs["keep"][0])


def visible_pairs(inputs: Inputs) -> int:
    """Pairs of a query and a key that it sees, over all queries and KV heads (once for a group)."""
    _, _, keep, offset = _recent(inputs)
    Hkv, R = keep.shape
    index = torch.arange(offset, R, device=keep.device)
    near = (index + 1).clamp_max(WINDOW).sum() * Hkv
    kept_before = torch.nn.functional.pad(keep.long().cumsum(1), (1, 0))  # [Hkv, R + 1]
    far = kept_before[:, (index + 1 - WINDOW).clamp_min(0)].sum()
    old = 0 if inputs["past"] is None else inputs["past"].kept.sum() * index.numel()
    return int(near + far + old)


def expected_rows(inputs: Inputs, rows: Tensor) -> Tensor:
    """The output of some queries, [1, H, rows, D] in float64 by the eager definition."""
    query = inputs["query"]
    recent_key, recent_value, keep, offset = _recent(inputs)
    Hkv, R = keep.shape
    group = query.shape[1] // Hkv
    index = torch.arange(R, device=query.device)
    gate = torch.zeros(1, Hkv, R, dtype=torch.float64, device=query.device).masked_fill_(~keep, float("-inf"))
    out = []
    for h in range(Hkv):
        old_key, old_value = reference.kept_pairs(inputs["past"], 0, h, recent_key, recent_value)
        bias = reference.window_bias(rows + offset, index, gate[:, h : h + 1], WINDOW)
        bias = torch.cat([bias.new_zeros(*bias.shape[:-1], old_key.shape[0]), bias], dim=-1)
        result = reference.attend(
            query[:, h * group : (h + 1) * group, rows].double(),
            torch.cat([old_key, recent_key[h]])[None, None].double(),
            torch.cat([old_value, recent_value[h]])[None, None].double(),
            bias,
            scale=query.shape[-1] ** -0.5,
        )
        out.append(result)
    return torch.cat(out, dim=1)


def checked_rows(T: int, device: torch.device) -> Tensor:
    """The first, the last and random queries, in order."""
    drawn = torch.randint(T, (_CHECKED,), device=device)
    return torch.cat([drawn, drawn.new_tensor([0, T - 1])]).unique()


def _dense(session: Session, shape: Shape) -> Iterator[Row]:
    T = shape.length if shape.queries is None else shape.queries

    @functools.cache
    def inputs() -> baselines.Inputs:
        sizes = ((shape.heads, T), (shape.kv_heads, shape.length), (shape.kv_heads, shape.length))
        query, key, value = (
            torch.empty(1, *size, shape.head_dim, dtype=torch.bfloat16, device="cuda").normal_() for size in sizes
        )
        return query, key, value

    @functools.cache
    def expected() -> tuple[Tensor, Tensor]:
        query, key, value = inputs()
        rows = checked_rows(T, query.device)
        # All gates open: the padded queries before the chunk's are not among the rows.
        padded = torch.nn.functional.pad(query, (0, 0, shape.length - T, 0))
        keep = torch.ones(1, shape.kv_heads, shape.length, dtype=torch.bool, device=query.device)
        given = {"query": padded, "key": key, "value": value, "keep": keep, "past": None}
        return rows, expected_rows(given, rows + shape.length - T)

    def job(prepare: baselines.Prepare) -> Job:
        prepared = prepare([inputs()])

        def error() -> float:
            rows, values = expected()
            return relative_error(prepared.calls[0]()[:, :, rows], values)

        pairs = T * (shape.length - T) + T * (T + 1) / 2
        return Job(prepared.calls, error, flops=4 * shape.head_dim * shape.heads * pairs, note=prepared.note)

    for name, prepare in baselines.forward_baselines(session.flashinfer).items():
        row = new_row("pruned_prefill", "fwd", shape, name, density=1.0)
        yield from session.run(row, functools.partial(job, prepare))


def _pruned(session: Session, shape: Shape, density: float, *, skewed: bool = False) -> Iterator[Row]:
    @functools.cache
    def inputs() -> Inputs:
        return make_inputs(shape, head_densities(density, skewed, shape.kv_heads), torch.device("cuda"))

    @functools.cache
    def expected() -> tuple[Tensor, Tensor]:
        rows = checked_rows(inputs()["query"].shape[2], inputs()["query"].device)
        return rows, expected_rows(inputs(), rows)

    def job(load: Callable[[], Callable[..., Tensor]]) -> Job:
        function, given = load(), inputs()

        def call() -> Tensor:
            return function(**given, window=WINDOW, scale=shape.head_dim**-0.5)

        def error() -> float:
            rows, values = expected()
            return relative_error(call()[:, :, rows], values)

        flops = 4 * shape.head_dim * shape.heads / shape.kv_heads * visible_pairs(given)
        return Job([call], error, flops=flops, note="compaction timed")

    yield from session.run(
        new_row("pruned_prefill", "fwd", shape, "spkv triton", density, skewed), functools.partial(job, _load_triton)
    )
    if density == _FLEX_DENSITY and not skewed and shape.queries is None:
        yield from session.run(
            new_row("pruned_prefill", "fwd", shape, "spkv flex", density), functools.partial(job, _load_flex)
        )


def _load_triton() -> Callable[..., Tensor]:
    from spkv.ops.triton.prefill import pruned_prefill

    return pruned_prefill


def _load_flex() -> Callable[..., Tensor]:
    from spkv.ops.flex import pruned_prefill

    torch.compiler.reset()
    return pruned_prefill
