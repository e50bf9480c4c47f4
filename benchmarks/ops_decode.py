"""Decoding: `packed_decode` against dense caches, and `write`, which enters one token a sequence.

A chain's pages lie anywhere in the pool. What one call must read is the pairs that the chains hold, window included;
the dense baselines must read every pair. Calls rotate over independent layers (or caches), so that none is served from
L2. Legend as in `spkv.ops.packed`; L tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.timing import MAX_GRAPH_REPEATS, Job, Row, Session, Shape, new_row, relative_error
from spkv.ops import reference
from spkv.ops.packed import PackedLayer

WINDOW = 128
PAGE = 16
# Heads from none to all, as findings have it; the mean is 0.25.
SKEWED = (0.0, 0.01, 0.03, 0.06, 0.15, 0.25, 0.5, 1.0)

# Shape, densities, and whether to add the skewed ones.
_CASES: tuple[tuple[Shape, tuple[float, ...], bool], ...] = (
    (Shape(16, 32768, 32, 8, 128, queries=1), (1.0, 0.5, 0.25, 0.1, 0.0), True),
    (Shape(1, 8192, 32, 8, 128, queries=1), (0.5, 0.25, 0.1), False),
    (Shape(4, 8192, 32, 8, 128, queries=1), (0.5, 0.25, 0.1), False),
    (Shape(1, 131072, 32, 8, 128, queries=1), (0.5, 0.25, 0.1), False),
    (Shape(4, 131072, 32, 8, 128, queries=1), (0.5, 0.25, 0.1), False),
    (Shape(8, 8192, 9, 3, 64, queries=1), (0.25,), False),
)
_QUICK: tuple[tuple[Shape, tuple[float, ...], bool], ...] = (
    (Shape(4, 4096, 32, 8, 128, queries=1), (1.0, 0.25), True),
    (Shape(2, 2048, 9, 3, 64, queries=1), (0.25,), False),
)
_WRITE = Shape(16, 4096, 32, 8, 128, queries=1)
_WRITE_DENSITY, _WRITE_LAYERS = 0.25, 32


def flashinfer_kernels(quick: bool) -> set[tuple[str, int, int, int]]:
    """What `baselines.compile_flashinfer` must compile for these cases."""
    shapes = [shape for shape, _, _ in (_QUICK if quick else _CASES)]
    return {(kernel, s.heads, s.kv_heads, s.head_dim) for s in shapes for kernel in ("batch", "xqa")}


def rows(session: Session) -> Iterator[Row]:
    for shape, densities, skewed in _QUICK if session.quick else _CASES:
        if not session.time_left():
            return
        yield from _dense(session, shape)
        for density in densities:
            yield from _packed(session, shape, density, skewed=False)
        if skewed:
            yield from _packed(session, shape, sum(SKEWED) / len(SKEWED), skewed=True)


def head_densities(density: float, skewed: bool, kv_heads: int) -> list[float]:
    """The density of every KV head of a sequence."""
    if not skewed:
        return [density] * kv_heads
    if kv_heads != len(SKEWED):
        raise ValueError(f"skewed densities are given for {len(SKEWED)} KV heads, not {kv_heads}")
    return list(SKEWED)


def packed_layers(
    shape: Shape, densities: Sequence[float], count: int, device: torch.device, spare: int = 0
) -> list[PackedLayer]:
    """Independent layers in one pool, as if `length` random tokens had passed: each kept with its head's density.

    Chains take their pages from all over the pool. `spare`: kept pairs that every chain may still append; their pages
    are on the pool's stack of free ones. Whole windows only.
    """
    B, C = shape.batch, shape.batch * shape.kv_heads
    ring_pages = -(-WINDOW // PAGE)
    probability = torch.tensor(densities, device=device).repeat(count, B).view(count, C)
    left = torch.full_like(probability, shape.length - WINDOW)
    kept = torch.binomial(left, probability).to(torch.int32)
    pages = ring_pages + -(-kept // PAGE)
    used, extra = int(pages.sum()), count * C * -(-spare // PAGE)
    order = torch.randperm(used + extra, device=device).to(torch.int32)
    first = (pages.flatten().cumsum(0) - pages.flatten()).view(count, C, 1)
    column = torch.arange(int(pages.max()) + -(-spare // PAGE), device=device)
    table = torch.where(column < pages[..., None], order[(first + column).clamp_max(used - 1)], 0)
    pool = torch.empty(used + extra, 2, PAGE, shape.head_dim, dtype=torch.bfloat16, device=device).normal_()
    seen = torch.full((count, B), shape.length, dtype=torch.int32, device=device)
    ring_keep = torch.rand(count, C, WINDOW, device=device) < probability[..., None]
    free, taken = order[used:], torch.zeros(1, dtype=torch.int32, device=device)
    stack = {"free": free, "taken": taken} if spare else {}
    return [PackedLayer(pool, table[i], seen[i], kept[i], ring_keep[i], WINDOW, **stack) for i in range(count)]


def pair_bytes(shape: Shape) -> int:
    """Bytes of one key and value of one head."""
    return 2 * shape.head_dim * 2


def expected_decode(query: Tensor, packed: PackedLayer) -> Tensor:
    """`packed_decode` in float64, one chain after the other."""
    B, H, _, D = query.shape
    Hkv, group = packed.kv_heads, H // packed.kv_heads
    out = torch.empty(B, H, 1, D, dtype=torch.float64, device=query.device)
    for b in range(B):
        ring_key, ring_value, _ = reference.ring_pairs(packed, b)
        for h in range(Hkv):
            old_key, old_value = reference.kept_pairs(packed, b, h, query, query)
            key, value = torch.cat([ring_key[h], old_key]), torch.cat([ring_value[h], old_value])
            heads = slice(h * group, (h + 1) * group)
            out[b, heads] = _attend(query[b : b + 1, heads], key[None, None], value[None, None])[0]
    return out


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention to all keys, in float64."""
    bias = torch.zeros((), dtype=torch.float64, device=query.device)
    return reference.attend(query.double(), key.double(), value.double(), bias, scale=query.shape[-1] ** -0.5)


