"""What holds of every task: whoever reads the context can answer, nobody else can, and lengths are kept."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from spkv.evals.tasks import GROUPS, TASKS, count_tokens, make_tasks
from spkv.evals.tasks.ruler_niah import FORMS

LENGTH, COUNT = 8192, 4


# Where the words are from.
pytest.importorskip("wonderwords")


def read_secret_number(context: str, prompt: str) -> str:
    thing = re.search(r"What is the secret number of the (.+)\?", prompt)[1]
    return re.search(rf"The secret number of the {thing} is (\d+)\.", context)[1]


def read_special_magic(context: str, prompt: str) -> str:
    kind, keys = re.search(r"special magic (\w+?)s? for (.+) mentioned in the provided text\?", prompt).groups()
    found = re.findall(rf"One of the special magic {kind}s for (.+?) is: (\S+)\.", context)
    return ", ".join(value for key, value in found if key in re.split(", and |, ", keys))


def read_variables(context: str, prompt: str) -> str:
    value = re.search(r"assigned the value (\d+)", prompt)[1]
    holders = [value]
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", context):
        if source in holders:
            holders.append(name)
    return " ".join(holders[1:])


def read_common_words(context: str, prompt: str) -> str:
    listed = re.split(r" ?\d+\. ", context.rpartition("Below is a numbered list")[2])[1:]
    return " ".join(word for word, _ in Counter(listed).most_common(10))


def read_frequent_words(context: str, prompt: str) -> str:
    coded = context.partition("frequently appeared coded words. ")[2].split()
    return " ".join(word for word, _ in Counter(coded).most_common(4) if word != "...")


def read_documents(context: str, prompt: str) -> str:
    if founded := re.search(r"When was town (\d+) founded", prompt):
        return re.search(rf"founded in (\d+), says the chronicle of town {founded[1]}\.", context)[1]
    city = re.search(r"mayor of city (\d+) called", prompt)[1]
    mayor = re.search(rf"The mayor of city {city} is (\w+)\.", context)[1]
    return re.search(rf"The horse of {mayor} is called (\w+)\.", context)[1]


def read_problem(context: str, prompt: str) -> str:
    had, bought = re.findall(r"Ann has (\d+) apples and buys (\d+)", context)[-1]
    return f"Both together.\n#### {int(had) + int(bought)}\n\nQuestion: Next?\nAnswer: #### 7"


READERS: dict[str, Callable[[str, str], str]] = {
    "niah": read_secret_number,
    "turns": read_secret_number,
    **dict.fromkeys(FORMS, read_special_magic),
    "vt": read_variables,
    "cwe": read_common_words,
    "fwe": read_frequent_words,
    "qa_1": read_documents,
    "qa_2": read_documents,
    "gsm8k": read_problem,
}
# Problems are as long as they are; all else is filled up.
FILLED = [name for name in TASKS if name != "gsm8k"]


@pytest.fixture(scope="module")
def made(tokenizer, options):
    """Examples of each task, made when first asked for."""
    examples = {}

    def make(name):
        [task] = make_tasks([name], options)
        if name not in examples:
            examples[name] = task.examples(tokenizer, LENGTH, COUNT, 0)
        return task, examples[name]

    return make


def mean_score(task, examples, answer) -> float:
    scores = [task.score(answer(e.context, q.prompt), q) for e in examples for q in e.questions]
    return sum(scores) / len(scores)


def test_every_task_has_a_reader():
    assert set(READERS) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_the_context_answers(made, name):
    task, examples = made(name)
    assert task.name == name
    assert mean_score(task, examples, READERS[name]) == 1


@pytest.mark.parametrize("name", TASKS)
def test_answers_fit_in_what_may_be_generated(made, name):
    for example in made(name)[1]:
        for question in example.questions:
            # Even written byte by byte. Of the question answering's references one is enough.
            answer = question.references[0] if name.startswith("qa") else " ".join(question.references)
            assert len(" " + answer) <= question.max_new_tokens


@pytest.mark.parametrize("name", TASKS)
def test_questions_do_not_give_answers_away(made, name):
    task, examples = made(name)
    assert mean_score(task, examples, lambda context, prompt: prompt) == 0
    assert mean_score(task, examples, lambda context, prompt: "") == 0


# Distractors of one question may be the documents of another.
@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith("qa")])
def test_contexts_of_other_examples_do_not_answer(made, name):
    task, examples = made(name)
    others = [*examples[1:], examples[0]]
    scores = [
        task.score(other.context, question)
        for example, other in zip(examples, others, strict=True)
        for question in example.questions
    ]
    assert sum(scores) / len(scores) < 0.15


@pytest.mark.parametrize("name", FILLED)
def test_lengths_are_used_and_kept(made, tokenizer, name):
    _, examples = made(name)
    assert len(examples) == COUNT
    for example in examples:
        texts = [example.context, *(question.prompt for question in example.questions)]
        answers = sum(question.max_new_tokens for question in example.questions)
        # One token a byte, one that opens the context, and room for the answers.
        tokens = 1 + sum(len(text.encode()) for text in texts) + answers
        assert count_tokens(tokenizer, example) == tokens
        assert 0.9 * LENGTH <= tokens <= LENGTH


@pytest.mark.parametrize("name", TASKS)
def test_seeds_decide(made, options, tokenizer, name):
    task, examples = made(name)
    # Made anew, so that nothing is left of what was read for the first.
    [again] = make_tasks([name], replace(options))
    assert again.examples(tokenizer, LENGTH, COUNT, 0) == examples
    assert again.examples(tokenizer, LENGTH, COUNT - 1, 0) == examples[:-1]
    others = task.examples(tokenizer, LENGTH, COUNT, 1)
    assert not {e.context for e in others} & {e.context for e in examples}


@pytest.mark.parametrize("name", TASKS)
def test_impossible_requests_are_errors(options, tokenizer, name):
    [task] = make_tasks([name], options)
    with pytest.raises(ValueError, match=r"length leaves no room: .* takes [\d,]+ tokens, allowed are 20"):
        task.examples(tokenizer, 20, 1, 0)
    with pytest.raises(ValueError, match="count must be at least 1 example, not 0"):
        task.examples(tokenizer, LENGTH, 0, 0)


@pytest.mark.parametrize("name", TASKS)
def test_facts_can_be_grouped_by(made, name):
    _, examples = made(name)
    assert len({tuple(example.facts) for example in examples}) == 1
    for example in examples:
        for value in example.facts.values():
            if isinstance(value, tuple):
                assert len(value) == len(example.questions)
            hash(value)


def test_unknown_tasks_are_named():
    with pytest.raises(ValueError, match=r"unknown tasks \['mmlu'\]; known are niah, turns"):
        make_tasks(["niah", "mmlu"])
    with pytest.raises(ValueError, match=r"unknown tasks \[\]"):
        make_tasks([])


def test_tasks_are_made_once_in_order(options):
    assert len(GROUPS["ruler"]) == 13
    assert set(GROUPS["ruler"]) - set(GROUPS["ruler_synthetic"]) == {"qa_1", "qa_2"}
    for group, names in GROUPS.items():
        assert [task.name for task in make_tasks(["turns", group, names[0]], options)] == ["turns", *names]
