"""Aggregation in RULER (arXiv 2404.06654): common words and frequent words, which no single place in the text tells."""

from __future__ import annotations

from math import pi
from random import Random
from string import ascii_lowercase

from spkv.evals.task import Example, Question
from spkv.evals.tasks.fill import FilledTask
from spkv.evals.tasks.words import adjectives, nouns, verbs

_COMMON = 10
_CWE_OPENING = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_CWE_PROMPT = (
    "\nQuestion: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
_FWE_OPENING = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
_FWE_PROMPT = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
    "appeared words are:"
)
# Below this length the published task repeats its words less often.
_SHORT = 4096


class CommonWords(FilledTask):
    """Ten words of a long list stand in it ten times as often as the rest; a solved example comes first."""

    name = "cwe"
    least = _COMMON + 1

    def __init__(self) -> None:
        """Raises a ModuleNotFoundError without the package that has the words."""
        self._words = sorted({*nouns(), *adjectives(), *verbs()})

    def build(self, seed: int, index: int, length: int, pieces: int) -> Example:
        rng = self.random(seed, index)
        # Of a list: its different words, and how often the common ones and the others stand in it.
        shot_list, own_list = ((20, 3, 1), (pieces, 6, 1)) if length < _SHORT else ((40, 10, 3), (pieces, 30, 3))
        shot, shot_answer = self._list(rng, *shot_list)
        text, common = self._list(rng, *own_list)
        return Example(
            context=f"{_CWE_OPENING}{shot}{_CWE_PROMPT} {_numbered(shot_answer)}\n{_CWE_OPENING}{text}",
            questions=(Question(_CWE_PROMPT, tuple(common), 120),),
        )

    def _list(self, rng: Random, different: int, common_repeats: int, other_repeats: int) -> tuple[str, list[str]]:
        words = rng.sample(self._words, min(different, len(self._words)))
        # Near 128k tokens a list may need more words than there are, and goes on with pairs of them.
        while len(words) < different:
            words.append("-".join(rng.sample(self._words, 2)))
        common, others = words[:_COMMON], words[_COMMON:]
        listed = common * common_repeats + others * other_repeats
        rng.shuffle(listed)
        return _numbered(listed), common


class FrequentWords(FilledTask):
    """Made-up words by Zipf's law: the k-th in rank stands in the text in proportion to 1 / k².

    The first rank goes to dots, which the question tells to ignore; ranks two to four are asked for.
    """

    name = "fwe"
    # Enough that the ranks asked for, and the one after them, all differ in their counts.
    least = 100

    def build(self, seed: int, index: int, length: int, pieces: int) -> Example:
        rng = self.random(seed, index)
        max_new_tokens = 50
        vocabulary = {"...": None}
        while len(vocabulary) < max((length - max_new_tokens) // 50, 5):
            vocabulary["".join(rng.choices(ascii_lowercase, k=6))] = None
        words = [
            word
            for rank, word in enumerate(vocabulary, 1)
            # pi² / 6 is the sum of all 1 / k².
            for _ in range(int(pieces / rank**2 / (pi**2 / 6)))
        ]
        rng.shuffle(words)
        frequent = tuple(vocabulary)[1:4]
        return Example(_FWE_OPENING + " ".join(words), (Question(_FWE_PROMPT, frequent, max_new_tokens),))


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