def _dense(session: Session, shape: Shape) -> Iterator[Row]:
    call_bytes = float(pair_bytes(shape) * shape.batch * shape.kv_heads * shape.length)

    @functools.cache
    def inputs() -> list[baselines.Inputs]:
        def normal(heads: int, tokens: int) -> Tensor:
            size = (shape.batch, heads, tokens, shape.head_dim)
            return torch.empty(size, dtype=torch.bfloat16, device="cuda").normal_()

        kv = (shape.kv_heads, shape.length)
        return [(normal(shape.heads, 1), normal(*kv), normal(*kv)) for _ in range(session.buffers(call_bytes))]

    @functools.cache
    def expected() -> Tensor:
        query, key, value = inputs()[0]
        return torch.cat([_attend(query[b, None], key[b, None], value[b, None]) for b in range(shape.batch)])

    def job(prepare: baselines.Prepare) -> Job:
        prepared = prepare(inputs())

        def error() -> float:
            return relative_error(prepared.calls[0](), expected())

        return Job(prepared.calls, error, bytes=call_bytes, graph=True, note=prepared.note)

    for name, prepare in baselines.decode_baselines(session.flashinfer).items():
        row = new_row("packed_decode", "fwd", shape, name, density=1.0)
        yield from session.run(row, functools.partial(job, prepare))


def _packed(session: Session, shape: Shape, density: float, *, skewed: bool) -> Iterator[Row]:
    def job() -> Job:
        from spkv.ops.triton.decode import packed_decode

        densities = head_densities(density, skewed, shape.kv_heads)
        held = WINDOW + density * (shape.length - WINDOW)
        count = session.buffers(pair_bytes(shape) * shape.batch * shape.kv_heads * held)
        layers = packed_layers(shape, densities, count, torch.device("cuda"))
        query = torch.randn(
            count, shape.batch, shape.heads, 1, shape.head_dim, dtype=torch.bfloat16, device="cuda"
        ).unbind()

        def call(i: int) -> Tensor:
            return packed_decode(query[i], layers[i], scale=shape.head_dim**-0.5)

        pairs = sum(int(layer.kept.sum()) for layer in layers) / count + layers[0].kept.numel() * WINDOW
        return Job(
            calls=[functools.partial(call, i) for i in range(count)],
            error=lambda: relative_error(call(0), expected_decode(query[0], layers[0])),
            bytes=pair_bytes(shape) * pairs,
            graph=True,
        )

    yield from session.run(new_row("packed_decode", "fwd", shape, "spkv triton", density, skewed), job)


