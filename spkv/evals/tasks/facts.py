"""Facts that no text contains by chance: a thing, and a number that belongs to it."""

from __future__ import annotations

from random import Random

# Plain text, split when it is needed: quotes and commas would double it.
_ADJECTIVES = (
    "amber ancient bitter blue brass broken bronze calm cedar clever cold copper crimson curious distant dusty early "
    "empty faded foreign forgotten frozen gentle golden grey hidden hollow humble iron ivory jade late linen little "
    "lonely marble modern narrow northern olive painted pale patient plain polished purple quiet rusty scarlet secret "
    "silent silver slow southern sturdy sunny velvet violet wandering warm western wooden yellow"
)
_NOUNS = (
    "anchor bakery balloon barrel bicycle bridge candle canoe castle cathedral chimney clock compass cottage desert "
    "engine factory ferry forest fountain garden glacier guitar hammer harbour island kettle ladder lantern library "
    "lighthouse locomotive mill mirror monastery museum orchard orchestra pavilion piano pier pyramid quarry railway "
    "reservoir sailor school statue submarine telescope theatre tower tractor tunnel umbrella valley vineyard volcano "
    "waterfall windmill workshop"
)


def sample_things(rng: Random, count: int) -> list[str]:
    """Draw names of things, all different: "amber lighthouse".

    Raises:
        ValueError: if there are fewer.
    """
    adjectives, nouns = _ADJECTIVES.split(), _NOUNS.split()
    total = len(adjectives) * len(nouns)
    if count > total:
        raise ValueError(f"{count:,} facts were asked for; there are names for {total:,}")
    pairs = (divmod(index, len(nouns)) for index in rng.sample(range(total), count))
    return [f"{adjectives[adjective]} {nouns[noun]}" for adjective, noun in pairs]


def sample_numbers(rng: Random, count: int) -> list[str]:
    """Draw numbers of seven digits, all different."""
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]
