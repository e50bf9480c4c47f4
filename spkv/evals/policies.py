"""Policies that evaluations compare: which pairs a model keeps once they have left the window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spkv.config import check_threshold
from spkv.gates import Gate, RandomGate, SinkGate, ThresholdGate

POLICIES = ("dense", "spkv", "streaming", "random")
# StreamingLLM (arXiv 2309.17453) needs no more than four.
SINKS = 4


@dataclass(frozen=True)
class Policy:
    """One row of an evaluation. For a policy of one's own, give a name and any hard gate.

    Attributes:
        name: what the row is called.
        gate: what decides; None runs the model's own dense attention and cache.
        threshold: for the row; None where there is none.
        match_threshold: set for a random gate, made when the density at that threshold of `spkv` is known.
    """

    name: str
    gate: Gate | None = None
    threshold: float | None = None
    match_threshold: float | None = None


def layout_policies(names: Sequence[str], gate: Gate, density: float) -> list[Policy]:
    """Make the policies called `names` for a model with a static layout: `spkv` is the layout, at no threshold.

    Args:
        names: out of `POLICIES`.
        gate: the layout's.
        density: its share of heads that keep everything, which `random` takes.
    """
    made = {
        "dense": Policy("dense"),
        "spkv": Policy("spkv", gate),
        "streaming": Policy("streaming", SinkGate(SINKS)),
        "random": Policy("random", RandomGate(density)),
    }
    return [made[name] for name in dict.fromkeys(names)]


def make_policies(
    names: Sequence[str] = POLICIES, thresholds: Sequence[float] = (0.5,), *, stored_threshold: float = 0.5
) -> list[Policy]:
    """Make the policies called `names`: `spkv` at each threshold, the others once.

    Args:
        names: out of `POLICIES`: `dense`; `spkv`; `streaming`, 4 sinks and the window; `random`, at the density of
            `spkv` at the stored threshold if that is one of `thresholds`, else at the middle one.
        thresholds: of `spkv`, each in (0, 1).
        stored_threshold: the model's own.

    Raises:
        ValueError: for an unknown name, a threshold outside (0, 1), or `random` without `spkv`.
    """
    names, thresholds = list(dict.fromkeys(names)), list(dict.fromkeys(thresholds))
    unknown = [name for name in names if name not in POLICIES]
    if unknown or not names:
        raise ValueError(f"unknown policies {unknown}; known are {', '.join(POLICIES)}")
    for threshold in thresholds:
        check_threshold(threshold)
    if "spkv" in names and not thresholds:
        raise ValueError("policy spkv needs at least one threshold")
    if "random" in names and "spkv" not in names:
        raise ValueError("policy random takes its density from policy spkv, which is not among the policies")
    middle = sorted(thresholds)[(len(thresholds) - 1) // 2] if thresholds else None
    match = stored_threshold if stored_threshold in thresholds else middle
    made = {
        "dense": [Policy("dense")],
        "spkv": [Policy("spkv", ThresholdGate(t), threshold=t) for t in thresholds],
        "streaming": [Policy("streaming", SinkGate(SINKS))],
        "random": [Policy("random", match_threshold=match)],
    }
    return [policy for name in names for policy in made[name]]
