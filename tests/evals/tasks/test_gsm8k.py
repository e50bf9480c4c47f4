"""Word problems: prompts, shots, and the number that an answer ends in."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest

from spkv.evals.task import Question
from spkv.evals.tasks.gsm8k import SHOTS, WordProblems, final_number

LENGTH = 4096


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
        ("He pays $1,250.50 in all.", "1250.50"),
        ("#### 42 apples, in 3 boxes", "42"),
        ("It is 7.\n#### 12\n\nQuestion: Next one?\nAnswer: 5\n#### 5", "12"),
        ("The answer is 3.\n\nQuestion: What are 2 and 2?\nAnswer: 4", "3"),
        ("It falls to -5.", "-5"),
        ("It falls to -$5.", "-5"),
        ("That makes 10-4", "4"),
        ("(2+3)-4", "4"),
        ("half, so .5", "0.5"),
        ("9, 8, 7", "7"),
        ("1,000,000.", "1000000"),
        ("####", None),
        ("none at all", None),
        ("", None),
    ],
)
def test_final_numbers(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_scores_compare_numbers(options):
    task = WordProblems(options.gsm8k)
    question = Question("", ("1,200",), 8)
    for right in ("#### 1200", "so 1,200.00", "$1200"):
        assert task.score(right, question) == 1
    for wrong in ("#### 120", "", "1200 or 1300"):
        assert task.score(wrong, question) == 0


@pytest.mark.parametrize("shot", SHOTS)
def test_shots_add_up(shot):
    question, answer = shot
    sums = re.findall(r"([\d.,+*/ -]+) = ([\d.,]+\d|\d)", answer)
    assert sums
    for calculation, result in sums:
        assert eval(calculation) == pytest.approx(float(result.replace(",", "")))
    assert final_number(answer) == final_number(sums[-1][1])
    assert question.endswith("?")


def test_prompts(options, tokenizer):
    [example] = WordProblems(options.gsm8k, 2).examples(tokenizer, LENGTH, 1, 0)
    first, second, own = example.context.split("\n\n")
    assert first == "Question: {}\nAnswer: {}".format(*SHOTS[0])
    assert second == "Question: {}\nAnswer: {}".format(*SHOTS[1])
    had, bought = map(
        int, re.fullmatch(r"Question: Ann has (\d+) apples and buys (\d+). How many has she\?", own).groups()
    )
    [question] = example.questions
    assert (question.prompt, question.references) == ("\nAnswer:", (f"{had + bought:,}",))
    assert "\n\n" not in WordProblems(options.gsm8k, 0).examples(tokenizer, LENGTH, 1, 0)[0].context


def test_shots_from_the_file_are_not_asked(options, tokenizer):
    task = WordProblems(options.gsm8k, 20, shots_from_file=True)
    assert task.note == "problems from sums.jsonl, 20 shots from the same file"
    examples = task.examples(tokenizer, LENGTH, 280, 0)
    shots = {block.partition("\nAnswer:")[0] for block in examples[0].context.split("\n\n")[:-1]}
    asked = {example.context.split("\n\n")[-1] for example in examples}
    assert (len(shots), len(asked), shots & asked) == (20, 280, set())
    # The marks of the calculator are left out.
    assert "<<" not in examples[0].context
    assert "=" in examples[0].context


def test_bad_problems_are_named(options, tokenizer, write_lines):
    with pytest.raises(ValueError, match="task gsm8k needs a file of problems: JSON lines with question and answer"):
        WordProblems(None)
    with pytest.raises(FileNotFoundError, match=r"no such data file: .*absent\.jsonl"):
        WordProblems(options.gsm8k.with_name("absent.jsonl"))
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 1 must have strings `question` and `answer`; it has \['text'\]"
    ):
        WordProblems(write_lines("a.jsonl", [{"text": "x"}]))
    for answer in ("It is 4.", "It is ####", "#### four"):
        with pytest.raises(ValueError, match=r"b\.jsonl, line 1: the answer must end in #### and a number"):
            WordProblems(write_lines("b.jsonl", [{"question": "x", "answer": answer}]))
    with pytest.raises(ValueError, match="shots must be from 0 to 6, or be taken from the file, not 7"):
        WordProblems(options.gsm8k, 7)
    with pytest.raises(ValueError, match="not -1"):
        WordProblems(options.gsm8k, -1, shots_from_file=True)
    with pytest.raises(ValueError, match="301 examples were asked for; there are 300 problems"):
        WordProblems(options.gsm8k).examples(tokenizer, LENGTH, 301, 0)
    with pytest.raises(ValueError, match="299 examples and 2 shots were asked for; there are 300 problems"):
        WordProblems(options.gsm8k, 2, shots_from_file=True).examples(tokenizer, LENGTH, 299, 0)
