"""RULER: the published numbers and wording, and what happens at their edges."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace

import pytest

from spkv.evals.task import Question
from spkv.evals.tasks import TaskOptions, make_tasks
from spkv.evals.tasks.haystack import Haystack
from spkv.evals.tasks.ruler_niah import REPEATED, RulerNeedles, wording
from spkv.evals.tasks.ruler_vt import VariableTracking
from spkv.evals.tasks.ruler_words import CommonWords, FrequentWords
from spkv.evals.tasks.words import _words

NUMBER = r"One of the special magic numbers for [\w' -]+-[\w' -]+ is: [1-9]\d{6}\."
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def test_the_wording_is_the_published_one():
    assert wording("numbers", ["odd-sock"], single=True) == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.",
        "\nWhat is the special magic number for odd-sock mentioned in the provided text? "
        "The special magic number for odd-sock mentioned in the provided text is",
    )
    assert wording("uuids", ["a", "b", "c"], single=False) == (
        "Some special magic uuids are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the uuids afterwards.",
        "\nWhat are all the special magic uuids for a, b, and c mentioned in the provided text? "
        "The special magic uuids for a, b, and c mentioned in the provided text are",
    )


@pytest.mark.parametrize(
    ("name", "needle", "count", "answers"),
    [
        ("niah_single_2", NUMBER, 1, 1),
        ("niah_single_3", rf"One of the special magic uuids for [\w' -]+ is: {UUID}\.", 1, 1),
        ("niah_multikey_1", NUMBER, 4, 1),
        ("niah_multivalue", NUMBER, 4, 4),
        ("niah_multiquery", NUMBER, 4, 4),
    ],
)
def test_needles_in_essays(options, tokenizer, name, needle, count, answers):
    pytest.importorskip("wonderwords")
    [task] = make_tasks([name], options)
    for example in task.examples(tokenizer, 6000, 3, 0):
        found = re.findall(needle, example.context)
        assert len(found) == len(set(found)) == count
        [question] = example.questions
        assert len(set(question.references)) == answers
        assert question.max_new_tokens == 128
        if answers == 1:
            place = example.context.index(question.references[0]) / len(example.context)
            assert example.facts["depth"] - 0.06 < place < example.facts["depth"] + 0.16
        # The haystack is the beginning of the essays, as published.
        assert "Essay 0 says what it said 0 times before." in example.context
        assert task.note == "haystack: essays.txt"


def test_any_of_the_needles_is_asked_for(options, tokenizer):
    pytest.importorskip("wonderwords")
    several, every = make_tasks(["niah_multikey_1", "niah_multiquery"], options)
    ranks = set()
    for example in several.examples(tokenizer, 3000, 20, 0):
        values = re.findall(r"One of the special magic numbers for .+? is: (\d+)\.", example.context)
        ranks.add(values.index(example.questions[0].references[0]))
    assert ranks == {0, 1, 2, 3}
    # Nor are they asked for in the order of the text.
    orders = set()
    for example in every.examples(tokenizer, 3000, 10, 0):
        values = re.findall(r"One of the special magic numbers for .+? is: (\d+)\.", example.context)
        orders.add(tuple(map(values.index, example.questions[0].references)))
    assert len(orders) > 5


def test_needles_among_repeated_lines(options, tokenizer):
    pytest.importorskip("wonderwords")
    [task] = make_tasks(["niah_single_1"], options)
    [example] = task.examples(tokenizer, 3000, 1, 0)
    opening, *lines = example.context.split("\n")
    [(place, needle)] = [(i, line) for i, line in enumerate(lines) if line != REPEATED]
    assert re.fullmatch(NUMBER, needle)
    assert example.facts["depth"] == int(place / (len(lines) - 1) * 10) / 10
    assert opening.startswith("A special magic number")


def test_needles_among_needles(options, tokenizer):
    [task] = make_tasks(["niah_multikey_3"], options)
    [example] = task.examples(tokenizer, 5000, 1, 0)
    _, *lines = example.context.split("\n")
    pairs = [re.fullmatch(rf"One of the special magic uuids for ({UUID}) is: ({UUID})\.", line) for line in lines]
    assert len({pair[1] for pair in pairs} | {pair[2] for pair in pairs}) == 2 * len(lines) > 60


def test_variables_come_after_a_solved_example(tokenizer):
    [example] = VariableTracking().examples(tokenizer, 6000, 1, 0)
    shot, own = example.context.split("\n\nMemorize", 1)
    chain = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", own)
    assert tuple(name for name, _ in chain) == example.questions[0].references
    assert [source for _, source in chain[1:]] == [name for name, _ in chain[:-1]]
    assert f"5 variables are assigned the value {chain[0][1]}, they are:" in example.questions[0].prompt
    solved = re.findall(r"VAR ([A-Z]{3}) = ", shot)
    assert len(solved) == 5
    assert shot.endswith("they are: " + " ".join(solved))
    assert shot.count("The grass is green.") == 10


@pytest.mark.parametrize(
    ("length", "repeats", "shot_repeats"), [(8192, (30, 3), (10, 3)), (4000, (6, 1), (3, 1))], ids=["long", "short"]
)
def test_common_words_are_ten_times_as_common(tokenizer, length, repeats, shot_repeats):
    pytest.importorskip("wonderwords")
    [example] = CommonWords().examples(tokenizer, length, 1, 0)
    _, shot, own = example.context.split("Memorize the ones that appear most often.\n")
    shot, answer = shot.split("\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 ")
    for text, (often, seldom) in ((own, repeats), (shot, shot_repeats)):
        counts = Counter(re.split(r" ?\d+\. ", text.split("\n")[0])[1:])
        assert Counter(counts.values())[often] == 10
        assert set(counts.values()) == {often, seldom}
        if text is own:
            assert {word for word, count in counts.items() if count == often} == set(example.questions[0].references)
    assert answer.startswith("words that appear most often in the list are: 1. ")
    assert " 10. " in answer


def test_common_words_do_not_run_out():
    pytest.importorskip("wonderwords")
    task = CommonWords()
    task._words = ["one", "two", "three", *map(str, range(20))]
    example = task.build(0, 0, 4000, 60)
    counts = Counter(re.split(r" ?\d+\. ", example.context.rpartition("most often.\n")[2])[1:])
    assert len(counts) >= 55
    assert sum(counts.values()) == 6 * 10 + 50


def test_frequent_words_follow_the_law(tokenizer):
    [example] = FrequentWords().examples(tokenizer, 16_384, 1, 0)
    counts = Counter(example.context.partition("coded words. ")[2].split())
    first, *rest = [count for _, count in counts.most_common(5)]
    assert counts["..."] == first
    assert rest == pytest.approx([first / rank**2 for rank in (2, 3, 4, 5)], abs=1)
    assert tuple(word for word, _ in counts.most_common(4)[1:]) == example.questions[0].references
    assert all(re.fullmatch("[a-z]{6}", word) for word in counts if word != "...")


@pytest.mark.parametrize("pieces", [100, 101, 117, 163, 250])
def test_frequent_words_are_never_tied(pieces):
    example = FrequentWords().build(0, 0, 4096, pieces)
    counts = [count for _, count in Counter(example.context.split("coded words. ")[1].split()).most_common(5)]
    assert len(set(counts)) == 5


def test_scores_are_the_published_ones(options):
    needles, questions = make_tasks(["niah_multikey_3", "qa_1"], options)
    # Two values of three, in any case, anywhere in the answer; of accepted answers, one is enough.
    question = Question("", ("ABC", "12", "xyz"), 8)
    assert needles.score("abc and 12.", question) == pytest.approx(2 / 3)
    assert questions.score("abc and 12.", question) == 1
    assert questions.score("nothing", question) == needles.score("", question) == 0


def test_questions_are_told_apart_by_their_documents(options, tokenizer):
    one, several = make_tasks(["qa_1", "qa_2"], options)
    assert one.note == several.note == "substitute: questions from qa.jsonl"
    for task, pattern in ((one, "Town {} "), (several, "The mayor of city {} |The horse of M{}x ")):
        examples = task.examples(tokenizer, 16_000, 10, 0)
        assert len({example.questions[0].prompt for example in examples}) == 10
        places = set()
        for example in examples:
            number = re.search(r"(?:town|city) (\d+)", example.questions[0].prompt)[1]
            own = [bool(re.match(pattern.replace("{}", number), body)) for body in bodies(example)]
            assert sum(own) == (1 if task is one else 2)
            places.add(own.index(True))
            assert example.questions[0].prompt.endswith(" Answer:")
            # All of the file's documents are used, and then passages of the haystack.
            assert any("times before" in body for body in bodies(example))
            assert len(set(bodies(example))) == len(bodies(example)) > 150
        assert len(places) > 5


def test_documents_of_the_file_are_used_before_the_haystack(options, tokenizer):
    [task] = make_tasks(["qa_1"], options)
    [example] = task.examples(tokenizer, 4000, 1, 0)
    assert all(re.match(r"(Town|The mayor|The horse)( |$)", body) for body in bodies(example))
    assert len(set(bodies(example))) == len(bodies(example))


def test_long_documents_are_cut_to_fit(options, write_lines):
    records = [
        {"question": "What?", "answers": ["It"], "documents": ["It was it."]},
        {"question": "Who?", "answers": ["I"], "documents": ["a long tale " * 2000]},
    ]
    [task] = make_tasks(["qa_1"], replace(options, qa=write_lines("long.jsonl", records)))
    examples = [task.build(0, index, 4000, 500) for index in range(2)]
    [example] = [example for example in examples if example.questions[0].references == ("It",)]
    assert sorted(len(body.split()) for body in bodies(example)) == [3, 500]


def bodies(example) -> list[str]:
    return re.split(r"(?:^|\n\n)Document \d+:\n", example.context.partition("documents.\n\n")[2])[1:]


def test_bad_questions_are_named(options, tokenizer, write_lines):
    with pytest.raises(ValueError, match="task qa_2 needs a file of questions: JSON lines with question, answers and"):
        make_tasks(["qa_2"], replace(options, qa=None))
    with pytest.raises(FileNotFoundError, match=r"no such data file: .*absent\.jsonl"):
        make_tasks(["qa_1"], replace(options, qa=options.qa.with_name("absent.jsonl")))
    good = {"question": "Who?", "answers": ["I"], "documents": ["It was I."]}
    for field, bad in (("question", None), ("answers", "I"), ("answers", []), ("documents", [" "]), ("documents", [1])):
        path = write_lines("bad.jsonl", [good, {**good, field: bad}])
        with pytest.raises(ValueError, match=r"bad\.jsonl, line 2 must have a string `question`, and lists of strings"):
            make_tasks(["qa_1"], replace(options, qa=path))
    single = replace(options, qa=write_lines("single.jsonl", [good]))
    with pytest.raises(ValueError, match=r"single\.jsonl holds no question with several documents, as task qa_2"):
        make_tasks(["qa_2"], single)
    with pytest.raises(ValueError, match="2 examples were asked for; there are 1 questions for qa_1"):
        make_tasks(["qa_1"], single)[0].examples(tokenizer, 4000, 2, 0)


def test_the_package_of_words_is_named(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    _words.cache_clear()
    for name in ("niah_single_1", "cwe"):
        with pytest.raises(
            ModuleNotFoundError, match=r'`wonderwords`, which is not installed; pip install "spkv\[evals\]"'
        ):
            make_tasks([name], options)
    # Numbers, codes and made-up words need none.
    make_tasks(["niah", "turns", "niah_multikey_3", "vt", "fwe"], TaskOptions(essays=options.essays))


def test_an_empty_haystack_is_an_error(tokenizer):
    pytest.importorskip("wonderwords")
    with pytest.raises(ValueError, match="the haystack, blank, holds no words"):
        RulerNeedles("niah_single_2", Haystack([], "blank")).examples(tokenizer, 4096, 1, 0)
