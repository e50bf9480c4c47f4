"""Inspections: a model whose gates are known shows exactly those, in numbers, words and JSON."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

import spkv
from spkv.gates import SinkGate
from spkv.inspect import inspect_texts, write_inspection
from spkv.inspect.kinds import KINDS, count_kinds, describe, token_kinds
from spkv.inspect.memory import kv_bytes

WINDOW = 8
TEXT = "Room 12 has 345 chairs, <b>room</b> 6 has none; so 789 people stand."


@pytest.fixture
def inspection(known_gates, tokenizer):
    return inspect_texts(known_gates, tokenizer, [("rooms", TEXT), ("more", "7 of 9" * 10)], name="m", chunk_size=16)


def written(inspection, directory):
    """What the JSON file says."""
    return json.loads(Path(write_inspection(inspection, directory)["inspection_json"]).read_text(encoding="utf-8"))


def test_known_gates_are_shown_exactly(inspection, tmp_path):
    data = written(inspection, tmp_path / "new" / "folder")
    assert (data["model"], data["threshold"], data["window"], data["layers"]) == ("m", 0.5, WINDOW, [0, 1])
    for text, document in zip((TEXT, "7 of 9" * 10), data["documents"], strict=True):
        assert "".join(document["pieces"]) == text
        digits = [i for i, char in enumerate(text) if char.isdigit()]
        others = [i for i, char in enumerate(text) if not char.isdigit()]
        assert document["kept"] == [[digits, others], [list(range(len(text))), []]]
        assert all(u > 0.9 for u in (document["utilities"][0][0][i] for i in digits))
        assert document["utilities"][1][0] == [0.953] * len(text)  # sigmoid(3)
        left = len(text) - WINDOW
        share = sum(i < left for i in digits) / left
        assert document["density"] == pytest.approx((share + 1 - share + 1 + 0) / 4)
        for by_head, positions in zip(document["later_queries"][0], document["kept"][0], strict=True):
            assert len(by_head["positions"]) == len(positions)
            assert all(
                q == 0 or q >= s + WINDOW for s, own in zip(positions, by_head["positions"], strict=True) for q in own
            )
    joined = TEXT[:-WINDOW] + ("7 of 9" * 10)[:-WINDOW]
    share = sum(char.isdigit() for char in joined) / len(joined)
    assert data["density_by_head"] == [[pytest.approx(share), pytest.approx(1 - share)], [1.0, 0.0]]
    assert data["kinds"]["kept"][1] == [data["kinds"]["tokens"], [0] * len(KINDS)]
    numbers = KINDS.index("numbers")
    assert data["kinds"]["kept"][0][0][numbers] == data["kinds"]["tokens"][numbers]
    assert data["words"]["heads"][0][0].startswith(
        f"keeps {share:.1%} of what leaves the window: above all numbers (100%)"
    )
    assert data["words"]["heads"][1] == ["keeps everything that leaves the window", "keeps next to nothing"]
    assert sum(map(sum, (layer[0] for layer in data["utility_histogram"]))) == 2 * len(joined)
    assert data["undecided_by_head"] == [[0.0, 0.0], [0.0, 0.0]]


def test_position_bins_cover_what_has_left(inspection):
    document = inspection.documents[0]
    bins = document.position_bins()
    assert bins[0][0] == 0
    assert bins[-1][1] == document.left
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(bins))
    sizes = torch.tensor([stop - start for start, stop in bins])
    mean = (document.density_by_position() * sizes).sum(-1) / document.left
    torch.testing.assert_close(mean, document.densities.density_by_head())


def test_a_text_inside_the_window(known_gates, tokenizer, tmp_path):
    inspection = inspect_texts(known_gates, tokenizer, [("short", "Short")])
    data = written(inspection, tmp_path)
    assert data["density"] is None
    assert data["density_by_head"] == [[None, None], [None, None]]
    assert data["kept_fraction"] == 1
    assert data["words"]["all"] == "has nothing to keep yet: no token has left the window"
    assert data["documents"][0]["position_edges"] == []


def test_later_queries_can_be_left_out(known_gates, tokenizer, tmp_path):
    inspection = inspect_texts(known_gates, tokenizer, [("a", TEXT)], strongest=0)
    assert inspection.documents[0].later is None
    data = written(inspection, tmp_path)
    assert "later_queries" not in data["documents"][0]


def test_other_gates_have_no_threshold(known_gates, tokenizer):
    with spkv.attachment(known_gates).using(SinkGate(3)):
        inspection = inspect_texts(known_gates, tokenizer, [("a", TEXT)], limit=30)
    assert inspection.threshold is None
    assert inspection.density() == pytest.approx(3 / (30 - WINDOW))


def test_kinds_of_token():
    pieces = [
        "The",
        " old",
        " man",
        " of",
        " Par",
        "is",
        " (",
        "7",
        "3",
        ").",
        "\n",
        " ",
        "It",
        " x",
        " +=",
        " €",
        "½a",
    ]
    assert [KINDS[kind] for kind in token_kinds(pieces)] == [
        *["first tokens"] * 4, "names", "word parts", "punctuation", "numbers", "numbers", "punctuation", "line breaks",
        "spaces", "words", "words", "code symbols", "other", "other",
    ]  # fmt: skip
    tokens, kept = count_kinds(token_kinds(pieces), torch.ones(1, 2, len(pieces), dtype=torch.bool))
    assert tokens.tolist() == kept[0, 1].tolist()
    assert tokens.sum() == len(pieces)


def test_words_name_what_stands_out():
    counts = [4, 100, 0, 100, 5, 100, 100, 400, 100, 0]
    kept = [4, 10, 0, 90, 5, 10, 10, 20, 31, 0]
    said = describe(0.2, counts, kept, early=3.04)
    assert said == (
        "keeps 20.0% of what leaves the window: above all first tokens (100%), numbers (90%), word parts (31%); "
        "seldom words (5%), names (10%), punctuation (10%), line breaks (10%); 3.0× as often in the first tenth of a "
        "text as after it"
    )
    assert describe(0.001, counts, [4, *[0] * 9]) == "keeps next to nothing, but first tokens (100%)"
    assert describe(0.5, counts, [0.5 * n for n in counts]).endswith(
        "no kind of token much more or less often than the others"
    )


def test_memory_is_what_the_pool_would_hand_out(known_gates):
    found = spkv.attachment(known_gates)
    rows = kv_bytes(found, torch.tensor([[1.0, 0.0], [0.25, float("nan")]]), torch.bfloat16, [1000, 4])
    pair = 2 * 8 * 2
    assert rows[0]["dense_bytes"] == 4 * 1000 * pair
    pages = [1 + 62, 1 + 0, 1 + 16, 1 + 62]  # a ring page; 992, 0, 248 and 992 kept pairs
    assert rows[0]["pruned_bytes"] == sum(pages) * 16 * pair
    assert rows[0]["kept_fraction"] == pytest.approx((4 * WINDOW + 992 + 248 + 992) / 4000)
    assert rows[1]["kept_fraction"] == 1
    found.config = found.config.replace(sinks=4)  # of 992 pairs that leave the window, each head keeps 4 and of 988
    rows = kv_bytes(found, torch.tensor([[1.0, 0.0], [0.25, 0.5]]), torch.bfloat16, [1000])
    assert rows[0]["kept_fraction"] == pytest.approx((4 * (WINDOW + 4) + 988 + 247 + 494) / 4000)
    found.page_dtype = "int8"
    assert kv_bytes(found, torch.ones(2, 2), torch.bfloat16, [1000])[0]["pruned_bytes"] == 4 * 16 * (
        pair + 62 * 2 * (8 + 2)
    )


def test_sinks_are_not_taken_for_a_share_of_longer_texts(known_gates, tokenizer):
    found = spkv.attachment(known_gates)
    found.config = found.config.replace(sinks=4)
    inspection = inspect_texts(known_gates, tokenizer, [("a", "no digits here " * 4), ("b", "none here, either")])
    assert inspection.density_beyond_sinks().tolist() == [[0, 1], [1, 0]]
    assert inspection.density_by_head()[0, 0] == 8 / inspection.left
    for row in inspection.memory:
        held = 2 * row["tokens"] + 2 * (WINDOW + 4)
        assert row["kept_fraction"] == pytest.approx(held / (4 * row["tokens"]))


def test_bad_arguments_are_named(known_gates, tokenizer):
    with pytest.raises(ValueError, match="there is no text to inspect"):
        inspect_texts(known_gates, tokenizer, [])
    with pytest.raises(ValueError, match="the number of later queries must be at least 0, not -1"):
        inspect_texts(known_gates, tokenizer, [("a", "b")], strongest=-1)
