"""Several questions about one long text, in turn, on the same cache.

A cache that is pruned for the question at its end passes single-question tests and fails here: the questions come when
it has already been pruned, and the answers before lie between.
"""

from __future__ import annotations

from spkv.evals.task import Example
from spkv.evals.tasks.facts import sample_numbers, sample_things
from spkv.evals.tasks.fill import FilledTask
from spkv.evals.tasks.haystack import Haystack, hide
from spkv.evals.tasks.niah import STARTS, needle, question

_INSTRUCTION = "Secret numbers are hidden in the following text. You will be asked for some of them afterwards.\n\n"
# Facts in the text for each one that is asked for: which of them matter is not known while the text is read.
_FACTS_PER_TURN = 3


class Turns(FilledTask):
    """The facts are spread evenly over the text and asked for in random order.

    Facts: `turn`, from 0, and `depth`, in tenths; each a tuple with one value a question.
    """

    name = "turns"

    def __init__(self, haystack: Haystack, turns: int = 8) -> None:
        """
        Args:
            haystack: the text.
            turns: questions of an example, at least 2.

        Raises:
            ValueError: for fewer.
        """
        if turns < 2:
            raise ValueError(f"turns must be at least 2, not {turns}")
        self._haystack = haystack
        self._turns = turns
        self.note = f"haystack: {haystack.source}"

    def build(self, seed: int, index: int, length: int, pieces: int) -> Example:
        rng = self.random(seed, index)
        count = self._turns * _FACTS_PER_TURN
        things, numbers = sample_things(rng, count), sample_numbers(rng, count)
        # One fact in each of as many equal parts of the text, anywhere in it.
        depths = [(part + rng.random()) / count for part in range(count)]
        asked = rng.sample(range(count), self._turns)
        words = self._haystack.passage(rng.randrange(STARTS), pieces)
        return Example(
            context=_INSTRUCTION + hide(words, zip(depths, map(needle, things, numbers), strict=True)),
            questions=tuple(question(things[fact], numbers[fact]) for fact in asked),
            facts={
                "turn": tuple(range(self._turns)),
                "depth": tuple(int(depths[fact] * 10) / 10 for fact in asked),
                **self._haystack.facts(pieces),
            },
        )
