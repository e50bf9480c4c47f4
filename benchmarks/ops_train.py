"""Training: `gated_attention` forward, and forward with backward, the gradient to the gates included.

The dense baselines have no gate to train. The forward pass is the one that keeps what a backward pass needs. Flex is
compiled anew for every shape, so that it never runs with dynamic ones. Legend as in `spkv.ops.attention`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.timing import Job, Row, Session, Shape, new_row, relative_error
from spkv.ops import reference

WINDOW = 128
_FORWARD, _BOTH = "fwd", "fwd+bwd"
_SHAPES = (
    Shape(1, 4096, 32, 8, 128),
    Shape(1, 8192, 32, 8, 128),
    Shape(1, 16384, 32, 8, 128),
    Shape(1, 32768, 32, 8, 128),
    Shape(8, 4096, 9, 3, 64),  # SmolLM2
)
_QUICK = (Shape(1, 2048, 32, 8, 128), Shape(2, 1024, 9, 3, 64))
_SCORE_BYTES = 2**28  # of float64 scores that the reference makes at a time

Tensors = dict[str, Tensor]
Attention = Callable[[], Tensor]


def rows(session: Session) -> Iterator[Row]:
    for shape in _QUICK if session.quick else _SHAPES:
        if not session.time_left():
            return
        yield from _case(session, shape)


def _case(session: Session, shape: Shape) -> Iterator[Row]:
    inputs = functools.cache(lambda: make_inputs(shape, torch.device("cuda")))
    # The first and the last KV head of the last sequence, in float64.
    expected = functools.cache(
        lambda gated: {h: expected_head(inputs(), shape.batch - 1, h, gated) for h in {0, shape.kv_heads - 1}}
    )
    for name in ("sdpa flash", "sdpa cudnn", "spkv flex", "spkv triton"):
        # Both passes share what the first has prepared, and with it one compilation.
        prepared = functools.cache(functools.partial(_prepare, name, inputs))
        for pass_ in (_FORWARD, _BOTH):
            row = new_row("gated_attention", pass_, shape, name)
            yield from session.run(row, functools.partial(_job, name, pass_, shape, prepared, inputs, expected))


def make_inputs(shape: Shape, device: torch.device) -> Tensors:
    """query, key, value and log_gate, which ask for gradients, and the output's gradient `grad`."""

    def normal(heads: int) -> Tensor:
        size = (shape.batch, heads, shape.length, shape.head_dim)
        return torch.empty(size, dtype=torch.bfloat16, device=device).normal_()

    gate = torch.rand(shape.batch, shape.kv_heads, shape.length, device=device).clamp_min(0.02)
    tensors = {"query": normal(shape.heads), "key": normal(shape.kv_heads), "value": normal(shape.kv_heads)}
    leaves = {name: tensor.requires_grad_() for name, tensor in (tensors | {"log_gate": gate.log()}).items()}
    return leaves | {"grad": normal(shape.heads)}


def useful_flops(shape: Shape, pass_: str) -> float:
    """Two products forward and five backward, over the causal half of the scores."""
    pairs = shape.batch * shape.heads * shape.length * (shape.length + 1) / 2
    return 2 * shape.head_dim * pairs * (7 if pass_ == _BOTH else 2)


def _prepare(name: str, inputs: Callable[[], Tensors]) -> tuple[Attention, tuple[Tensor, ...], str | None]:
    """The attention, the tensors that it has gradients to, and a note."""
    given = inputs()
    query, key, value, log_gate = (given[n] for n in ("query", "key", "value", "log_gate"))
    if name in baselines.SDPA:
        backend = baselines.SDPA[name]
        taken, note = baselines.sdpa_inputs(backend, (query, key, value), causal=True)
        return lambda: baselines.sdpa(*taken, backend, causal=True), taken, f"no gate; {note}"
    options: dict[str, Any] = dict(window=WINDOW, scale=query.shape[-1] ** -0.5)
    if name == "spkv flex":
        from spkv.ops.flex import gated_attention

        torch.compiler.reset()
        note = "compiled for this shape"
    else:
        from spkv.ops.triton.train import gated_attention

        note = None
    return lambda: gated_attention(query, key, value, log_gate, **options), (query, key, value, log_gate), note


def _job(
    name: str,
    pass_: str,
    shape: Shape,
    prepared: Callable[[], tuple[Attention, tuple[Tensor, ...], str | None]],
    inputs: Callable[[], Tensors],
    expected: Callable[[bool], dict[int, Tensors]],
) -> Job:
    attend, leaves, note = prepared()
    gated = name not in baselines.SDPA

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(), leaves, inputs()["grad"])

    def error() -> float:
        results = {"out": attend().detach()}
        # The baselines' gradients are theirs to test.
        if gated and pass_ == _BOTH:
            results |= dict(zip(("query", "key", "value", "log_gate"), both(), strict=True))
        return worst_error(results, expected(gated), shape)

    call = both if pass_ == _BOTH else attend
    return Job(calls=[call], error=error, flops=useful_flops(shape, pass_), note=note)


def worst_error(results: Tensors, expected: dict[int, Tensors], shape: Shape) -> float:
    """The largest relative error over the tensors, on the last sequence and the KV heads given."""
    group, worst = shape.heads // shape.kv_heads, 0.0
    for h, tensors in expected.items():
        for name, actual in results.items():
            heads = slice(h * group, (h + 1) * group) if name in ("out", "query") else slice(h, h + 1)
            error = relative_error(actual[-1:, heads], tensors[name])
            worst = error if not error <= worst else worst  # NaN is the worst of all
            if worst != worst:
                return worst
    return worst


def expected_head(inputs: Tensors, b: int, h: int, gated: bool) -> Tensors:
    """The output and all gradients of one KV head and its group, in float64 by the eager definition.

    Without `gated`, the output alone. Blocks of queries: the scores of a long sequence do not fit at once.
    """
    T, D = inputs["key"].shape[2:]
    group = inputs["query"].shape[1] // inputs["key"].shape[1]
    heads = {name: slice(h, h + 1) for name in ("key", "value", "log_gate")}
    heads |= {name: slice(h * group, (h + 1) * group) for name in ("query", "grad")}
    given = {name: inputs[name][b : b + 1, part].detach().double() for name, part in heads.items()}
    leaves = {name: given[name].requires_grad_(gated) for name in ("query", "key", "value", "log_gate")}
    index = torch.arange(T, device=given["grad"].device)
    blocks = []
    step = max(1, _SCORE_BYTES // (8 * group * T))
    for start in range(0, T, step):
        stop = min(start + step, T)
        gate = leaves["log_gate"][..., :stop] if gated else None
        out = reference.attend(
            leaves["query"][:, :, start:stop],
            leaves["key"][:, :, :stop],
            leaves["value"][:, :, :stop],
            reference.window_bias(index[start:stop], index[:stop], gate, WINDOW),
            scale=D**-0.5,
        )
        if gated:
            out.backward(given["grad"][:, :, start:stop])
        blocks.append(out.detach())
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"out": torch.cat(blocks, dim=2), **gradients}
