"""Evaluations: what a model loses, and what its cache keeps, under one policy or another.

Names are resolved on first use: to print or draw results takes no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spkv.evals.answers import Answers as Answers
    from spkv.evals.nll import Losses as Losses
    from spkv.evals.nll import cut_sequences as cut_sequences
    from spkv.evals.policies import Policy as Policy
    from spkv.evals.policies import layout_policies as layout_policies
    from spkv.evals.policies import make_policies as make_policies
    from spkv.evals.runner import evaluate as evaluate
    from spkv.evals.runner import evaluate_nll as evaluate_nll

_HOME = {
    "Answers": "spkv.evals.answers",
    "Losses": "spkv.evals.nll",
    "Policy": "spkv.evals.policies",
    "cut_sequences": "spkv.evals.nll",
    "evaluate": "spkv.evals.runner",
    "evaluate_nll": "spkv.evals.runner",
    "layout_policies": "spkv.evals.policies",
    "make_policies": "spkv.evals.policies",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spkv.evals' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
