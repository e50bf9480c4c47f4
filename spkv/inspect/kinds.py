"""Which kinds of token a head keeps: kinds told from the text alone, rates, and sentences that name them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

FIRST_TOKENS = 4
"""Positions at the start of a text that attention likes as sinks (StreamingLLM, arXiv 2309.17453)."""

KINDS = (
    "first tokens",
    "line breaks",
    "spaces",
    "numbers",
    "code symbols",
    "punctuation",
    "names",
    "words",
    "word parts",
    "other",
)
_CODE = frozenset("{}[]<>=+*&|^~`@#_\\")
_SENTENCE_ENDS = frozenset(".!?:\n")
# Below this many tokens a rate says little; the first tokens are few in any text.
_ENOUGH = 20
_PREFERRED, _AVOIDED = 1.5, 0.5  # times the density of the head
_NAMED = 4  # kinds that a sentence names at most, on each side


def token_kinds(pieces: Sequence[str]) -> Tensor:
    """Tell the kind of every token of a text, as an index into `KINDS`.

    A name is a word with a capital that does not start a sentence. What goes on with a word is a word part, numbers
    excepted; a kind of code symbol or punctuation has nothing else in it.

    Args:
        pieces: [T], the tokens of one document as text.

    Returns:
        [T] int64.
    """
    kinds, before = [], "\n"  # before: the text that matters up to the token, of which the end is looked at
    for index, piece in enumerate(pieces):
        kinds.append(KINDS.index("first tokens" if index < FIRST_TOKENS else _kind(piece, before)))
        before = (before + piece)[-40:]
    return torch.tensor(kinds, dtype=torch.long)


def _kind(piece: str, before: str) -> str:
    core = piece.strip()
    if not core:
        return "line breaks" if "\n" in piece else "spaces" if piece else "other"
    if core.isnumeric():
        return "numbers"
    if not any(char.isalnum() for char in core):
        if any(char in _CODE for char in core):
            return "code symbols"
        return "punctuation" if all(unicodedata.category(char)[0] == "P" for char in core) else "other"
    if not core[0].isalpha():
        return "other"
    if not piece[0].isspace() and (before[-1:].isalnum() or before[-1:] in "_'’"):
        return "word parts"
    ended = before.rstrip(" \t\"'“”‘’()")
    if core[0].isupper() and ended and ended[-1] not in _SENTENCE_ENDS:
        return "names"
    return "words"


def count_kinds(kinds: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Count tokens by kind: kinds [T] and keep [layers, Hkv, T] -> all [kinds] and kept [layers, Hkv, kinds]."""
    member = torch.nn.functional.one_hot(kinds, len(KINDS)).double()
    return member.sum(0).long(), (keep.double() @ member).round().long()


def describe(density: float, counts: Sequence[int], kept: Sequence[float], early: float | None = None) -> str:
    """Say in words what a head, or several, keeps more and less often than it keeps anything.

    Args:
        density: of all tokens that have left the window.
        counts: [kinds], tokens of each kind among them.
        kept: [kinds], how many of them are kept; a mean over several heads.
        early: density of the first tenth / density of the rest; None if that says nothing.

    Returns:
        One sentence without subject: "keeps 24.0% of ...: above all ...; seldom ...".
    """
    if density >= 0.995:
        return "keeps everything that leaves the window"
    rates = {
        name: part / count
        for name, count, part in zip(KINDS, counts, kept, strict=True)
        if count >= (1 if name == "first tokens" else _ENOUGH)
    }
    ordered = sorted(rates, key=lambda name: -rates[name])
    some = max(density, 0.005)
    more = [f"{name} ({rates[name]:.0%})" for name in ordered if rates[name] >= _PREFERRED * some][:_NAMED]
    less = [f"{name} ({rates[name]:.0%})" for name in reversed(ordered) if rates[name] <= _AVOIDED * some][:_NAMED]
    if density < 0.005:
        start = "keeps next to nothing" + (", but " if more else "")
        return start + ", ".join(more)
    parts = ["above all " + ", ".join(more)] if more else []
    if less:
        parts.append("seldom " + ", ".join(less))
    if early is not None and not 2 / 3 < early < 1.5:
        parts.append(f"{early:.1f}× as often in the first tenth of a text as after it")
    return f"keeps {density:.1%} of what leaves the window: " + (
        "; ".join(parts) or "no kind of token much more or less often than the others"
    )
