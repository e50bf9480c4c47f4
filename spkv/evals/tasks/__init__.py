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
from spkv.evals.tasks.haystack import Haystack, load_haystack
from spkv.evals.tasks.niah import NeedleInHaystack
from spkv.evals.tasks.turns import Turns


@dataclass(frozen=True)
class TaskOptions:
    """What tasks are made of; each task takes what it needs.

    Attributes:
        essays: text for haystacks, any file that `spkv.text` reads; None takes the documentation inside Python.
        depths: points of the grid of `niah`.
        turns: questions that `turns` asks about one text.
    """

    essays: Path | None = None
    depths: int = 11
    turns: int = 8

    @cached_property
    def haystack(self) -> Haystack:
        """Read once, for all the tasks made with these options."""
        return load_haystack(self.essays)


TASKS: dict[str, Callable[[TaskOptions], Task]] = {
    "niah": lambda options: NeedleInHaystack(options.haystack, options.depths),
    "turns": lambda options: Turns(options.haystack, options.turns),
}
GROUPS: dict[str, tuple[str, ...]] = {}


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
