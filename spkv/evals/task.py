"""What a task that is answered in words consists of: examples, and a score for what the model says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """One question about a context.

    Attributes:
        prompt: what follows the context, or the answer before; the model's answer begins behind it.
        references: accepted answers, or all that the answer must contain: the task's `score` knows which.
        max_new_tokens: tokens that the model may answer with.
        stop: what ends an answer, besides the model's own end, such as a line break; any token that holds it does.
    """

    prompt: str
    references: tuple[str, ...]
    max_new_tokens: int
    stop: str = ""


@dataclass(frozen=True)
class Example:
    """A context that is read once, and the questions asked about it, in turn, on the same cache.

    Attributes:
        context: the text before the first question.
        questions: at least one.
        facts: what the example is, such as depth or hop count: scores are grouped by these.
    """

    context: str
    questions: tuple[Question, ...]
    facts: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A task makes examples and scores answers; it never sees a model."""

    name: str

    def examples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> Sequence[Example]:
        """Make `count` examples whose context, prompts and longest answers together take at most `length` tokens.

        The same arguments give the same examples.

        Raises:
            ValueError: if `length` leaves no room for an example.
            FileNotFoundError: for data that the task needs and does not find.
        """

    def score(self, answer: str, question: Question) -> float:
        """The score of an answer, in [0, 1]."""
