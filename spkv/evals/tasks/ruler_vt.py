"""Variable tracking of RULER (arXiv 2404.06654): a chain of assignments, scattered over a text that repeats itself."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from string import ascii_uppercase

from spkv.evals.task import Example, Question
from spkv.evals.tasks.fill import FilledTask
from spkv.evals.tasks.ruler_niah import REPEATED

_HOPS = 4
_MAX_NEW_TOKENS = 30
_OPENING = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
# The solved example has names of three letters, the task names of five, so that neither answers the other. With ten
# lines it takes up to 500 tokens in usual vocabularies, the published bound.
_SHOT_LETTERS, _LETTERS = 3, 5
_SHOT_LINES = 10


class VariableTracking(FilledTask):
    """Names all variables that hold a value: one is set to it, each of the others to the one before.

    Facts: `hops`, the assignments of a variable to a variable.
    """

    name = "vt"
    least = _HOPS + 1

    def build(self, seed: int, index: int, length: int, pieces: int) -> Example:
        rng = self.random(seed, index)
        shot_value, value = map(str, rng.sample(range(10_000, 100_000), 2))
        shot_names, names = _names(rng, _SHOT_LETTERS), _names(rng, _LETTERS)
        shot = _OPENING + _text(rng, shot_names, shot_value, _SHOT_LINES) + _prompt(shot_value)
        return Example(
            context=f"{shot} {' '.join(shot_names)}\n\n{_OPENING}{_text(rng, names, value, pieces)}",
            questions=(Question(_prompt(value), tuple(names), _MAX_NEW_TOKENS),),
            facts={"hops": _HOPS},
        )


def _names(rng: Random, letters: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) <= _HOPS:
        names["".join(rng.choices(ascii_uppercase, k=letters))] = None
    return list(names)


def _text(rng: Random, names: list[str], value: str, lines: int) -> str:
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]
    parts = [REPEATED + "\n"] * lines
    for ahead, position in enumerate(sorted(rng.sample(range(lines), len(chain)))):
        parts.insert(position + ahead, chain[ahead])
    return " ".join(parts)


def _prompt(value: str) -> str:
    # The published prompt ends in a space; vocabularies put it with the word that follows, so the model writes it.
    return (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to "
        f"the chain(s) of variable assignment in the text above, {_HOPS + 1} variables are assigned the value {value}, "
        "they are:"
    )
