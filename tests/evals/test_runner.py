"""Evaluations of tasks answered in words: equal to dense where all is kept, saved, continued, and the same twice."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import spkv
from spkv.evals import Answers, Losses, Policy, evaluate, make_policies
from spkv.evals.records import ARGUMENTS_FILE, EXAMPLES_FILE, RESULTS_FILE
from spkv.evals.report import load_results
from spkv.gates import OpenGate

LENGTH, COUNT = 200, 5


@pytest.fixture
def job(tokenizer, letters):
    return Answers(letters(), tokenizer, LENGTH, COUNT, seed=3)


def untimed(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("context", [120, 0])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_policy_that_keeps_everything_scores_as_dense(words_model, tokenizer, letters, batch_size, context):
    jobs = [Answers(letters(context=context, turns=turns), tokenizer, LENGTH, COUNT, seed=0) for turns in (1, 3)]
    jobs[1].name = "letters in turn"
    policies = [Policy("dense"), Policy("open", OpenGate())]
    rows = evaluate(words_model, jobs, policies, batch_size=batch_size, chunk_size=50)
    assert [(row["task"], row["policy"]) for row in rows] == [
        ("letters", "dense"), ("letters", "open"), ("letters in turn", "dense"), ("letters in turn", "open"),
    ]  # fmt: skip
    for dense, opened in (rows[:2], rows[2:]):
        assert 0 < dense["score"] < 1
        for name in ("score", "kept_fraction", "by_fact", "by_turn", "tokens"):
            assert opened[name] == dense[name]
        assert dense["kept_fraction"] == 1


@pytest.mark.parametrize("batch", [[0], [0, 1]])
def test_answers_end_before_a_token_that_holds_what_stops_them(words_model, tokenizer, letters, batch):
    class Stopped(letters):
        def examples(self, *arguments):
            made = super().examples(*arguments)
            questions = [tuple(dataclasses.replace(q, stop=stop) for q in example.questions) for example in made]
            return [dataclasses.replace(e, questions=q) for e, q in zip(made, questions, strict=True)]

    def answers():
        job = Answers(Stopped(turns=1), tokenizer, LENGTH, 2, seed=3)
        return [record["answers"][0] for record in job.run(words_model, batch, chunk_size=64)]

    stop = ""
    free = answers()
    stop = next(letter for letter in free[0][1:] if letter.isascii())
    assert answers() == [text.partition(stop)[0] for text in free]


def test_policies_of_one_name_are_refused(words_model, job):
    with pytest.raises(ValueError, match="several policies are called mine: their results"):
        evaluate(words_model, [job], [Policy("mine", OpenGate()), Policy("dense"), Policy("mine")])


def test_rows_tell_what_was_measured(words_model, job):
    rows = evaluate(words_model, [job], make_policies(["dense", "spkv", "random"], [0.3, 0.7]), batch_size=2)
    spkv_low, spkv_high, random = rows[1:]
    assert [row["threshold"] for row in rows] == [None, 0.3, 0.7, None]
    assert [row["match_threshold"] for row in rows] == [None, None, None, 0.3]
    assert 1 > spkv_low["kept_fraction"] > spkv_high["kept_fraction"] > 0
    assert spkv_low["kv_bytes"] > spkv_high["kv_bytes"]
    assert random["density"] == pytest.approx(spkv_low["density"], abs=0.1)
    for row in rows:
        assert (row["task"], row["length"], row["examples"], row["loss"]) == ("letters", LENGTH, COUNT, None)
        assert list(row["by_fact"]) == ["place", "kind"]
        assert {value: group["examples"] for value, group in row["by_fact"]["place"].items()} == {"0": 3, "1": 2}
        mean = sum(group["score"] * group["examples"] for group in row["by_fact"]["place"].values()) / COUNT
        assert row["score"] == pytest.approx(mean)
        assert sum(row["by_turn"]) / 2 == pytest.approx(row["score"])


def test_batches_are_of_like_lengths(words_model, job):
    assert job.batches(words_model, 2) == [[0, 3], [1, 4], [2]]


def test_two_evaluations_are_the_same(words_model, tokenizer, letters, tmp_path):
    texts = torch.randint(1, 256, (3, 90))
    for name in ("one", "two"):
        jobs = [Answers(letters(), tokenizer, LENGTH, COUNT, seed=3), Losses(texts)]
        rows = evaluate(words_model, jobs, make_policies(), batch_size=2, output=tmp_path / name)
    one, two = ((tmp_path / name / RESULTS_FILE).read_bytes() for name in ("one", "two"))
    assert one == two
    assert [row["seconds"] for row in load_results(tmp_path / "two")["rows"]] == [row["seconds"] for row in rows]


def test_rows_tell_how_sure_a_difference_is(words_model, job, tmp_path):
    dense, pruned = evaluate(words_model, [job], make_policies(["dense", "spkv"]), output=tmp_path)
    assert dense["standard_error"] == {}
    records = [json.loads(line) for line in (tmp_path / EXAMPLES_FILE).read_text().splitlines()]
    scores = {(record["policy"], record["example"]): record["score"] for record in records}
    differences = torch.tensor([scores["spkv 0.5", i] - scores["dense", i] for i in range(COUNT)])
    assert differences.std() > 0
    assert pruned["standard_error"] == {"score": pytest.approx(float(differences.std()) / COUNT**0.5)}


def test_other_weights_or_references_do_not_go_on(words_model, tokenizer, letters, job, tmp_path):
    policies = make_policies(["dense"])
    before = evaluate(words_model, [job], policies, output=tmp_path)
    assert evaluate(words_model, [job], policies, output=tmp_path) == before
    other = Answers(letters(), tokenizer, LENGTH, COUNT, seed=3)
    example = other.examples[0]
    questions = tuple(dataclasses.replace(question, references=("999",)) for question in example.questions)
    other.examples[0] = dataclasses.replace(example, questions=questions)
    with pytest.raises(ValueError, match="an evaluation with other arguments: examples"):
        evaluate(words_model, [other], policies, output=tmp_path)
    with torch.no_grad():
        for weight in words_model.parameters():
            weight.mul_(1.01)
    with pytest.raises(ValueError, match="an evaluation of the model with other weights: choose another directory"):
        evaluate(words_model, [job], policies, output=tmp_path)


class InterruptedHereError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 8])
def test_an_interrupted_evaluation_goes_on(words_model, job, tmp_path, after):
    policies = make_policies()
    whole = evaluate(words_model, [job], policies, batch_size=2)
    seen = []

    def stop(stage, done, total):
        seen.append(done)
        if len(seen) == after:
            raise InterruptedHereError

    with pytest.raises(InterruptedHereError):
        evaluate(words_model, [job], policies, batch_size=2, output=tmp_path, progress=stop)
    file = tmp_path / EXAMPLES_FILE
    before = file.read_text()
    with file.open("a") as stream:
        stream.write('{"task": "letters", "length": 200, "poli')
    done = []
    rows = evaluate(words_model, [job], policies, batch_size=2, output=tmp_path, progress=lambda *a: done.append(a))
    assert untimed(rows) == untimed(whole)
    assert file.read_text().startswith(before)
    assert len(file.read_text().splitlines()) == COUNT * len(policies)
    assert done[-1][1:] == (COUNT * LENGTH * len(policies),) * 2
    again = evaluate(words_model, [job], policies, batch_size=2, output=tmp_path)
    assert again == rows  # with the seconds of the first time


def test_another_evaluation_is_refused(words_model, job, tokenizer, letters, tmp_path):
    evaluate(words_model, [job], [Policy("dense")], output=tmp_path, arguments={"model": "one"})
    with pytest.raises(ValueError, match='model was "one", now "two"; batch_size was 1, now 2. Choose another'):
        evaluate(words_model, [job], [Policy("dense")], output=tmp_path, arguments={"model": "two"}, batch_size=2)
    other = Answers(letters(), tokenizer, LENGTH, COUNT, seed=4)
    with pytest.raises(ValueError, match='other arguments: examples was {"letters 200": "5 with checksum'):
        evaluate(words_model, [other], [Policy("dense")], output=tmp_path, arguments={"model": "one"})
    (tmp_path / EXAMPLES_FILE).write_text("words\n")
    with pytest.raises(ValueError, match=r"examples\.jsonl, line 1 is no record of an evaluation"):
        evaluate(words_model, [job], [Policy("dense")], output=tmp_path, arguments={"model": "one"})
    (tmp_path / ARGUMENTS_FILE).unlink()
    with pytest.raises(ValueError, match=r"holds examples\.jsonl without arguments\.json"):
        evaluate(words_model, [job], [Policy("dense")], output=tmp_path)


def test_other_models_are_loaded_when_their_turn_comes(words_model, job, tmp_path):
    loaded = []

    def load(path):
        loaded.append(path)
        return words_model

    policies = make_policies(["dense", "spkv", "random"], reference="control")
    rows = evaluate(words_model, [job], policies, load=load)
    assert loaded == ["control"]
    assert [row["policy"] for row in rows] == ["dense", "spkv", "random"]
    with pytest.raises(ValueError, match="no function was given that loads it"):
        evaluate(words_model, [job], policies)


def test_a_model_is_a_policy(words_model, job, tmp_path):
    whole, plain, absent = tmp_path / "whole", tmp_path / "plain", tmp_path / "absent"
    spkv.save(words_model, whole)
    plain.mkdir()
    policies = make_policies(["spkv", f"twin={whole}", f"base={plain}"], [0.2, 0.5])
    assert [(p.label, p.model) for p in policies] == [
        ("spkv 0.2", None), ("spkv 0.5", None), ("twin 0.2", str(whole)), ("twin 0.5", str(whole)),
        ("base", str(plain)),
    ]  # fmt: skip
    rows = evaluate(words_model, [job], policies[:4], load=spkv.load)
    for own, twin in zip(rows[:2], rows[2:], strict=True):
        assert {**twin, "policy": "spkv", "seconds": 0} == {**own, "seconds": 0}
    with pytest.raises(FileNotFoundError, match=r"policy twin needs a model or an adapter, and there is no directory"):
        make_policies([f"twin={absent}"])
    with pytest.raises(ValueError, match="NAME=PATH needs a name of its own"):
        make_policies([f"spkv={whole}"])


def test_what_does_not_fit_is_named(words_model, tokenizer, letters, job):
    with pytest.raises(ValueError, match="600 tokens, but the model has 512 positions"):
        evaluate(words_model, [Answers(letters(), tokenizer, 600, 1, 0)], [Policy("dense")])
    with pytest.raises(ValueError, match="takes at least 200 tokens, not 100"):
        Answers(letters(), tokenizer, 100, 1, 0)
    with pytest.raises(ValueError, match=r"task letters: example 0 takes 2\d\d tokens; it was asked for at most 200"):
        Answers(letters(context=220), tokenizer, 200, 1, 0)
    with pytest.raises(ValueError, match="number of examples must be at least 1, not 0"):
        Answers(letters(), tokenizer, 200, 0, 0)
    with pytest.raises(ValueError, match="task letters is answered in words, which takes a cache"):
        evaluate(words_model, [job], [Policy("dense")], oracle=True)
    with pytest.raises(ValueError, match=r"thresholds \[0\.9\] cannot be matched"):
        make_policies(["spkv", "random"], [0.5], match_thresholds=[0.9])
