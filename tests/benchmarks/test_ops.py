"""The benchmark's rows, references and figure, on small sizes and made-up times: nothing is timed here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, ops, ops_decode, ops_prefill, ops_train, run
from benchmarks.timing import (
    FIELDS,
    DeviceLostError,
    Job,
    Limits,
    Row,
    Session,
    Shape,
    Timing,
    compare_with_dense,
    fill,
    is_dense,
    label,
    new_row,
)
from spkv.ops import reference

CPU = torch.device("cpu")
LIMITS = Limits(copy_gb_per_s=2000.0, matmul_tflop_per_s=800.0)
SHAPE = Shape(16, 32768, 32, 8, 128, queries=1)


def timed(row: Row, milliseconds: float, **work: float) -> Row:
    fill(row, Timing(milliseconds, milliseconds * 0.9, milliseconds * 1.1, True), LIMITS, **work)
    return row


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr("benchmarks.timing.measure", lambda calls, **_: Timing(2.0, 1.0, 3.0, True))
    return Session(limits=LIMITS, l2_bytes=50 * 2**20)


def test_a_row_has_the_promised_fields_and_rates() -> None:
    row = timed(new_row("packed_decode", "fwd", SHAPE, "spkv triton", 0.25), 0.5, bytes=5e8)
    assert tuple(row) == FIELDS
    assert row["gb_per_s"] == pytest.approx(1000)
    assert row["percent_of_limit"] == pytest.approx(50)
    assert row["tflop_per_s"] is None
    assert timed(row, 1.0, flops=4e11)["percent_of_limit"] == pytest.approx(50)
    assert label(row) == "packed_decode fwd 16x32768 32/8x128 density 0.25 spkv triton"


def test_rows_are_compared_with_the_fastest_dense_of_their_case() -> None:
    rows = [
        timed(new_row("packed_decode", "fwd", SHAPE, "sdpa flash", 1.0), 4.0),
        timed(new_row("packed_decode", "fwd", SHAPE, "fa3", 1.0), 2.0),
        timed(new_row("packed_decode", "fwd", SHAPE, "spkv triton", 0.25), 0.5),
        timed(new_row("packed_decode", "fwd", dataclasses.replace(SHAPE, batch=1), "spkv triton", 0.25), 0.5),
        new_row("packed_decode", "fwd", SHAPE, "flashinfer xqa", 1.0),
    ]
    compare_with_dense(rows)
    assert [row["versus_fastest_dense"] for row in rows] == [0.5, 1.0, 4.0, None, None]
    assert [is_dense(row) for row in rows] == [True, True, False, False, True]


def test_a_wrong_or_failing_row_has_an_error_and_no_time(session: Session) -> None:
    def attempt(error: Callable[[], float]) -> Row:
        row = new_row("write", "fwd", SHAPE, "spkv triton")
        return session.run(row, lambda: Job([lambda: None], error, bytes=1e9))[0]

    right = attempt(lambda: 0.01)
    assert (right["error"], right["relative_error"], right["milliseconds"]) == (None, 0.01, 2.0)
    for wrong in (0.03, float("nan"), float("inf")):
        row = attempt(lambda wrong=wrong: wrong)
        assert "relative error" in row["error"]
        assert row["milliseconds"] is None
        json.dumps(row, allow_nan=False)

    def fail() -> float:
        raise ImportError("no module named fa3")

    assert attempt(fail)["error"] == "ImportError: no module named fa3"


def test_a_lost_device_ends_the_run(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceLostError) as found:
        session.run(new_row("write", "fwd", SHAPE, "spkv triton"), lambda: Job([lambda: None], lambda: 0.0))
    assert "illegal memory access" in found.value.row["error"]


def test_filters_and_the_time_limit(session: Session) -> None:
    job = Job([lambda: None], lambda: 0.0)
    row = new_row("packed_decode", "fwd", SHAPE, "fa3", 1.0)
    session.filters = ["16x32768", "fwd+bwd"]
    assert session.run(row, lambda: job) == [row]
    session.filters = ["fwd+bwd"]
    assert session.run(row, lambda: job) == []
    session.deadline = 0.0
    assert list(ops.rows(session, list(ops.CASES))) == []


def test_every_case_yields_labelled_rows(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "run", lambda self, row, build: [row])
    rows = list(ops.rows(session, list(ops.CASES)))
    labels = [label(row) for row in rows]
    assert len(set(labels)) == len(labels)
    for wanted in (
        "gated_attention fwd+bwd 1x32768 32/8x128 spkv triton",
        "gated_attention fwd 8x4096 9/3x64 sdpa cudnn",
        "pruned_prefill fwd 1x32768 32/8x128 density 0.25 skewed spkv triton",
        "pruned_prefill fwd 1x34816 chunk 2048 32/8x128 density 1 fa3",
        "packed_decode fwd 4x131072 32/8x128 density 0.1 spkv triton",
        "packed_decode fwd 16x32768 32/8x128 density 1 flashinfer xqa",
        "write fwd 16x4096 32/8x128 density 0.25 spkv triton",
    ):
        assert wanted in labels
    assert all(tuple(row) == FIELDS for row in rows)


def test_packed_layers_hold_what_they_say() -> None:
    shape = Shape(2, 600, 6, 3, 8, queries=1)
    layers = ops_decode.packed_layers(shape, [0.0, 0.3, 1.0], 3, CPU, spare=20)
    used = []
    for layer in layers:
        kept = layer.kept.view(2, 3)
        assert (kept[:, 0] == 0).all()
        assert (kept[:, 2] == 600 - ops_decode.WINDOW).all()
        for chain, pairs in enumerate(layer.kept.tolist()):
            used.append(layer.table[chain, : layer.ring_pages - (-pairs // layer.page_size)])
    pages = torch.cat([*used, layers[0].free])
    assert pages.unique().numel() == pages.numel() == layers[0].pool.shape[0]


def test_skewed_densities_have_the_stated_mean() -> None:
    assert sum(ops_decode.SKEWED) / len(ops_decode.SKEWED) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="8 KV heads, not 3"):
        ops_decode.head_densities(0.25, True, 3)


def test_the_decode_reference_is_the_definition(relative_error: Callable[[Tensor, Tensor], float]) -> None:
    shape = Shape(2, 300, 6, 3, 8, queries=1)
    (layer,) = ops_decode.packed_layers(shape, [0.0, 0.3, 1.0], 1, CPU)
    layer = dataclasses.replace(layer, pool=layer.pool.double())
    query = torch.randn(2, 6, 1, 8, dtype=torch.float64)
    expected = reference.packed_decode(query, layer, scale=8**-0.5)
    assert relative_error(ops_decode.expected_decode(query, layer), expected) < 1e-12


def test_a_write_is_compared_by_what_chains_hold() -> None:
    shape = Shape(2, 300, 6, 3, 8, queries=1)
    (layer,) = ops_decode.packed_layers(shape, [0.0, 0.3, 1.0], 1, CPU, spare=64)
    key, value = torch.randn(2, 2, 3, 1, 8, dtype=torch.bfloat16).unbind()
    keep = torch.rand(2, 3, 1) < 0.5

    def wrong(packed: object, key: Tensor, value: Tensor, keep: Tensor) -> None:
        reference.write(packed, key, value + 1, keep)

    assert ops_decode.write_error(reference.write, layer, key, value, keep) == 0
    assert ops_decode.write_error(wrong, layer, key, value, keep) > 0.02
    assert ops_decode.write_error(lambda *_: None, layer, key, value, keep) == float("inf")


@pytest.mark.parametrize("queries", [300, 70])
def test_the_prefill_reference_and_its_work(queries: int, relative_error: Callable[[Tensor, Tensor], float]) -> None:
    shape = Shape(1, 300 if queries == 300 else 370, 6, 3, 8, queries=queries)
    inputs = ops_prefill.make_inputs(shape, [0.0, 0.3, 1.0], CPU)
    inputs = {name: t.double() if name in ("query", "key", "value") else t for name, t in inputs.items()}
    if inputs["past"] is not None:
        inputs["past"] = dataclasses.replace(inputs["past"], pool=inputs["past"].pool.double())
    rows = ops_prefill.checked_rows(queries, CPU)
    expected = reference.pruned_prefill(**inputs, window=ops_prefill.WINDOW, scale=8**-0.5)
    assert relative_error(ops_prefill.expected_rows(inputs, rows), expected[:, :, rows]) < 1e-12

    keep, past, pairs = inputs["keep"][0], inputs["past"], 0
    ring_keep, old = keep[:, :0], torch.zeros(3)
    if past is not None:
        ring_keep, old = reference.ring_pairs(past, 0)[2], past.kept
    recent = torch.cat([ring_keep, keep], dim=1)
    index = torch.arange(recent.shape[1])
    distance = index[ring_keep.shape[1] :, None] - index
    pairs = ((distance >= 0) & ((distance < ops_prefill.WINDOW) | recent[:, None])).sum() + old.sum() * queries
    assert ops_prefill.visible_pairs(inputs) == int(pairs)


def test_the_training_reference_and_its_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(2, 200, 6, 3, 8)
    inputs = ops_train.make_inputs(shape, CPU)
    leaves = {n: inputs[n].detach().double().requires_grad_() for n in ("query", "key", "value", "log_gate")}
    out = reference.gated_attention(**leaves, window=ops_train.WINDOW, scale=8**-0.5)
    gradients = torch.autograd.grad(out, tuple(leaves.values()), inputs["grad"].double())
    results = {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}

    monkeypatch.setattr(ops_train, "_SCORE_BYTES", 8 * 2 * 200 * 64)  # several blocks of queries
    expected = {h: ops_train.expected_head(inputs, 1, h, True) for h in (0, 2)}
    assert ops_train.worst_error(results, expected, shape) < 1e-12
    for name in results:
        broken = results | {name: results[name] * 1.1}
        assert ops_train.worst_error(broken, expected, shape) == pytest.approx(0.1)
        broken[name] = results[name] * float("nan")
        assert not ops_train.worst_error(broken, expected, shape) <= 1
    assert set(ops_train.expected_head(inputs, 1, 0, False)) == {"out"}


def test_dense_caches_are_paged_in_the_order_of_the_table() -> None:
    cache = torch.randn(2, 3, 64, 8)
    table = baselines._page_table(2, 64, CPU)
    pool = baselines._paged(cache, table)
    for b in range(2):
        torch.testing.assert_close(pool[table[b].long()].transpose(0, 1).reshape(3, 64, 8), cache[b])
    with pytest.raises(baselines.UnavailableError, match="--flashinfer"):
        baselines.decode_baselines(None)["flashinfer xqa"]([(cache, cache, cache)])


def test_causal_sdpa_sees_all_keys_with_its_last_query() -> None:
    # On a CPU, the math backend stands in; what is tested is the expansion that follows when grouping fails.
    query, key = torch.randn(1, 6, 20, 8, requires_grad=True), torch.randn(1, 3, 20, 8, requires_grad=True)
    taken, note = baselines.sdpa_inputs(baselines.SDPBackend.MATH, (query, key, key), causal=True)
    out = baselines.sdpa(*taken, baselines.SDPBackend.MATH, causal=True)
    bias = reference.window_bias(torch.arange(20), torch.arange(20), None, 20)
    torch.testing.assert_close(out, reference.attend(query, key, key, bias, scale=8**-0.5))
    assert note == "enable_gqa"


def test_the_runner_without_cuda(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--suite", "ops"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--suite", "ops", "--cases", "train,paint"])
    assert "unknown: paint" in capsys.readouterr().err


def test_table_json_and_figure_of_made_up_rows(session: Session, tmp_path: Path) -> None:
    from benchmarks.figures import ops_figure

    def run_made_up(self: Session, row: Row, build: Callable[[], Job]) -> list[Row]:
        return [timed(row, 1.0 + (row["density"] or 1.0), flops=1e11)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "run", run_made_up)
        rows = list(ops.rows(session, list(ops.CASES)))
    rows[0] |= {"error": "ImportError: no\nmodule", "milliseconds": None}
    compare_with_dense(rows)
    text = run.table(rows)
    assert "ImportError: no" in text
    assert len(text.splitlines()) == len(rows) + 2
    result = {"device": "none", "versions": {"torch": "2"}, "rows": rows}
    run.save(result, tmp_path / "new" / "ops.json")
    assert json.loads((tmp_path / "new" / "ops.json").read_text()) == result
    figure = ops_figure(result)
    assert len(figure.axes) == 6
    assert all(axes.lines for axes in figure.axes)
    figure.savefig(tmp_path / "ops.png")
    assert (tmp_path / "ops.png").stat().st_size > 10_000
