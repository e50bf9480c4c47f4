"""Loss under policies: equal to masked forwards, and the policies keep what they should."""

from __future__ import annotations

import gzip
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

import spkv
from spkv.evals import Losses, Policy, cut_sequences, evaluate, evaluate_nll, layout_policies, make_policies
from spkv.gates import OpenGate, RandomGate, ThresholdGate
from spkv.text import prefix_ids

W, N, L = 8, 3, 120


def tokenizer(texts: list[str], prefix: str = "", **options) -> SimpleNamespace:
    """One token a character."""
    assert options["split_special_tokens"]
    return SimpleNamespace(input_ids=[[ord(character) for character in prefix + text] for text in texts])


def characters(ids: torch.Tensor) -> str:
    return "".join(map(chr, ids.tolist()))


@pytest.fixture
def model(tiny_llama: PreTrainedModel, scatter_utilities) -> PreTrainedModel:
    spkv.attach(tiny_llama, spkv.SPKVConfig(window=W))
    scatter_utilities(tiny_llama)
    return tiny_llama


@pytest.fixture
def sequences() -> torch.Tensor:
    return torch.randint(1, 97, (N, L))


def masked_loss(model: PreTrainedModel, sequences: torch.Tensor, gate) -> float:
    found = spkv.attachment(model)
    found.oracle = True
    with found.using(gate), torch.no_grad():
        loss = model(sequences, labels=sequences, use_cache=False).loss.item()
    found.oracle = False
    return loss


@pytest.mark.parametrize(("batch_size", "chunk_size"), [(1, 1024), (2, 32), (3, 7)])
def test_loss_is_that_of_the_masked_forward(model, sequences, batch_size, chunk_size):
    policies = make_policies(["dense", "spkv", "streaming"], [0.3, 0.7])
    rows = evaluate_nll(model, sequences, policies, batch_size=batch_size, chunk_size=chunk_size)
    assert [(row["policy"], row["threshold"]) for row in rows] == [
        ("dense", None), ("spkv", 0.3), ("spkv", 0.7), ("streaming", None),
    ]  # fmt: skip
    for row, policy in zip(rows, policies, strict=True):
        gate = policy.gate or OpenGate()
        assert row["loss"] == pytest.approx(masked_loss(model, sequences, gate), rel=1e-5)
        assert (row["examples"], row["tokens"], row["length"]) == (N, N * L, L)
    assert rows[1]["density"] > rows[2]["density"] > 0


def test_densities_are_those_of_the_decisions(model, sequences):
    found = spkv.attachment(model)
    with found.record() as record, torch.no_grad():
        model(sequences, use_cache=False)
    keep = torch.stack([record.utilities[layer] for layer in found.layers])[..., : L - W] >= 0.5
    row = evaluate_nll(model, sequences, make_policies(["spkv"], [0.5]), batch_size=2)[0]
    assert row["density"] == pytest.approx(keep.double().mean().item(), rel=1e-9)
    assert row["kept_fraction"] == pytest.approx((W + row["density"] * (L - W)) / L, rel=1e-9)


def test_open_gates_equal_dense(model, sequences):
    dense, opened = evaluate_nll(model, sequences, [Policy("dense"), Policy("open", OpenGate())])
    assert opened["loss"] == pytest.approx(dense["loss"], rel=1e-6)
    assert (dense["density"], dense["kept_fraction"]) == (opened["density"], opened["kept_fraction"]) == (1.0, 1.0)


def test_streaming_keeps_four_sinks(model, sequences):
    row = evaluate_nll(model, sequences, make_policies(["streaming"], []))[0]
    assert row["density"] == pytest.approx(4 / (L - W))


@pytest.mark.parametrize(("thresholds", "matched"), [([0.3, 0.5, 0.7], 0.5), ([0.2, 0.4, 0.8], 0.4), ([0.2, 0.8], 0.2)])
def test_random_copies_the_density_of_spkv(model, sequences, thresholds, matched):
    # First in the list, though evaluated last.
    rows = evaluate_nll(model, sequences, make_policies(["random", "spkv"], thresholds))
    assert rows[0]["policy"] == "random"
    wanted = next(row["density"] for row in rows[1:] if row["threshold"] == matched)
    # Four standard deviations of the share of 112 positions in 4 heads.
    assert rows[0]["density"] == pytest.approx(wanted, abs=0.095)
    assert rows[0]["loss"] == pytest.approx(masked_loss(model, sequences, RandomGate(wanted)), rel=1e-5)


