"""What an evaluation has measured so far: a record for each example and policy, saved as soon as it is there.

A directory of results holds `arguments.json`, what was asked for; `examples.jsonl`, the records; and `results.json`,
the rows made of them, which `spkv report` reads. Seconds are in the records alone, so that two evaluations of one seed
on one device leave the same results.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ARGUMENTS_FILE, EXAMPLES_FILE, RESULTS_FILE = "arguments.json", "examples.jsonl", "results.json"
_FORMAT = 1

Key = tuple[str, int, str]
"""Task, length, and the policy's label."""


class Records:
    """The records of one evaluation.

    Args:
        output: directory to save them in, and to go on from; None keeps them in memory.
        arguments: what determines them, as JSON values.

    Raises:
        ValueError: if the directory holds an evaluation with other arguments, naming those that differ.
    """

    def __init__(self, output: str | os.PathLike[str] | None, arguments: Mapping[str, Any]):
        self.output = None if output is None else Path(output)
        self.arguments: dict[str, Any] = json.loads(json.dumps(arguments))
        self._records: dict[Key, dict[int, dict[str, Any]]] = {}
        self._weights: dict[str, str] = {}
        if self.output is None:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        file = self.output / ARGUMENTS_FILE
        if file.is_file():
            stored = json.loads(file.read_text(encoding="utf-8"))
            self._weights = stored.pop("weights", {})
            self._check_arguments(stored)
            self._load(self.output / EXAMPLES_FILE)
        elif (self.output / EXAMPLES_FILE).exists():
            raise ValueError(f"{self.output} holds {EXAMPLES_FILE} without {ARGUMENTS_FILE}: choose another directory")
        else:
            write_json(file, self.arguments)

    def check_weights(self, model: str, checksum: str | None) -> None:
        """Remember the weights of a model, unless they are not known.

        Raises:
            ValueError: if records of this model were made with others.
        """
        if checksum is None:
            return
        if self._weights.setdefault(model, checksum) != checksum:
            raise ValueError(
                f"{self.output} holds an evaluation of {model} with other weights: choose another directory"
            )
        if self.output is not None:
            write_json(self.output / ARGUMENTS_FILE, {**self.arguments, "weights": self._weights})

    def done(self, key: Key) -> dict[int, dict[str, Any]]:
        """The records there are, by example."""
        return self._records.get(key, {})

    def add(self, key: Key, records: Sequence[dict[str, Any]]) -> None:
        """Enter records, and save them."""
        task, length, policy = key
        self._records.setdefault(key, {}).update({record["example"]: record for record in records})
        if self.output is None:
            return
        lines = [json.dumps({"task": task, "length": length, "policy": policy, **record}) for record in records]
        with (self.output / EXAMPLES_FILE).open("a", encoding="utf-8") as stream:
            stream.write("".join(line + "\n" for line in lines))
            stream.flush()
            os.fsync(stream.fileno())

    def write_results(self, rows: Sequence[dict[str, Any]]) -> None:
        """Save the rows."""
        if self.output is None:
            return
        untimed = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
        arguments = {**self.arguments, "weights": self._weights}
        write_json(self.output / RESULTS_FILE, {"format": _FORMAT, "arguments": arguments, "rows": untimed})

    def _check_arguments(self, stored: dict[str, Any]) -> None:
        names = [name for name in {**stored, **self.arguments} if stored.get(name) != self.arguments.get(name)]
        if names:
            differences = "; ".join(
                f"{name} was {_short(stored.get(name))}, now {_short(self.arguments.get(name))}" for name in names
            )
            raise ValueError(
                f"{self.output} holds an evaluation with other arguments: {differences}. Choose another directory, or "
                "the same arguments to go on"
            )

    def _load(self, file: Path) -> None:
        if not file.is_file():
            return
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # the last line was being written when the evaluation was interrupted
            with file.open("rb+") as stream:
                stream.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                key = (record.pop("task"), record.pop("length"), record.pop("policy"))
                self._records.setdefault(key, {})[record["example"]] = record
            except (json.JSONDecodeError, KeyError) as error:
                raise ValueError(f"{file}, line {number} is no record of an evaluation: {error}") from error


def stored_seconds(directory: Path) -> dict[Key, float]:
    """What each task, length and policy of an evaluation took in all; nothing if its records are not there."""
    file = directory / EXAMPLES_FILE
    seconds: dict[Key, float] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the last one, where an evaluation was interrupted
            record = json.loads(line)
            key = (record["task"], record["length"], record["policy"])
            seconds[key] = seconds.get(key, 0.0) + record["seconds"]
    return seconds


def write_json(file: Path, value: Any) -> None:
    """Write a file of which a reader sees all or, while it is being written, nothing."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(file)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
