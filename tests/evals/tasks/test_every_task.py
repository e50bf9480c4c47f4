"""What holds of every task: whoever reads the context can answer, nobody else can, and lengths are kept."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from spkv.evals.tasks import GROUPS, TASKS, TaskOptions, count_tokens, make_tasks

LENGTH, COUNT = 4096, 4


def read_secret_number(context: str, prompt: str) -> str:
    thing = re.search(r"What is the secret number of the (.+)\?", prompt)[1]
    return re.search(rf"The secret number of the {thing} is (\d+)\.", context)[1]


READERS: dict[str, Callable[[str, str], str]] = {
    "niah": read_secret_number,
    "turns": read_secret_number,
}


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
def test_questions_do_not_give_answers_away(made, name):
    task, examples = made(name)
    assert mean_score(task, examples, lambda context, prompt: prompt) == 0
    assert mean_score(task, examples, lambda context, prompt: "") == 0


@pytest.mark.parametrize("name", TASKS)
def test_contexts_of_other_examples_do_not_answer(made, name):
    task, examples = made(name)
    others = [*examples[1:], examples[0]]
    scores = [
        task.score(other.context, question)
        for example, other in zip(examples, others, strict=True)
        for question in example.questions
    ]
    assert sum(scores) / len(scores) < 0.1


@pytest.mark.parametrize("name", TASKS)
def test_lengths_are_used_and_kept(made, tokenizer, name):
    _, examples = made(name)
    assert len(examples) == COUNT
    for example in examples:
        assert 0.9 * LENGTH <= count_tokens(tokenizer, example) <= LENGTH


@pytest.mark.parametrize("name", TASKS)
def test_seeds_decide(made, options, tokenizer, name):
    task, examples = made(name)
    # Made anew, so that nothing is left of what was read for the first.
    [again] = make_tasks([name], TaskOptions(**vars_of(options)))
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
    for group, names in GROUPS.items():
        assert [task.name for task in make_tasks(["turns", group, names[0]], options)] == ["turns", *names]


def vars_of(options: TaskOptions) -> dict:
    return {name: getattr(options, name) for name in options.__dataclass_fields__}
