"""A needle in a haystack: one fact in a long text, at every depth in turn."""

from __future__ import annotations

from spkv.evals.task import Example, Question
from spkv.evals.tasks.facts import sample_numbers, sample_things
from spkv.evals.tasks.fill import FilledTask
from spkv.evals.tasks.haystack import Haystack, hide

_INSTRUCTION = "A secret number is hidden in the following text. You will be asked for it afterwards.\n\n"
# Seven digits, each a token of its own in some vocabularies, with room for the space and the full stop.
_MAX_NEW_TOKENS = 16
# Examples begin at different words of the haystack, so that one score rests on more than one text.
STARTS = 50_000


class NeedleInHaystack(FilledTask):
    """Example i hides its needle at depth i of the grid, which begins again when it is through.

    Facts: `depth`, 0 the beginning of the text and 1 its end.
    """

    name = "niah"

    def __init__(self, haystack: Haystack, depths: int = 11) -> None:
        """
        Args:
            haystack: the text.
            depths: points of the grid, both ends included, at least 2.

        Raises:
            ValueError: for fewer.
        """
        if depths < 2:
            raise ValueError(f"depths must be at least 2, not {depths}")
        self._haystack = haystack
        self._depths = [round(index / (depths - 1), 4) for index in range(depths)]
        self.note = f"haystack: {haystack.source}"

    def build(self, seed: int, index: int, length: int, pieces: int) -> Example:
        rng = self.random(seed, index)
        depth = self._depths[index % len(self._depths)]
        [thing], [number] = sample_things(rng, 1), sample_numbers(rng, 1)
        words = self._haystack.passage(rng.randrange(STARTS), pieces)
        return Example(
            context=_INSTRUCTION + hide(words, [(depth, needle(thing, number))]),
            questions=(question(thing, number),),
            facts={"depth": depth, **self._haystack.facts(pieces)},
        )


def needle(thing: str, number: str) -> str:
    """The sentence that is hidden."""
    return f"The secret number of the {thing} is {number}."


def question(thing: str, number: str) -> Question:
    """The question that only the needle answers."""
    prompt = f"\n\nQuestion: What is the secret number of the {thing}?\nAnswer: The secret number of the {thing} is"
    return Question(prompt, (number,), _MAX_NEW_TOKENS, stop="\n")
