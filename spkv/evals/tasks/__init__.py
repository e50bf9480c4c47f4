"""Tasks that are answered in words, made here from their definitions; no model is needed to make or to score them.

`TASKS` says how to make each by name; `GROUPS` names several at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from spkv.evals.task import Task
from spkv.evals.tasks.fill import count_tokens
from spkv.evals.tasks.gsm8k import WordProblems
from spkv.evals.tasks.haystack import Haystack, load_haystack
from spkv.evals.tasks.niah import NeedleInHaystack
from spkv.evals.tasks.ruler_niah import FORMS, RulerNeedles
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


def _needles(name: str, options: TaskOptions) -> Task:
    return RulerNeedles(name, options.haystack)


def _questions(name: str, options: TaskOptions) -> Task:
    return DocumentQuestions(name, options.qa, options.haystack)


TASKS: dict[str, Callable[[TaskOptions], Task]] = {
    "niah": lambda options: NeedleInHaystack(options.haystack, options.depths),
    "turns": lambda options: Turns(options.haystack, options.turns),
    "gsm8k": lambda options: WordProblems(options.gsm8k, options.shots, shots_from_file=options.shots_from_file),
    **{name: partial(_needles, name) for name in FORMS},
    "vt": lambda options: VariableTracking(),
    "cwe": lambda options: CommonWords(),
    "fwe": lambda options: FrequentWords(),
    **{name: partial(_questions, name) for name in ("qa_1", "qa_2")},
}
_RULER = (*FORMS, "vt", "cwe", "fwe", "qa_1", "qa_2")
# All thirteen tasks of RULER, and the eleven that need no file.
GROUPS: dict[str, tuple[str, ...]] = {"ruler": _RULER, "ruler_synthetic": _RULER[:-2]}


def make_tasks(names: Sequence[str], options: TaskOptions | None = None) -> list[Task]:
    """Make the tasks called `names`, or in the groups called so, each once and in this order.

    Raises:
        ValueError: for an unknown name, or an option outside its range.
        FileNotFoundError: for data that a task needs and does not find.
        ModuleNotFoundError: without the package that a task draws its words from.
    """
    unknown = [name for name in names if name not in TASKS and name not in GROUPS]
    if unknown or not names:
        raise ValueError(f"unknown tasks {unknown}; known are {', '.join([*TASKS, *GROUPS])}")
    options = options or TaskOptions()
    wanted = dict.fromkeys(single for name in names for single in GROUPS.get(name, (name,)))
    return [TASKS[name](options) for name in wanted]


__all__ = ["GROUPS", "TASKS", "TaskOptions", "count_tokens", "make_tasks"]
