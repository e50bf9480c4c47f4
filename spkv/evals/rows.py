"""From the records of examples to the rows of a result: a row for each task, length and policy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from spkv.evals.policies import Policy

_MEASURES = ("score", "loss", "continuation_loss")


def make_row(
    task: str,
    length: int,
    policy: Policy,
    records: Sequence[dict[str, Any]],
    dense: Sequence[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Summarise the records of one policy.

    Args:
        task: its name.
        length: as asked for, in tokens.
        policy: that the records were made under.
        records: of all examples.
        dense: those of the dense policy, if there is one.

    Returns:
        task, policy, threshold, match_threshold, length, examples, tokens (read and answered); the means of score, loss
        (nats a token), continuation_loss, density, kept_fraction (both at the end of the examples),
        context_kept_fraction (where the questions or the continuation begin) and kv_bytes, each None where it has no
        meaning; standard_error (of score, loss and continuation_loss: that of their mean difference from dense, example
        by example; empty for dense and without it); seconds, in all; by_fact (for each fact of the examples and each of
        its values, the score and the number of examples); by_turn (the score of each question, where there are
        several); by_position (start, stop and loss).
    """
    return {
        "task": task,
        "policy": policy.name,
        "threshold": policy.threshold,
        "match_threshold": policy.match_threshold,
        "length": length,
        "examples": len(records),
        "tokens": sum(record["tokens"] for record in records),
        **{
            name: mean([record.get(name) for record in records])
            for name in (*_MEASURES, "density", "kept_fraction", "context_kept_fraction", "kv_bytes")
        },
        "standard_error": _standard_errors(records, dense),
        "seconds": sum(record["seconds"] for record in records),
        "by_fact": _by_fact(records),
        "by_turn": _by_turn(records),
        "by_position": _by_position(records),
    }


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are there; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _standard_errors(records: Sequence[dict[str, Any]], dense: Sequence[dict[str, Any]] | None) -> dict[str, float]:
    errors: dict[str, float] = {}
    if dense is None:
        return errors
    for name in _MEASURES:
        pairs = [(record.get(name), other.get(name)) for record, other in zip(records, dense, strict=True)]
        differences = [value - other for value, other in pairs if value is not None and other is not None]
        if len(differences) > 1:
            errors[name] = statistics.stdev(differences) / math.sqrt(len(differences))
    return errors


def _by_fact(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    groups: dict[str, dict[Any, list[float]]] = {}
    for record in records:
        for name, value in record.get("facts", {}).items():
            # Lists and the like tell nothing as a group, and JSON has but strings for keys.
            if isinstance(value, (str, int, float, bool)):
                groups.setdefault(name, {}).setdefault(value, []).append(record["score"])
    return {
        name: {
            str(value): {"score": sum(scores) / len(scores), "examples": len(scores)}
            for value, scores in sorted(values.items(), key=lambda item: _order(item[0]))
        }
        for name, values in groups.items()
    }


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, in front of words."""
    return (True, 0.0, value) if isinstance(value, str) else (False, float(value), "")


def _by_turn(records: Sequence[dict[str, Any]]) -> list[float | None]:
    turns = max((len(record.get("scores", ())) for record in records), default=0)
    if turns < 2:
        return []
    return [
        mean([record["scores"][turn] for record in records if turn < len(record["scores"])]) for turn in range(turns)
    ]


def _by_position(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    buckets = [record["by_position"] for record in records if record.get("by_position")]
    return [
        {"start": same[0]["start"], "stop": same[0]["stop"], "loss": mean([bucket["loss"] for bucket in same])}
        for same in zip(*buckets, strict=True)
    ]
