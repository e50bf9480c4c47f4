"""The suite of whole models: its rows, the figure, and what is read from Nsight Compute; without a GPU."""

import json

import pytest

from benchmarks import counters, generate
from benchmarks.figures import RESULTS, generation_figure


def test_rows_say_what_was_measured():
    row = generate._row("m", "spkv", "compiled", "decode", 4, 100, 0.25, 2.0, kv_bytes=10)
    assert row["tokens_per_second"] == pytest.approx(2000)
    assert row["versus_dense"] is None
    prefill = generate._row("m", "dense", "eager", "prefill", 1, 100, 1.0, 2.0)
    assert prefill["tokens_per_second"] == pytest.approx(50_000)
    assert prefill["versus_dense"] == 1.0
    assert generate.line(row).split() == ["m", "decode", "4", "x", "100", "spkv", "compiled", "0.250", "2.000"]


def test_the_committed_rows_agree_with_themselves_and_can_be_drawn():
    result = json.loads((RESULTS / "generate.json").read_text(encoding="utf-8"))
    assert {"device", "commit", "command", "versions", "limits", "rows"} <= result.keys()
    for row in result["rows"]:
        assert row["milliseconds_per_step"] > 0
        tokens = row["batch"] * (row["length"] if row["phase"] == "prefill" else 1)
        assert row["tokens_per_second"] == pytest.approx(1e3 * tokens / row["milliseconds_per_step"])
    assert len(generation_figure(result).axes) == 2


def test_counters_are_read_from_what_ncu_writes(tmp_path):
    columns = ["Kernel Name", "Grid Size", "Block Size", *(column for column, _ in counters._COUNTERS.values())]
    stalls = [f"{counters._STALL}{name}_per_issue_active.ratio" for name in ("wait", "barrier", "selected")]
    numbers = ["1,167,232", *["50.5"] * (len(counters._COUNTERS) - 2), "no data"]
    lines = ["==PROF== noise", *(",".join(f'"{cell}"' for cell in cells) for cells in (
        [*columns, *stalls],
        [""] * (len(columns) + 3),
        ["_forward", "(32, 64, 1)", "(128, 1, 1)", *numbers, "1.5", "2.5", "1"],
    ))]  # fmt: skip
    (tmp_path / "ncu.csv").write_text("\n".join(lines), encoding="utf-8")
    (row,) = counters.read(tmp_path / "ncu.csv")
    assert row["kernel"] == "_forward"
    assert row["microseconds"] == pytest.approx(1167.232)
    assert row["tensor_core_percent"] == 50.5
    assert row["spilling_instructions"] == 0
    assert list(row["stalled_warps_by_issue"].items()) == [("barrier", 2.5), ("wait", 1.5)]
