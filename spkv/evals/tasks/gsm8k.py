"""Word problems whose answer is a number: GSM8K (Cobbe et al. 2021, arXiv 2110.14168) and its like.

Problems come from a file of JSON lines with `question` and `answer`; the answer ends in `#### 42`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from spkv.evals.task import Example, Question
from spkv.evals.tasks.fill import Filler, check_count
from spkv.text import read_records

_MARK = "####"
_MAX_NEW_TOKENS = 256
# A minus is a sign only where nothing stands before it that could be subtracted from.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")
# Steps of the published answers, for a calculator that nobody here has: "<<3*4=12>>".
_CALCULATION = re.compile(r"<<[^<>]*>>")

SHOTS = (
    (
        "A baker fills 6 trays with 12 rolls each and sells all but 9 of the rolls. How many rolls does she sell?",
        "The baker makes 6 * 12 = 72 rolls. She sells 72 - 9 = 63 of them.\n#### 63",
    ),
    (
        "Tickets for a museum cost $8 for adults and half as much for children. What do 2 adults and 5 children pay?",
        "A child's ticket costs 8 / 2 = 4 dollars. The adults pay 2 * 8 = 16 dollars and the children 5 * 4 = 20 "
        "dollars. Together they pay 16 + 20 = 36 dollars.\n#### 36",
    ),
    (
        "A train leaves with 140 passengers. At the first stop 35 get off and 20 get on; at the second, a fifth of "
        "those on board get off. How many passengers are left?",
        "After the first stop there are 140 - 35 + 20 = 125 passengers. At the second 125 / 5 = 25 get off, so "
        "125 - 25 = 100 are left.\n#### 100",
    ),
    (
        "Nina reads 15 pages a day on weekdays and 40 pages a day at weekends. How many weeks does she need for a book "
        "of 465 pages?",
        "On weekdays she reads 5 * 15 = 75 pages, at the weekend 2 * 40 = 80 pages. That is 75 + 80 = 155 pages a "
        "week. The book takes 465 / 155 = 3 weeks.\n#### 3",
    ),
    (
        "A rope of 30 metres is cut into one piece of 12 metres and equal pieces of 1.5 metres. How many short pieces "
        "are there?",
        "After the long piece 30 - 12 = 18 metres are left. They make 18 / 1.5 = 12 short pieces.\n#### 12",
    ),
    (
        "Omar saves $25 a month and his sister saves three times as much. How much have both saved after a year?",
        "His sister saves 3 * 25 = 75 dollars a month. Together they save 25 + 75 = 100 dollars a month, and "
        "12 * 100 = 1,200 dollars in a year.\n#### 1,200",
    ),
)


class WordProblems:
    """Problems from a file, each after solved ones."""

    name = "gsm8k"

    def __init__(self, path: Path | None, shots: int = 4, *, shots_from_file: bool = False) -> None:
        """
        Args:
            path: the file of problems.
            shots: solved problems before each.
            shots_from_file: take those from the file, not from `SHOTS`; they are not asked then.

        Raises:
            FileNotFoundError, ValueError: if the file is missing or holds something else, or there are fewer shots.
        """
        if path is None:
            raise ValueError("task gsm8k needs a file of problems: JSON lines with question and answer")
        self._problems = [_problem(record, f"{path}, line {number}") for number, record in read_records(path)]
        if shots < 0 or (shots > len(SHOTS) and not shots_from_file):
            raise ValueError(f"shots must be from 0 to {len(SHOTS)}, or be taken from the file, not {shots}")
        self._shots = shots
        self._from_file = shots if shots_from_file else 0
        self.note = f"problems from {path.name}, {shots} shots{' from the same file' if self._from_file else ''}"

    def examples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> Sequence[Example]:
        check_count(count)
        if count + self._from_file > len(self._problems):
            more = f" and {self._from_file} shots" if self._from_file else ""
            raise ValueError(f"{count} examples{more} were asked for; there are {len(self._problems)} problems")
        order = Random(f"{self.name} {seed}").sample(self._problems, len(self._problems))
        shots = order[len(order) - self._from_file :] if self._from_file else SHOTS[: self._shots]
        opening = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in shots)
        filler = Filler(tokenizer, length)
        # Nothing to fill: an example is as long as it is.
        return [filler.fill(partial(_example, opening, problem), least=0, most=0) for problem in order[:count]]

    def score(self, answer: str, question: Question) -> float:
        number = final_number(answer)
        return float(number is not None and number == final_number(question.references[0]))


def final_number(text: str) -> Decimal | None:
    """Return the number that an answer ends in: the one after the mark `####`, else the last; None if there is none.

    Of a text that goes on with another question only the part before counts.
    """
    text = text.split("Question:")[0].replace("$", "")
    _, mark, marked = text.partition(_MARK)
    numbers = _NUMBER.findall(marked if mark else text)
    if not numbers:
        return None
    return Decimal(numbers[0 if mark else -1].replace(",", ""))


def _example(opening: str, problem: tuple[str, str], pieces: int) -> Example:
    question, answer = problem
    reference = answer.rpartition(_MARK)[2].strip()
    return Example(f"{opening}Question: {question}", (Question("\nAnswer:", (reference,), _MAX_NEW_TOKENS),))


def _problem(record: dict[str, Any], where: str) -> tuple[str, str]:
    question, answer = record.get("question"), record.get("answer")
    if not (isinstance(question, str) and isinstance(answer, str)):
        raise ValueError(f"{where} must have strings `question` and `answer`; it has {sorted(record)}")
    if _MARK not in answer or final_number(answer) is None:
        raise ValueError(f"{where}: the answer must end in {_MARK} and a number")
    return question, _CALCULATION.sub("", answer)
