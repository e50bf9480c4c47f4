"""The Triton gated_attention against the float64 reference: in the interpreter at small sizes, on a GPU at real ones.

    TRITON_INTERPRET=1 python -m pytest tests/ops/test_triton_train.py

The interpreter multiplies bfloat16 wrongly, and with numpy 2.4 or later Triton 3.6's cannot run a loop over a range.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spkv.ops import reference

triton = pytest.importorskip("triton")
INTERPRETED = triton.knobs.runtime.interpret
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from spkv.ops.triton import train  # noqa: E402
from spkv.ops.triton.train import Tile, Tiles  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
SMALL = Tiles(*[Tile(16, 16, 4, 1)] * 3)
# Uneven on purpose: more queries than keys, then more keys than queries.
TALL = Tiles(Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1))
DESCRIBED = Tiles(*[Tile(16, 16, 4, 1, described=True)] * 3)
WIDE = Tiles(Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1))
NAMES = ("out", "query", "key", "value", "log_gate", "sinks")


class Case:
    """Inputs in float64, and the output and all gradients that an implementation makes of them in a dtype."""

    def __init__(
        self,
        B=1,
        Hkv=2,
        group=2,
        T=53,
        D=16,
        *,
        window=7,
        gate="soft",
        segments=None,
        softcap=None,
        sinks=False,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

        H = Hkv * group
        self.query, self.key, self.value = draw(B, H, T, D), draw(B, Hkv, T, D), draw(B, Hkv, T, D)
        self.grad, self.sinks = draw(B, H, T, D), draw(H) if sinks else None
        raw = draw(B, Hkv, T)
        self.log_gate = {
            "none": None,
            "sliding": None,  # no gate, and nothing past the window
            "soft": torch.nn.functional.logsigmoid(2 * raw),
            "hard": torch.zeros_like(raw).masked_fill(raw > 0, float("-inf")),
            "dropped": torch.full_like(raw, float("-inf")),
            "kept": torch.zeros_like(raw),
        }[gate]
        self.segment_ids = None if segments is None else torch.as_tensor(segments, device=DEVICE).expand(B, T)
        self.options = dict(window=window, scale=D**-0.5, segment_ids=self.segment_ids, softcap=softcap)
        self.options |= dict(sliding=gate == "sliding")

    def run(self, function, dtype, **extra):
        wide = torch.promote_types(dtype, torch.float32)  # of the gates and the sinks, as the model computes them
        leaves = {
            name: None if tensor is None else tensor.detach().to(kind, copy=True).requires_grad_()
            for name, tensor, kind in (
                ("query", self.query, dtype),
                ("key", self.key, dtype),
                ("value", self.value, dtype),
                ("log_gate", self.log_gate, wide),
                ("sinks", self.sinks, wide),
            )
        }
        out = function(**leaves, **self.options, **extra)
        out.backward(self.grad.to(dtype))
        results = {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}
        return {name: results[name] for name in NAMES if name in results}

    def check(self, dtype, tiles=None, slack=0.0):
        """Hold the kernels to twice the error of an eager reference of the same precision.

        `slack` times the dtype's rounding of values of order one comes on top where few values make luck count.
        """
        exact = self.run(reference.gated_attention, torch.float64)
        eager = self.run(reference.gated_attention, dtype)
        actual = self.run(train.gated_attention, dtype, tiles=tiles)
        for name, e in exact.items():
            assert actual[name].shape == e.shape
            assert actual[name].isfinite().all(), name
            error, eager_error = ((x[name].double() - e).norm().item() for x in (actual, eager))
            allowed = 2 * eager_error
            if e.any():
                allowed += slack * torch.finfo(dtype).eps * (e.norm().item() + e.numel() ** 0.5)
            elif name in ("query", "key"):
                # Where a query sees itself alone, its gradient is the difference of two equal sums of D products
                # each, which are added up in float32 in another order.
                allowed += torch.finfo(torch.float32).eps * (e.numel() * e.shape[-1]) ** 0.5
            assert error <= allowed, (name, error, eager_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(gate="none"),
        dict(gate="hard"),
        dict(gate="dropped"),
        dict(gate="kept"),
        dict(gate="sliding"),
        dict(gate="sliding", window=1),
        dict(gate="sliding", window=60),
        dict(gate="sliding", window=21, segments=[0] * 5 + [1] * 30 + [2] * 18),
        dict(softcap=2.0),
        dict(segments=[0] * 5 + [1] * 30 + [2] * 18),
        dict(segments=([4] * 9 + [1] * 8 + [4] * 15 + [0] * 21)),
        dict(D=24, T=40, window=16),
        dict(T=64, window=1),
        dict(T=33, window=40),
        dict(group=1, Hkv=3, T=49, window=17),
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_errs_no_more_than_an_eager_reference(dtype, options):
    Case(**options).check(dtype, SMALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tiles", [TALL, WIDE, DESCRIBED])
def test_everything_at_once_and_uneven_tiles(dtype, tiles):
    Case(T=80, window=9, softcap=3.0, sinks=True, segments=torch.arange(80) // 47).check(dtype, tiles, slack=0.25)


@settings(max_examples=10)
@given(
    B=st.integers(1, 2),
    Hkv=st.integers(1, 2),
    group=st.integers(1, 3),
    T=st.integers(1, 48),
    D=st.sampled_from([8, 16, 24, 32]),
    window=st.integers(1, 70),
    gate=st.sampled_from(["none", "sliding", "soft", "hard", "dropped", "kept"]),
    softcap=st.sampled_from([None, 1.5]),
    sinks=st.booleans(),
    lengths=st.none() | st.lists(st.integers(1, 40), min_size=1, max_size=6),
    tiles=st.sampled_from([SMALL, TALL, WIDE, DESCRIBED]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(B, Hkv, group, T, D, window, gate, softcap, sinks, lengths, tiles, dtype, seed):
    segments = None
    if lengths is not None:  # documents of these lengths, the last as long as needed
        segments = torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([*lengths, T]))[:T]
    Case(
        B, Hkv, group, T, D, window=window, gate=gate, segments=segments, softcap=softcap, sinks=sinks, seed=seed
    ).check(dtype, tiles, slack=1.0)


@settings(max_examples=40)
@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    M=st.sampled_from([1, 2, 4]),
    N=st.sampled_from([1, 2, 4]),
    window=st.integers(0, 12),
)
def test_ranges_leave_out_nothing_and_full_tiles_are_full(ids, M, N, window):
    T = len(ids)
    segment_ids = torch.tensor([ids])
    index = torch.arange(T)
    visible = (segment_ids[0][:, None] == segment_ids[0]) & (index[:, None] >= index)
    full = visible & (index[:, None] - index >= window)
    tile = Tile(M, N, 4, 1)
    for m, (start, full_start) in enumerate(train._key_ranges(segment_ids, tile, window)[0].tolist()):
        rows = slice(m * M, m * M + M)
        full_end = max(m * M + 1 - window, 0) // N
        assert not visible[rows, : start * N].any()
        assert full[rows, full_start * N : full_end * N].all()
        assert start <= full_start or full_start == full_end  # no tile twice: the second walk starts at full_start
    for n, (full_end, end) in enumerate(train._query_ranges(segment_ids, tile, window)[0].tolist()):
        columns = slice(n * N, n * N + N)
        full_start = -(-(n * N + N - 1 + window) // M)
        assert not visible[end * M :, columns].any()
        assert full[full_start * M : full_end * M, columns].all()


def test_results_are_the_same_from_run_to_run():
    case = Case(softcap=3.0, sinks=True, segments=torch.arange(53) // 20)
    first, second = (case.run(train.gated_attention, torch.float32, tiles=SMALL) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_nothing_beyond_the_tensors_is_read_into_a_result():
    """Inputs are views into buffers of NaN: a row, a head, a column too far would show."""
    B, T, D = 1, 37, 20
    case = Case(B, 1, 2, T, D, window=5)

    def poisoned(tensor):
        buffer = torch.full([size + 4 for size in tensor.shape], float("nan"), device=DEVICE)
        view = buffer[tuple(slice(2, 2 + size) for size in tensor.shape)]
        return view.copy_(tensor)

    leaves = [poisoned(t).requires_grad_() for t in (case.query, case.key, case.value)]
    gate = case.log_gate.float().requires_grad_()
    out = train.gated_attention(*leaves, gate, **case.options, tiles=SMALL)
    out.backward(poisoned(case.grad))
    plain = case.run(train.gated_attention, torch.float32, tiles=SMALL)
    for name, tensor in zip(NAMES, (out.detach(), *(leaf.grad for leaf in leaves), gate.grad), strict=False):
        assert torch.equal(tensor, plain[name]), name


def test_strides_of_a_model_and_a_broadcast_gradient():
    """Heads behind tokens, as a projection leaves them; the gradient of a sum has strides of 0."""
    case = Case()
    leaves = [t.float() for t in (case.query, case.key, case.value)]
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in leaves]
    results = []
    for tensors in (leaves, turned):
        tensors = [t.requires_grad_() for t in tensors]
        out = train.gated_attention(*tensors, case.log_gate.float(), **case.options, tiles=SMALL)
        out.sum().backward()
        results.append([out.detach(), *(t.grad for t in tensors)])
    for plain, strided in zip(*results, strict=True):
        assert torch.equal(plain, strided)


def test_a_gate_that_no_query_meets_has_a_gradient_of_zero():
    results = Case(T=20, window=20).run(train.gated_attention, torch.float32, tiles=SMALL)
    assert not results["log_gate"].any()


def test_a_dropped_pair_has_a_gradient_of_zero():
    case = Case(gate="hard")
    results = case.run(train.gated_attention, torch.float32, tiles=SMALL)
    assert not results["log_gate"][case.log_gate == float("-inf")].any()


def test_only_the_gradients_asked_for():
    case = Case()
    query, key, value, gate = (t.float() for t in (case.query, case.key, case.value, case.log_gate))
    train.gated_attention(query, key, value, gate.requires_grad_(), **case.options, tiles=SMALL).sum().backward()
    assert gate.grad is not None
    train.gated_attention(query.requires_grad_(), key, value, None, **case.options, tiles=SMALL).sum().backward()
    assert query.grad is not None
    assert key.grad is None


def test_a_view_that_starts_off_16_bytes():
    case = Case()
    leaves = [t.float() for t in (case.query, case.key, case.value)]
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for t in leaves]
    plain, view = (
        train.gated_attention(*t, case.log_gate.float(), **case.options, tiles=DESCRIBED) for t in (leaves, shifted)
    )
    assert torch.equal(plain, view)


def test_segments_changed_before_the_backward_pass_are_refused():
    case = Case(segments=torch.arange(53) // 20)
    case.segment_ids = case.options["segment_ids"] = case.segment_ids.contiguous()
    query = case.query.float().requires_grad_()
    out = train.gated_attention(query, case.key.float(), case.value.float(), None, **case.options, tiles=SMALL)
    case.segment_ids.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


def test_a_head_too_large_is_named():
    tensor = torch.zeros(1, 1, 4, 320, device=DEVICE)
    with pytest.raises(ValueError, match="head sizes up to 256, not 320"):
        train.gated_attention(tensor, tensor, tensor, None, window=2, scale=1.0)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="at these sizes the interpreter takes hours")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("T", "window", "D"),
    [(300, 128, 64), (129, 17, 128), (64, 100, 64), (1000, 1, 96), (777, 100, 256), (4100, 128, 64)],
)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(gate="hard"),
        dict(gate="dropped"),
        dict(gate="sliding"),
        dict(gate="sliding", packed=400),
        dict(packed=90),
        dict(packed=400),
        dict(softcap=5.0),
        dict(sinks=True),
    ],
    ids=str,
)
def test_errs_no_more_than_an_eager_reference_at_the_tiles_of_the_table(dtype, T, window, D, options):
    options = dict(options)
    if packed := options.pop("packed", None):
        options["segments"] = torch.arange(T) // packed
    case = Case(2, 2, 3, T, D, window=window, **options)
    case.check(dtype, slack=0.25 if "sinks" in options else 0.0)


@pytest.mark.parametrize("D", [64, 128, 256])
def test_tiles_for_other_gpus(monkeypatch, D):
    monkeypatch.setattr(train, "is_tuned_for", lambda device: False)
    tiles = train._choose_tiles(torch.empty(1, D, dtype=torch.bfloat16))
    assert not any(tile.described for tile in tiles)
    Case(1, 1, 2, 150, D, window=20, segments=torch.arange(150) // 90).check(torch.float16, tiles)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="at these sizes the interpreter takes hours")
@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_results_are_the_same_from_run_to_run_on_a_gpu(D):
    case = Case(2, 2, 4, 2049, D, window=128, sinks=True, segments=torch.arange(2049) // 700)
    first = case.run(train.gated_attention, torch.bfloat16)
    for _ in range(3):
        for name, tensor in case.run(train.gated_attention, torch.bfloat16).items():
            assert torch.equal(tensor, first[name]), name
