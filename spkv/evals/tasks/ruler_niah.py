"""The eight retrieval tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654): needles of several kinds and numbers.

Wording, keys, values, numbers of needles and the score are the published ones. Depths are drawn from the published
grid, but count words rather than sentences, since the sentences of technical text differ much in length.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal
from uuid import UUID

from spkv.evals.task import Example, Question
from spkv.evals.tasks.fill import FilledTask
from spkv.evals.tasks.haystack import Haystack, hide
from spkv.evals.tasks.words import adjectives, nouns

REPEATED = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DEPTHS = [round(100 * point / 39) / 100 for point in range(40)]
_MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Form:
    """What sets one retrieval task apart.

    Attributes:
        filling: lines of one repeated text, essays, or needles that nobody asks for.
        keys, values: what needles are made of; a word is an adjective and a noun, joined.
        key_count, values_per_key: needles are the product.
        asked: keys that the question is about.
    """

    filling: Literal["repeated", "essays", "needles"] = "essays"
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    key_count: int = 1
    values_per_key: int = 1
    asked: int = 1


FORMS = {
    "niah_single_1": Form("repeated"),
    "niah_single_2": Form(),
    "niah_single_3": Form(values="uuids"),
    "niah_multikey_1": Form(key_count=4),
    "niah_multikey_2": Form("needles"),
    "niah_multikey_3": Form("needles", "uuids", "uuids"),
    "niah_multivalue": Form(values_per_key=4),
    "niah_multiquery": Form(key_count=4, asked=4),
}


class RulerNeedles(FilledTask):
    """One of `FORMS`.

    Facts: `depth` of the needle, in tenths, where a single one is asked for.
    """

    def __init__(self, name: str, haystack: Haystack) -> None:
        """
        Args:
            name: out of `FORMS`.
            haystack: stands for the published essays, in the tasks that hide needles in essays.

        Raises:
            ModuleNotFoundError: without the package that has the words, if the task needs words.
        """
        self.name = name
        self._form = FORMS[name]
        self._haystack = haystack
        self._adjectives, self._nouns = (adjectives(), nouns()) if self._form.keys == "words" else ((), ())
        self.least = 0 if self._form.filling == "essays" else self._form.key_count * self._form.values_per_key
        if self._form.filling == "essays":
            self.note = f"haystack: {haystack.source}"

    def build(self, seed: int, index: int, length: int, pieces: int) -> Example:
        form, rng = self._form, self.random(seed, index)
        # Keys and values that have been drawn; distractors are drawn later and must be others.
        drawn: set[str] = set()
        keys = [self._draw(rng, form.keys, drawn) for _ in range(form.key_count)]
        values = {key: [self._draw(rng, form.values, drawn) for _ in range(form.values_per_key)] for key in keys}
        pairs = [(key, value) for key in keys for value in values[key]]
        rng.shuffle(pairs)
        asked = rng.sample(keys, form.asked)
        references = tuple(value for key in asked for value in values[key])

        needles = [self._needle(*pair) for pair in pairs]
        if form.filling == "essays":
            depths = sorted(rng.sample(_DEPTHS, len(needles)))
            text = hide(self._haystack.passage(0, pieces), zip(depths, needles, strict=True))
            facts = self._haystack.facts(pieces)
        else:
            lines = [self._line(rng, drawn) for _ in range(pieces)]
            positions = sorted(rng.sample(range(pieces), len(needles)))
            depths = [position / pieces for position in positions]
            # From the last to the first, so that what is inserted moves none of the positions that remain.
            for position, needle in zip(reversed(positions), reversed(needles), strict=True):
                lines.insert(position, needle)
            text = "\n".join(lines)
            facts = {}
        if len(references) == 1:
            depth = depths[[value for _, value in pairs].index(references[0])]
            facts = {"depth": int(depth * 10) / 10, **facts}
        opening, prompt = wording(form.values, asked, single=len(references) == 1)
        return Example(f"{opening}\n{text}", (Question(prompt, references, _MAX_NEW_TOKENS),), facts)

    def _line(self, rng: Random, drawn: set[str]) -> str:
        if self._form.filling == "repeated":
            return REPEATED
        return self._needle(self._draw(rng, self._form.keys, drawn), self._draw(rng, self._form.values, drawn))

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self._form.values} for {key} is: {value}."

    def _draw(self, rng: Random, kind: str, drawn: set[str]) -> str:
        while True:
            if kind == "words":
                text = f"{rng.choice(self._adjectives)}-{rng.choice(self._nouns)}"
            elif kind == "numbers":
                text = str(rng.randint(1_000_000, 9_999_999))
            else:
                text = str(UUID(int=rng.getrandbits(128), version=4))
            if text not in drawn:
                drawn.add(text)
                return text


def wording(values: str, asked: list[str], *, single: bool) -> tuple[str, str]:
    """Return the published opening and question, which differ where there is one answer."""
    keys = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    if single:
        value = values.removesuffix("s")
        opening = f"A special magic {value} is hidden within the following text. Make sure to memorize it."
        about = f"the special magic {value} for {keys} mentioned in the provided text"
        return f"{opening} I will quiz you about the {value} afterwards.", f"\nWhat is {about}? T{about[1:]} is"
    opening = f"Some special magic {values} are hidden within the following text. Make sure to memorize it."
    about = f"the special magic {values} for {keys} mentioned in the provided text"
    return f"{opening} I will quiz you about the {values} afterwards.", f"\nWhat are all {about}? T{about[1:]} are"
