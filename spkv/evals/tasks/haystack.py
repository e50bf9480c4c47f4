"""The text that facts are hidden in, and how they are hidden."""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from spkv.text import check_readable, read_documents

_SENTENCE_END = re.compile(r"""[.!?]["')\]’”]*$""")
_READABLE = re.compile(r"\w")
# A docstring of fewer words is a label, not prose.
_PROSE = 40


class Haystack:
    """Words of running text, read as far as they are needed.

    Attributes:
        source: what the text is, in words.
    """

    def __init__(self, documents: Iterable[str], source: str) -> None:
        self.source = source
        self._documents = iter(documents)
        self._words: list[str] = []

    def passage(self, start: int, count: int) -> list[str]:
        """Return `count` words from the word `start` on; past its end the text begins again.

        Raises:
            ValueError: if the text is empty.
        """
        self._read(start + count)
        if count and not self._words:
            raise ValueError(f"the haystack, {self.source}, holds no words")
        total = len(self._words)
        if start + count <= total:
            return self._words[start : start + count]
        return [self._words[index % total] for index in range(start, start + count)]

    def facts(self, count: int) -> dict[str, Any]:
        """Say of a passage of `count` words that it repeats itself, if it does."""
        self._read(count)
        return {"repeats": True} if count > len(self._words) else {}

    def _read(self, count: int) -> None:
        while len(self._words) < count:
            document = next(self._documents, None)
            if document is None:
                return
            # Rulers and ornaments of plain text ("*****") are no words.
            self._words += [word for word in document.split() if _READABLE.search(word)]


def load_haystack(essays: Path | None) -> Haystack:
    """Make a haystack of a file's documents, or of Python's own documentation, which every machine has.

    Raises:
        FileNotFoundError, ValueError: if the file is missing or cannot be read.
    """
    if essays is None:
        version = ".".join(map(str, sys.version_info[:2]))
        return Haystack(_python_documentation(), f"the documentation inside Python {version}")
    check_readable(essays)
    return Haystack((text for text, _ in read_documents(essays)), essays.name)


def hide(words: Sequence[str], needles: Iterable[tuple[float, str]]) -> str:
    """Join words to a text, with needles between its sentences.

    Args:
        words: the haystack.
        needles: depth and text of each, by rising depth: 0 is the beginning, 1 the end.
    """
    ends = [0, *(i for i, word in enumerate(words, 1) if _SENTENCE_END.search(word)), len(words)]
    parts: list[str] = []
    done = 0
    for depth, needle in needles:
        position = _nearest(ends, depth * len(words))
        parts += [*words[done:position], needle]
        done = position
    return " ".join([*parts, *words[done:]])


def _nearest(ends: Sequence[int], position: float) -> int:
    after = bisect_left(ends, position)
    around = ends[max(after - 1, 0) : after + 1]
    return min(around, key=lambda end: abs(end - position))


def _python_documentation() -> Iterator[str]:
    """Yield the language reference that `help()` shows, then the docstrings of the standard library."""
    from pydoc_data.topics import topics

    yield from topics.values()
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(sys.stdlib_module_names):
        for file in (library / f"{name}.py", library / name / "__init__.py"):
            if file.is_file():
                yield from _docstrings(file)


def _docstrings(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node) or ""
            if len(text.split()) >= _PROSE:
                yield text