def test_a_static_layout_is_evaluated_by_its_own_policies(sequences, tiny_llama):
    model = spkv.attach(tiny_llama, spkv.SPKVConfig(window=5, layout=((0,), ())))
    found = spkv.attachment(model)
    policies = layout_policies(("dense", "spkv", "streaming", "random"), found.gate, found.layout_density())
    rows = evaluate_nll(model, sequences, policies)
    assert [row["threshold"] for row in rows] == [None] * 4
    assert [row["density"] for row in rows[:2]] == [1, 0.25]
    assert 0 < rows[2]["density"] < 0.2
    assert rows[3]["density"] == pytest.approx(0.25, abs=0.1)
    masked = evaluate(model, [Losses(sequences)], policies, oracle=True)
    for key in ("density", "kept_fraction"):
        assert [row[key] for row in masked] == pytest.approx([row[key] for row in rows])
    found.oracle = True
    with torch.no_grad():
        losses = [model(one[None], labels=one[None], use_cache=False).loss.item() for one in sequences]
    assert rows[1]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_model_is_left_as_it_was(model, sequences):
    gate = spkv.attachment(model).gate
    evaluate_nll(model, sequences[:1], make_policies())
    assert spkv.attachment(model).gate == gate == ThresholdGate(0.5)
    assert not spkv.attachment(model).suspended


def test_progress_runs_from_start_to_end(model, sequences):
    seen = []
    evaluate_nll(model, sequences, make_policies(), batch_size=2, chunk_size=50, progress=lambda *a: seen.append(a))
    done = [entry[1] for entry in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1][2] == 4 * N * L


def test_sequences_are_pieces_of_documents(tmp_path):
    texts = ["a" * 25, "b" * 9, "c" * 31, "<|endoftext|>"]
    path = tmp_path / "data.jsonl.gz"
    with gzip.open(path, "wt") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    more = tmp_path / "more.txt"
    more.write_text("d" * 10)
    seen = []
    sequences = cut_sequences([path, more], tokenizer, 10, progress=lambda *a: seen.append(a))
    assert [characters(row) for row in sequences] == [
        "a" * 10, "a" * 10, "c" * 10, "c" * 10, "c" * 10, "<|endoftex", "d" * 10,
    ]  # fmt: skip
    assert seen[-1] == ("tokenising", 2, 2)
    spread = cut_sequences([path, more], tokenizer, 10, limit=3)
    assert [characters(row)[0] for row in spread] == ["a", "c", "c"]


