"""Scores of an answer given in words, each in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """The share of references that the answer contains, in upper or lower case."""
    return _matches(answer, references) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """1 if the answer contains one of the references, in upper or lower case, else 0."""
    return float(_matches(answer, references) > 0)


def _matches(answer: str, references: Sequence[str]) -> int:
    answer = answer.lower()
    return sum(reference.lower() in answer for reference in references)