def write_rows(session: Session) -> Iterator[Row]:
    """One token a sequence into each of the layers of a model; what leaves the window is kept with the density."""
    if session.time_left():
        row = new_row("write", "fwd", _WRITE, "spkv triton", _WRITE_DENSITY)
        yield from session.run(row, functools.partial(_write_job, 4 if session.quick else _WRITE_LAYERS))


def _write_job(count: int) -> Job:
    from spkv.ops.triton.write import write

    shape, device = _WRITE, torch.device("cuda")
    # Lengths go back before every sample, so that a chain grows by what one sample writes at most.
    spare = MAX_GRAPH_REPEATS + 8 * PAGE
    densities = [_WRITE_DENSITY] * shape.kv_heads
    seen, kept, layers = _share_lengths(packed_layers(shape, densities, count, device, spare))
    size = (shape.batch, shape.kv_heads, 1, shape.head_dim)
    keys, values = (torch.randn(count, *size, dtype=torch.bfloat16, device=device).unbind() for _ in range(2))
    keeps = (torch.rand(count, *size[:3], device=device) < _WRITE_DENSITY).unbind()
    seen_before, kept_before = seen.clone(), kept.clone()
    taken = layers[0].taken
    assert taken is not None

    def prepare() -> None:
        seen.copy_(seen_before)
        kept.copy_(kept_before)
        taken.zero_()

    def call(i: int) -> None:
        write(layers[i], keys[i], values[i], keeps[i])

    def error() -> float:
        return write_error(write, layers[0], keys[0], values[0], keeps[0])

    chains = shape.batch * shape.kv_heads
    moved = sum(int(layer.ring_keep.sum()) for layer in layers) / layers[0].ring_keep[0].numel() / count
    return Job(
        calls=[functools.partial(call, i) for i in range(count)],
        error=error,
        bytes=2 * pair_bytes(shape) * (chains + moved),
        graph=True,
        prepare=prepare,
        note=f"{count} layers in turns; few bytes: what bounds it is the launch",
    )


def _share_lengths(layers: list[PackedLayer]) -> tuple[Tensor, Tensor, list[PackedLayer]]:
    """The layers' `seen` and `kept` in one tensor each, to be set back with one copy."""
    seen, kept = torch.stack([layer.seen for layer in layers]), torch.stack([layer.kept for layer in layers])
    parts = zip(layers, seen, kept, strict=True)
    return seen, kept, [dataclasses.replace(layer, seen=s, kept=k) for layer, s, k in parts]


def write_error(
    write: Callable[[PackedLayer, Tensor, Tensor, Tensor], None],
    packed: PackedLayer,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
) -> float:
    """Write some tokens with `write` and by definition, each into a copy; compare what the chains hold then.

    Which page a chain gets may differ, so that pairs are compared, chain by chain. Infinite if lengths or keep bits
    differ.
    """
    results = []
    for function in (write, reference.write):
        tensors = {f.name: getattr(packed, f.name) for f in dataclasses.fields(packed)}
        copies = {n: t.clone() for n, t in tensors.items() if isinstance(t, Tensor)}
        copy = dataclasses.replace(packed, **copies)
        for n in range(2 * PAGE):
            function(copy, key + n, value - n, keep.roll(n, 1))
        results.append(copy)
    actual, expected = results
    for name in ("seen", "kept", "ring_keep", "taken"):
        first, second = getattr(actual, name), getattr(expected, name)
        if first is not None and not torch.equal(first, second):
            return float("inf")
    return relative_error(_pairs(actual), _pairs(expected))


def _pairs(packed: PackedLayer) -> Tensor:
    """All pairs that the chains hold, one after the other."""
    pairs = []
    for b in range(packed.seen.shape[0]):
        pairs.extend(reference.ring_pairs(packed, b)[:2])
        for h in range(packed.kv_heads):
            pairs.extend(reference.kept_pairs(packed, b, h, packed.pool, packed.pool))
    return torch.cat([part.reshape(-1) for part in pairs])