def test_every_piece_begins_as_the_tokenizer_begins_a_text(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("abcdefghijklmnopqrs")
    sequences = cut_sequences([path], partial(tokenizer, prefix="^"), 7)
    assert [characters(row) for row in sequences] == ["^abcdef", "^ghijkl", "^mnopqr"]
    with pytest.raises(ValueError, match="must exceed the 2 tokens that begin every text; it is 2"):
        cut_sequences([path], partial(tokenizer, prefix="<>"), 2)


def test_prefixes_are_found_beside_endings():
    def ended(texts, **options):
        return SimpleNamespace(input_ids=[[1, *map(ord, text), 2] for text in texts])

    assert prefix_ids(ended) == [1]
    assert prefix_ids(tokenizer) == []


@pytest.mark.parametrize("policy", [Policy("spkv", ThresholdGate(0.5), threshold=0.5), Policy("dense")])
def test_a_mask_in_place_of_the_cache_measures_the_same(model, sequences, policy):
    job = Losses(sequences)
    (cached,), (masked,) = (evaluate(model, [job], [policy], oracle=oracle) for oracle in (False, True))
    assert masked.pop("kv_bytes") is None
    for name in ("loss", "continuation_loss", "density", "kept_fraction", "context_kept_fraction"):
        assert masked[name] == pytest.approx(cached[name], rel=1e-5)
    assert not spkv.attachment(model).oracle


def test_losses_are_told_apart_by_position(model, sequences):
    row = evaluate_nll(model, sequences, [Policy("dense")])[0]
    with torch.no_grad(), spkv.dense(model):
        logits = model(sequences).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), sequences[:, 1:], reduction="none")
    losses = torch.cat([torch.full((N, 1), float("nan")), losses], dim=1)  # nothing predicts the first token
    assert [(bucket["start"], bucket["stop"]) for bucket in row["by_position"]] == [(s, s + 8) for s in range(0, L, 8)]
    for bucket in row["by_position"]:
        expected = losses[:, bucket["start"] : bucket["stop"]].nanmean().item()
        assert bucket["loss"] == pytest.approx(expected, rel=1e-5)
    assert row["continuation_loss"] == pytest.approx(losses[:, -L // 4 :].mean().item(), rel=1e-5)


@pytest.mark.parametrize("prefix", [[], [5]])
def test_sequences_beyond_the_positions_are_read_in_windows(model, sequences, prefix):
    model.config.max_position_embeddings = 50
    job = Losses(sequences, prefix)
    windows = job._windows(model)
    counted = [token for _, first, stop in windows for token in range(first, stop)]
    assert counted == list(range(L))
    room = 50 - len(prefix)
    assert all(first - start >= room // 2 and stop - start == room for start, first, stop in windows[1:])
    row = evaluate(model, [job], [Policy("dense")])[0]
    begun = torch.tensor([prefix] * N, dtype=torch.long).view(N, -1)
    total = 0.0
    for start, first, stop in windows:
        piece = torch.cat([begun if start else begun[:, :0], sequences[:, start:stop]], dim=1)
        with torch.no_grad(), spkv.dense(model):
            logits = model(piece).logits[:, -(stop - first) - 1 if first else 0 : -1]
        wanted = sequences[:, first or 1 : stop]
        total += torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="sum").item()
    assert row["loss"] == pytest.approx(total / (N * (L - 1)), rel=1e-5)


def test_bad_data_are_named(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("only a few words")
    with pytest.raises(ValueError, match=r"no document has 1,000 tokens \(sequence_length\); the longest has 16"):
        cut_sequences([path], tokenizer, 1000)
    with pytest.raises(ValueError, match="no data files were given"):
        cut_sequences([], tokenizer, 10)
    with pytest.raises(FileNotFoundError, match=r"no such data file: .*absent"):
        cut_sequences([path, tmp_path / "absent"], tokenizer, 10)
    with pytest.raises(ValueError, match="sequence_length must be at least 2, not 1"):
        cut_sequences([path], tokenizer, 1)
    with pytest.raises(ValueError, match="limit must be at least 1 sequence, not 0"):
        cut_sequences([path], tokenizer, 10, limit=0)


def test_bad_policies_are_named(model, sequences):
    with pytest.raises(ValueError, match=r"unknown policies \['h3o'\]; known are dense, spkv, streaming, random"):
        make_policies(["dense", "h3o"])
    with pytest.raises(ValueError, match=r"strictly between 0 and 1, not 1\.0"):
        make_policies(["spkv"], [1.0])
    with pytest.raises(ValueError, match="policy random takes its density from policy spkv"):
        make_policies(["random"], [0.5])
    with pytest.raises(ValueError, match="needs at least one threshold"):
        make_policies(["spkv"], [])
    with pytest.raises(ValueError, match=r"threshold 0\.5, which is not evaluated; evaluated are \[\]"):
        evaluate_nll(model, sequences, [Policy("random", match_threshold=0.5)])


def test_lengths_that_do_not_fit_are_named(model, sequences):
    with pytest.raises(ValueError, match="must exceed the window of 8 tokens, which is never pruned; it is 8"):
        evaluate_nll(model, sequences[:, :W], make_policies())
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        evaluate_nll(model, sequences, make_policies(), batch_size=0)
    with pytest.raises(ValueError, match=r"must be \[N, L\] and not empty, got shape \[0, 120\]"):
        evaluate_nll(model, sequences[:0], make_policies())
