"""gated_attention: the reference against a double loop, every implementation against the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spkv.ops.attention import gated_attention


def by_double_loop(query, key, value, log_gate, window, scale, segment_ids, softcap, sinks):
    """The definition, one query and one key at a time."""
    B, H, T, _ = query.shape
    group = H // key.shape[1]
    out = torch.zeros_like(query)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                scores, values = [], []
                for s in range(t + 1):
                    if segment_ids is not None and segment_ids[b, s] != segment_ids[b, t]:
                        continue
                    score = float(query[b, h, t] @ key[b, h // group, s]) * scale
                    if softcap is not None:
                        score = softcap * math.tanh(score / softcap)
                    if t - s >= window and log_gate is not None:
                        score += float(log_gate[b, h // group, s])
                    scores.append(score)
                    values.append(value[b, h // group, s])
                weights = torch.tensor(scores, dtype=query.dtype).exp()
                total = weights.sum() + (0 if sinks is None else sinks[h].exp())
                out[b, h, t] = (weights[:, None] * torch.stack(values)).sum(0) / total
    return out


def inputs(B, Hkv, group, T, D, *, gate="soft", seed=0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    log_gate = None
    if gate == "soft":
        log_gate = torch.nn.functional.logsigmoid(draw(B, Hkv, T).double()).to(dtype)
    elif gate == "hard":
        log_gate = torch.zeros(B, Hkv, T, dtype=dtype, device=device).masked_fill(draw(B, Hkv, T) > 0, float("-inf"))
    return draw(B, Hkv * group, T, D), draw(B, Hkv, T, D), draw(B, Hkv, T, D), log_gate


@pytest.mark.parametrize("gate", [None, "soft", "hard"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_reference_is_the_definition(gate, softcap, with_sinks, packed):
    query, key, value, log_gate = inputs(2, 2, 2, 9, 4, gate=gate)
    segment_ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 5]]) if packed else None
    sinks = torch.randn(4, dtype=torch.float64) if with_sinks else None
    expected = by_double_loop(query, key, value, log_gate, 3, 0.5, segment_ids, softcap, sinks)
    for implementation in ("reference", "sdpa"):
        actual = gated_attention(
            query,
            key,
            value,
            log_gate,
            window=3,
            scale=0.5,
            segment_ids=segment_ids,
            softcap=softcap,
            sinks=sinks,
            implementation=implementation,
        )
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=25)
@given(
    B=st.integers(1, 2),
    Hkv=st.integers(1, 3),
    group=st.integers(1, 3),
    T=st.integers(1, 40),
    window=st.integers(1, 50),
    gate=st.sampled_from([None, "soft", "hard"]),
    softcap=st.sampled_from([None, 3.0]),
    with_sinks=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_outputs_and_gradients_match_the_reference(B, Hkv, group, T, window, gate, softcap, with_sinks, packed, seed):
    from spkv.ops import sdpa

    block, sdpa._BLOCK = sdpa._BLOCK, 7  # several blocks at these lengths
    try:
        *tensors, log_gate = inputs(B, Hkv, group, T, 4, gate=gate, seed=seed)
        segment_ids = torch.arange(T).expand(B, T) // 11 if packed else None
        sinks = torch.randn(Hkv * group, dtype=torch.float64) if with_sinks else None
        leaves = [t for t in (*tensors, log_gate if gate == "soft" else None, sinks) if t is not None]
        results = []
        for implementation in ("reference", "sdpa"):
            for leaf in leaves:
                leaf.requires_grad_().grad = None
            out = gated_attention(
                *tensors,
                log_gate,
                window=window,
                segment_ids=segment_ids,
                softcap=softcap,
                sinks=sinks,
                implementation=implementation,
            )
            out.square().sum().backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for actual, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    finally:
        sdpa._BLOCK = block


def test_gradients_are_those_of_finite_differences():
    *tensors, log_gate = (t.requires_grad_() for t in inputs(1, 1, 2, 6, 3))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(query, key, value, log_gate, sinks):
        return gated_attention(query, key, value, log_gate, window=2, sinks=sinks, implementation="reference")

    assert torch.autograd.gradcheck(run, (*tensors, log_gate, sinks))


def test_a_window_longer_than_the_text_ignores_the_gate():
    query, key, value, log_gate = inputs(1, 2, 1, 8, 4, gate="hard")
    torch.testing.assert_close(
        gated_attention(query, key, value, log_gate, window=8), gated_attention(query, key, value, None, window=8)
    )


@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
@pytest.mark.parametrize("window", [1, 7, 300, 700])
def test_a_sliding_window_sees_what_closed_gates_leave(implementation, window):
    query, key, value = (tensor.requires_grad_() for tensor in inputs(1, 2, 2, 600, 4)[:3])
    segment_ids = torch.arange(600)[None] // 400
    closed = torch.full((1, 2, 600), float("-inf"), dtype=torch.float64)
    options = dict(window=window, segment_ids=segment_ids, implementation=implementation)
    expected = gated_attention(query, key, value, closed, **options)
    actual = gated_attention(query, key, value, sliding=True, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = torch.rand_like(expected)
    gradients = [torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (actual, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="a sliding window has no gates"):
        gated_attention(query, key, value, closed, sliding=True, **options)


def test_gradient_of_a_dropped_pair_is_zero_and_finite():
    query, key, value, _ = inputs(1, 1, 1, 6, 4)
    log_gate = torch.tensor([[[0.0, float("-inf"), 0.0, 0.0, 0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    gated_attention(query, key, value, log_gate, window=1).sum().backward()
    assert log_gate.grad.isfinite().all()
    assert log_gate.grad[0, 0, 1] == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be a whole number of at least 1, not 0"),
        ({"window": 2.5}, ValueError, "not 2.5"),
        ({"key": torch.zeros(1, 3, 8, 4)}, ValueError, "must have the same shape"),
        ({"query": torch.zeros(1, 3, 8, 4)}, ValueError, "3 query heads are not a multiple of 2 KV heads"),
        ({"query": torch.zeros(2, 4, 8, 4)}, ValueError, "must agree in batch"),
        ({"query": torch.zeros(1, 4, 7, 4)}, ValueError, "same number of tokens, not 7 and 8"),
        ({"query": torch.zeros(4, 8, 4)}, ValueError, "must have shape"),
        ({"query": torch.zeros(1, 4, 8, 4, dtype=torch.float16)}, TypeError, "share one floating dtype"),
        ({"log_gate": torch.zeros(1, 4, 8)}, ValueError, r"log_gate must have shape \[1, 2, 8\], not \[1, 4, 8\]"),
        ({"log_gate": torch.ones(1, 2, 8, dtype=torch.bool)}, TypeError, "log_gate must be floating point"),
        ({"segment_ids": torch.zeros(8)}, ValueError, "segment_ids must have shape"),
        ({"sinks": torch.zeros(2)}, ValueError, "sinks must have shape"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"implementation": "magic"}, ValueError, "'magic'; known are triton, flex, sdpa, reference"),
        (
            {"implementation": "triton"},
            ValueError,
            "runs on CUDA, or with TRITON_INTERPRET=1, and .* on cpu|not installed",
        ),
        ({"implementation": "flex"}, ValueError, "runs on CUDA only, and the query is on cpu"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = dict(
        query=torch.zeros(1, 4, 8, 4),
        key=torch.zeros(1, 2, 8, 4),
        value=torch.zeros(1, 2, 8, 4),
        log_gate=None,
        window=3,
    )
    with pytest.raises(error, match=message):
        gated_attention(**{**arguments, **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "window", "D"), [(300, 128, 64), (129, 17, 128), (64, 100, 64), (1000, 1, 96)])
@pytest.mark.parametrize("variant", ["plain", "packed", "softcap", "sinks", "hard"])
def test_flex_errs_no_more_than_an_eager_reference_of_its_precision(dtype, T, window, D, variant):
    gate = "hard" if variant == "hard" else "soft"
    # The error of six sinks' gradients is six random numbers, too few to compare two implementations by.
    Hkv, group = (16, 3) if variant == "sinks" else (2, 3)
    H = Hkv * group
    *tensors, log_gate = inputs(2, Hkv, group, T, D, gate=gate, device="cuda")
    leaves = [*tensors, log_gate]
    options = dict(window=window)
    if variant == "packed":
        options["segment_ids"] = (torch.arange(T, device="cuda") // 90).expand(2, T)
    if variant == "softcap":
        options["softcap"] = 5.0
    if variant == "sinks":
        leaves.append(torch.randn(H, dtype=torch.float64, device="cuda"))
    grad = torch.randn(2, H, T, D, dtype=torch.float64, device="cuda")

    def run(dtype, implementation):
        given = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        # Gates stay in float32, as the model computes them.
        given[3] = leaves[3].detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        sinks = given[4] if variant == "sinks" else None
        out = gated_attention(*given[:4], sinks=sinks, implementation=implementation, **options)
        out.backward(grad.to(out.dtype))
        learnt = given if gate == "soft" else given[:3]
        return [out.detach(), *(g.grad for g in learnt)]

    exact = run(torch.float64, "reference")
    eager = run(dtype, "reference")
    flex = run(dtype, "flex")
    for name, e, r, f in zip(("out", "query", "key", "value", "log_gate", "sinks"), exact, eager, flex, strict=False):
        # A gate that no query meets has no gradient, and then both must be exactly zero.
        norm = e.norm().clamp_min(1e-12)
        eager_error, flex_error = ((x.double() - e).norm() / norm for x in (r, f))
        # float32 products run in tf32 inside FlexAttention, so float32 is held to half precision's error.
        floor = 2e-3 if dtype == torch.float32 else 0.0
        assert flex_error <= max(2 * eager_error, floor), (name, flex_error.item(), eager_error.item())
