"""Tasks that are answered in words, made here from their definitions; no model is needed to make or to score them.

`TASKS` says how to make each by name; `GROUPS` names several at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from spkv.evals.task import Task
from spkv.evals.tasks.fill import count_tokens
from spkv.evals.tasks.gsm8k import WordProblems
from spkv.evals.tasks.haystack import Haystack, load_haystack
from spkv.evals.tasks.niah import NeedleInHaystack
from spkv.evals.tasks.ruler_niah import RulerNeedles
from spkv.evals.tasks.ruler_qa import DocumentQuestions
from spkv.evals.tasks.ruler_vt import VariableTracking
from spkv.evals.tasks.ruler_words import CommonWords, FrequentWords
from spkv.evals.tasks.turns import Turns


@dataclass(frozen=True)
class TaskOptions:
    """What tasks are made of; each task takes what it needs.

    Attributes:
        essays: text for haystacks, any file that `spkv.text` reads; None takes the documentation inside Python.
        qa: questions of `qa_1` and `qa_2`: JSON lines with `question`, `answers` and `documents`.
        gsm8k: problems of `gsm8k`: JSON lines with `question` and `answer`, which ends in `#### 42`.
        depths: points of the grid of `niah`.
        turns: questions that `turns` asks about one text.
        shots: solved problems before each of `gsm8k`.
        shots_from_file: take these from the file `gsm8k`, not from the ones written for it here.
    """

    essays: Path | None = None
    qa: Path | None = None
    gsm8k: Path | None = None
    depths: int = 11
    turns: int = 8
    shots: int = 4
    shots_from_file: bool = False

    @cached_property
    def haystack(self) -> Haystack:
        """Read once, for all the tasks made with these options."""
        return load_haystack(self.essays)


TASKS: dict[str, Callable[[TaskOptions], Task]] = {
    "niah": lambda options: NeedleInHaystack(options.haystack, options.depths),
    "turns": lambda options: Turns(options.haystack, options.turns),
    "niah_single_1": lambda options: RulerNeedles("niah_single_1", options.haystack),
    "niah_single_2": lambda options: RulerNeedles("niah_single_2", options.haystack),
    "niah_single_3": lambda options: RulerNeedles("niah_single_3", options.haystack),
    "niah_multikey_1": lambda options: RulerNeedles("niah_multikey_1", options.haystack),
    "niah_multikey_2": lambda options: RulerNeedles("niah_multikey_2", options.haystack),
    "niah_multikey_3": lambda options: RulerNeedles("niah_multikey_3", options.haystack),
    "niah_multivalue": lambda options: RulerNeedles("niah_multivalue", options.haystack),
    "niah_multiquery": lambda options: RulerNeedles("niah_multiquery", options.haystack),
    "vt": lambda options: VariableTracking(),
    "cwe": lambda options: CommonWords(),
    "fwe": lambda options: FrequentWords(),
    "qa_1": lambda options: DocumentQuestions("qa_1", options.qa, options.haystack),
    "qa_2": lambda options: DocumentQuestions("qa_2", options.qa, options.haystack),
    "gsm8k": lambda options: WordProblems(options.gsm8k, options.shots, shots_from_file=options.shots_from_file),
}
_RULER = tuple(name for name in TASKS if name not in ("niah", "turns", "gsm8k"))
# The eleven tasks of RULER that need no file, and all thirteen.
GROUPS: dict[str, tuple[str, ...]] = {
    "ruler": _RULER,
    "ruler_synthetic": tuple(name for name in _RULER if not name.startswith("qa")),
}


def make_tasks(names: Sequence[str], options: TaskOptions | None = None) -> list[Task]:
    """Make the tasks called `names`, or in the groups called so, each once and in this order.

    Raises:
        ValueError: for an unknown name, or an option outside its range.
        FileNotFoundError: for data that a task needs and does not find.
    """
    unknown = [name for name in names if name not in TASKS and name not in GROUPS]
    if unknown or not names:
        raise ValueError(f"unknown tasks {unknown}; known are {', '.join([*TASKS, *GROUPS])}")
    options = options or TaskOptions()
    wanted = dict.fromkeys(single for name in names for single in GROUPS.get(name, (name,)))
    return [TASKS[name](options) for name in wanted]


__all__ = ["GROUPS", "TASKS", "TaskOptions", "count_tokens", "make_tasks"]
