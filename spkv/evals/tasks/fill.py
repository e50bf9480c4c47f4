"""Tasks whose examples are filled up to the length asked for, measured with the tokenizer that will read them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from random import Random

from transformers import PreTrainedTokenizerBase

from spkv.evals.task import Example, Question
from spkv.evals.tasks.scores import string_match_all

# An example that leaves no more than this share of the length unused is full.
_SLACK = 1 / 200
# Interpolation lands within a probe or two; where token counts jump, halving takes over.
_INTERPOLATIONS = 6


def count_tokens(tokenizer: PreTrainedTokenizerBase, example: Example) -> int:
    """Count the tokens that an example takes: context, prompts, and answers of the longest kind.

    Texts are encoded one by one, as they are read: the context with the special tokens that open a sequence, prompts
    without any.
    """
    tokens = len(tokenizer(example.context, split_special_tokens=True, verbose=False).input_ids)
    for question in example.questions:
        prompt = tokenizer(question.prompt, add_special_tokens=False, split_special_tokens=True, verbose=False)
        tokens += len(prompt.input_ids) + question.max_new_tokens
    return tokens


def check_count(count: int) -> None:
    """Raise a ValueError unless `count` examples can be asked for."""
    if count < 1:
        raise ValueError(f"count must be at least 1 example, not {count}")


class FilledTask(ABC):
    """A task whose examples grow with the pieces that they are filled with, such as words of a haystack.

    Attributes:
        name: the task's.
        note: what a reader of its scores should know, such as where the text is from.
        least: pieces that an example needs.
    """

    name: str
    note: str = ""
    least: int = 0

    @abstractmethod
    def build(self, seed: int, index: int, length: int, pieces: int) -> Example:
        """Make an example with a number of pieces, the same whenever the arguments are."""

    def examples(self, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int) -> Sequence[Example]:
        check_count(count)
        filler = Filler(tokenizer, length)
        # A piece takes one token at least, so there are never more pieces than tokens.
        most = max(length, self.least)
        return [filler.fill(partial(self.build, seed, index, length), self.least, most) for index in range(count)]

    def score(self, answer: str, question: Question) -> float:
        return string_match_all(answer, question.references)

    def random(self, *key: int | str) -> Random:
        """The random numbers of one example, or of whatever else `key` names."""
        return Random(" ".join(map(str, (self.name, *key))))


class Filler:
    """Finds how many pieces of filling make an example fill a length.

    What it learns from one example, the tokens that a piece takes, makes it quick on the next.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self._tokenizer = tokenizer
        self._length = length
        # More than a piece usually takes: the first probe is a short text, and cheap.
        self._tokens_per_piece = 16.0

    def fill(self, build: Callable[[int], Example], least: int, most: int) -> Example:
        """Return the example with about as many pieces as fit; one that is returned has been counted, and fits.

        Args:
            build: makes the example with a number of pieces; the same number gives the same example.
            least: pieces that an example needs.
            most: pieces that there are.

        Raises:
            ValueError: if the example does not fit with `least` pieces.
        """
        best = build(least)
        base = tokens = count_tokens(self._tokenizer, best)
        if tokens > self._length:
            raise ValueError(
                f"length leaves no room: the example takes {tokens:,} tokens, allowed are {self._length:,}"
            )
        low, high = least, most + 1
        probes = 0
        while high - low > 1 and self._length - tokens > self._length * _SLACK:
            # Half the slack is left as a margin, so that the rate of the last example rarely overshoots.
            room = self._length * (1 - _SLACK / 2) - tokens
            ahead = max(1, int(room / self._tokens_per_piece)) if probes < _INTERPOLATIONS else (high - low) // 2
            pieces = min(low + ahead, high - 1)
            example = build(pieces)
            counted = count_tokens(self._tokenizer, example)
            self._tokens_per_piece = max((counted - base) / (pieces - least), 1e-3)
            if counted <= self._length:
                low, tokens, best = pieces, counted, example
            else:
                high = pieces
            probes += 1
        return best
