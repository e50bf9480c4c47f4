"""Choosing an implementation: by name, or the first that can run; never a silent substitute for a forced one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator.

    Attributes:
        name: what `implementation=` takes.
        load: returns the function; called when chosen, so that its imports stay lazy.
        obstacle: takes the operator's arguments by name and returns why it cannot run them, or None.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    obstacle: Callable[[dict[str, Any]], str | None] = lambda arguments: None


def choose(
    operator: str, implementations: tuple[Implementation, ...], name: str | None, arguments: dict[str, Any]
) -> Callable[..., Any]:
    """Return the function of the implementation called `name`, or of the first without an obstacle.

    Raises:
        ValueError: for an unknown name, or a named implementation that cannot run these arguments.
    """
    if name is None:
        for implementation in implementations:
            if implementation.obstacle(arguments) is None:
                _warn_of_reference(operator, implementations, implementation, arguments)
                return implementation.load()
        reasons = "; ".join(f"{i.name}: {i.obstacle(arguments)}" for i in implementations)
        raise ValueError(f"no implementation of {operator} can run these arguments: {reasons}")
    for implementation in implementations:
        if implementation.name == name:
            reason = implementation.obstacle(arguments)
            if reason is not None:
                raise ValueError(f"{operator}: implementation {name!r} was asked for and cannot run: {reason}")
            return implementation.load()
    known = ", ".join(i.name for i in implementations)
    raise ValueError(f"{operator}: unknown implementation {name!r}; known are {known}")


def _warn_of_reference(
    operator: str, implementations: tuple[Implementation, ...], chosen: Implementation, arguments: dict[str, Any]
) -> None:
    """Say what keeps a GPU from the faster implementations; Python shows the same warning once."""
    if chosen.name == "reference" and any(isinstance(a, Tensor) and a.is_cuda for a in arguments.values()):
        reasons = "; ".join(f"{i.name}: {i.obstacle(arguments)}" for i in implementations if i is not chosen)
        warnings.warn(f"{operator} runs as the eager reference, which is slow on a GPU. {reasons}", stacklevel=4)
