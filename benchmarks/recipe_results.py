"""The rows of `benchmarks.recipes`: in a file that several sessions add to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from spkv.training.recipes import Recipe

_IDENTITY = ("model", "run", "seed", "data", "validation", "validation_tokens", "evaluation_length")
_KEY = (*_IDENTITY, "policy", "threshold")

# What a whole session shares, but not the rows that others added.
_OF_ROWS = ("commit", "command", "device")


class Results:
    """Rows by key, and each run's recipe; written whenever something is added.

    Args:
        path: the file, read first if it exists.
        circumstances: commit, command and device, which every row made now gets.
    """

    def __init__(self, path: Path, circumstances: dict[str, Any]):
        self.path, self.circumstances = path, {name: circumstances[name] for name in _OF_ROWS}
        self._rows: dict[str, dict[str, Any]] = {}
        self._recipes: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._take(path)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self._rows.values())

    def find(self, identity: dict[str, Any], policy: str, threshold: float | None) -> dict[str, Any] | None:
        """Return the row of a run's policy, if there is one."""
        return self._rows.get(_key({**identity, "policy": policy, "threshold": threshold}))

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, in place of one with the same key."""
        self._rows[_key(row)] = {**row, **self.circumstances}
        self._save()

    def merge(self, path: Path) -> None:
        """Add the rows of another file; those of the same key replace ours."""
        self._take(path)
        self._save()

    def check_recipe(self, identity: dict[str, Any], recipe: Recipe) -> None:
        """Raise a ValueError if the rows of this run were made by another recipe."""
        stored = self._recipes.get(_run(identity))
        if stored is None or Recipe(**stored) == recipe:
            return
        now = recipe.to_dict()
        changed = sorted(name for name in {*stored, *now} if stored.get(name) != now.get(name))
        raise ValueError(
            f"{self.path.name} holds a run {identity['run']!r} that differs in {', '.join(changed)}; "
            "choose another file, or remove its rows"
        )

    def add_recipe(self, identity: dict[str, Any], recipe: Recipe) -> None:
        self._recipes[_run(identity)] = recipe.to_dict()

    def _take(self, path: Path) -> None:
        stored = json.loads(path.read_text(encoding="utf-8"))
        for name, recipe in stored["recipes"].items():
            if Recipe(**self._recipes.setdefault(name, recipe)) != Recipe(**recipe):
                raise ValueError(f"{path.name} holds another recipe of the run {name!r} than {self.path.name}")
        self._rows |= {_key(row): row for row in stored["rows"]}

    def _save(self) -> None:
        """Write the file, whole or not at all, a row a line."""
        recipes = [f"{json.dumps(name)}: {json.dumps(recipe)}" for name, recipe in self._recipes.items()]
        text = '{"recipes": {\n' + ",\n".join(recipes) + '\n},\n"rows": [\n'
        text += ",\n".join(map(json.dumps, self.rows)) + "\n]}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".tmp")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, self.path)


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row[name] for name in _KEY])


def _run(identity: dict[str, Any]) -> str:
    return f"{identity['model']} {identity['run']}"
