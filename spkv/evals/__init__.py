"""Evaluations: what a model loses, and what its cache keeps, under one policy or another.

`TASKS` names the tasks of `spkv eval --task`; each is a module of this package.
"""

from spkv.evals.nll import cut_sequences, evaluate_nll
from spkv.evals.policies import Policy, layout_policies, make_policies

TASKS: dict[str, str] = {"nll": "spkv.evals.nll"}

__all__ = ["TASKS", "Policy", "cut_sequences", "evaluate_nll", "layout_policies", "make_policies"]
