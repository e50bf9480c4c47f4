"""Question answering of RULER (arXiv 2404.06654): the documents that answer a question among many that do not.

The published tasks draw on SQuAD (qa_1) and HotpotQA (qa_2). Here questions come from a file of JSON lines, one object
a line:

    {"question": "...", "answers": ["...", "..."], "documents": ["...", "..."]}

`answers` are accepted each, and `documents` are all that are needed to answer. Questions with one document are asked by
qa_1, questions with several by qa_2. Scores compare with published ones only if the file holds the published data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from spkv.evals.task import Example, Question
from spkv.evals.tasks.fill import FilledTask
from spkv.evals.tasks.haystack import Haystack
from spkv.evals.tasks.niah import STARTS
from spkv.evals.tasks.scores import string_match_part
from spkv.text import read_records

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
_MAX_NEW_TOKENS = 32
# Words of a document cut from the haystack, when the file's own are used up: about a paragraph of Wikipedia.
_PASSAGE = 120


@dataclass(frozen=True)
class _Record:
    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]


class DocumentQuestions(FilledTask):
    """qa_1 or qa_2, from a file."""

    def __init__(self, name: str, path: Path | None, haystack: Haystack) -> None:
        """
        Args:
            name: "qa_1", questions that one document answers, or "qa_2", those that take several.
            path: the file of questions.
            haystack: fills up where the file's documents are too few.

        Raises:
            FileNotFoundError, ValueError: if the file is missing, holds something else, or no question for this task.
        """
        if path is None:
            raise ValueError(f"task {name} needs a file of questions: JSON lines with question, answers and documents")
        self.name = name
        self.note = f"substitute: questions from {path.name}"
        self._haystack = haystack
        records = [_record(record, f"{path}, line {number}") for number, record in read_records(path)]
        self._records = [record for record in records if (len(record.documents) == 1) == (name == "qa_1")]
        if not self._records:
            kind = "one document" if name == "qa_1" else "several documents"
            raise ValueError(f"{path} holds no question with {kind}, as task {name} asks them")
        self._pool = sorted({document for record in records for document in record.documents})

    def examples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> Sequence[Example]:
        if count > len(self._records):
            raise ValueError(
                f"{count} examples were asked for; there are {len(self._records)} questions for {self.name}"
            )
        return super().examples(tokenizer, length, count, seed)

    def score(self, answer: str, question: Question) -> float:
        return string_match_part(answer, question.references)

    def build(self, seed: int, index: int, length: int, pieces: int) -> Example:
        record = self.random(seed).sample(self._records, len(self._records))[index]
        rng = self.random(seed, index)
        documents = [*record.documents, *self._distractors(rng, record, pieces)]
        rng.shuffle(documents)
        text = "\n\n".join(f"Document {number}:\n{document}" for number, document in enumerate(documents, 1))
        return Example(
            context=f"{_INSTRUCTION}\n\nThe following are given documents.\n\n{text}",
            questions=(
                Question(f"\n\n{_INSTRUCTION}\n\nQuestion: {record.question} Answer:", record.answers, _MAX_NEW_TOKENS),
            ),
        )

    def _distractors(self, rng: Random, record: _Record, words: int) -> Iterator[str]:
        """Yield documents of so many words together; the last one is cut short."""
        pool = rng.sample(self._pool, len(self._pool))
        start = rng.randrange(STARTS)
        while words > 0:
            if pool:
                document = pool.pop()
                if document in record.documents:
                    continue
            else:
                document = " ".join(self._haystack.passage(start, _PASSAGE))
                start += _PASSAGE
            split = document.split()
            yield document if len(split) <= words else " ".join(split[:words])
            words -= len(split)


def _record(record: dict[str, Any], where: str) -> _Record:
    question, answers, documents = (record.get(field) for field in ("question", "answers", "documents"))
    if not (isinstance(question, str) and _texts(answers) and _texts(documents)):
        raise ValueError(
            f"{where} must have a string `question`, and lists of strings `answers` and `documents`; "
            f"it has {sorted(record)}"
        )
    return _Record(question, tuple(answers or ()), tuple(documents or ()))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)
