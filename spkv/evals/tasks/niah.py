"""A needle in a haystack: one fact in a long text, at every depth in turn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random

from transformers import PreTrainedTokenizerBase

from spkv.evals.task import Example, Question
from spkv.evals.tasks.facts import sample_numbers, sample_things
from spkv.evals.tasks.fill import Filler, check_count
from spkv.evals.tasks.haystack import Haystack, hide
from spkv.evals.tasks.scores import string_match_all

_INSTRUCTION = "A secret number is hidden in the following text. You will be asked for it afterwards.\n\n"
# Seven digits, each a token of its own in some vocabularies, with room for the space and the full stop.
MAX_NEW_TOKENS = 16
# Examples begin at different words of the haystack, so that one score rests on more than one text.
STARTS = 50_000


class NeedleInHaystack:
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

    def examples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> Sequence[Example]:
        check_count(count)
        filler = Filler(tokenizer, length)
        return [filler.fill(partial(self._example, seed, index), 0, length) for index in range(count)]

    def score(self, answer: str, question: Question) -> float:
        return string_match_all(answer, question.references)

    def _example(self, seed: int, index: int, words: int) -> Example:
        rng = Random(f"niah {seed} {index}")
        depth = self._depths[index % len(self._depths)]
        [thing], [number] = sample_things(rng, 1), sample_numbers(rng, 1)
        passage = self._haystack.passage(rng.randrange(STARTS), words)
        text = hide(passage, [(depth, f"The secret number of the {thing} is {number}.")])
        prompt = f"\n\nQuestion: What is the secret number of the {thing}?\nAnswer: The secret number of the {thing} is"
        return Example(
            context=_INSTRUCTION + text,
            questions=(Question(prompt, (number,), MAX_NEW_TOKENS),),
            facts={"depth": depth, **self._haystack.facts(words)},
        )
