"""English words by part of speech, from the package `wonderwords`, which RULER draws on."""

from __future__ import annotations

from functools import cache


def nouns() -> tuple[str, ...]:
    """Every noun, in the order of the alphabet."""
    return _words("noun")


def adjectives() -> tuple[str, ...]:
    """Every adjective, in the order of the alphabet."""
    return _words("adjective")


def verbs() -> tuple[str, ...]:
    """Every verb, in the order of the alphabet."""
    return _words("verb")


@cache
def _words(part_of_speech: str) -> tuple[str, ...]:
    try:
        from wonderwords import RandomWord
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the task draws its words from the package `wonderwords`, which is not installed; "
            'pip install "spkv[evals]"',
            name="wonderwords",
        ) from error
    return tuple(sorted(set(RandomWord().filter(include_categories=[part_of_speech]))))
