"""Several questions about one long text, in turn, on the same cache.

A cache that is pruned for the question at its end passes single-question tests and fails here: the questions come when
it has already been pruned, and the answers before lie between.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random

from transformers import PreTrainedTokenizerBase

from spkv.evals.task import Example, Question
from spkv.evals.tasks.facts import sample_numbers, sample_things
from spkv.evals.tasks.fill import Filler, check_count
from spkv.evals.tasks.haystack import Haystack, hide
from spkv.evals.tasks.niah import MAX_NEW_TOKENS, STARTS
from spkv.evals.tasks.scores import string_match_all

_INSTRUCTION = "Secret numbers are hidden in the following text. You will be asked for some of them afterwards.\n"
# Facts in the text for each one that is asked for: which of them matter is not known while the text is read.
_FACTS_PER_TURN = 3


class Turns:
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

    def examples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> Sequence[Example]:
        check_count(count)
        filler = Filler(tokenizer, length)
        return [filler.fill(partial(self._example, seed, index), 0, length) for index in range(count)]

    def score(self, answer: str, question: Question) -> float:
        return string_match_all(answer, question.references)

    def _example(self, seed: int, index: int, words: int) -> Example:
        rng = Random(f"turns {seed} {index}")
        count = self._turns * _FACTS_PER_TURN
        things, numbers = sample_things(rng, count), sample_numbers(rng, count)
        # One fact in each of as many equal parts of the text, anywhere in it.
        depths = [(part + rng.random()) / count for part in range(count)]
        asked = rng.sample(range(count), self._turns)
        passage = self._haystack.passage(rng.randrange(STARTS), words)
        needles = [
            (depth, f"The secret number of the {thing} is {number}.")
            for depth, thing, number in zip(depths, things, numbers, strict=True)
        ]
        return Example(
            context=_INSTRUCTION + "\n" + hide(passage, needles),
            questions=tuple(_question(things[fact], numbers[fact]) for fact in asked),
            facts={
                "turn": tuple(range(self._turns)),
                "depth": tuple(int(depths[fact] * 10) / 10 for fact in asked),
                **self._haystack.facts(words),
            },
        )


def _question(thing: str, number: str) -> Question:
    prompt = f"\n\nQuestion: What is the secret number of the {thing}?\nAnswer: The secret number of the {thing} is"
    return Question(prompt, (number,), MAX_NEW_TOKENS)
