"""What the commands print: progress on stderr, tables or JSON on stdout."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer

from spkv.evals.labels import beside, format_kept_fraction, matched_in_context, policy_label

# A row of a table: what it is called, its key in the result, and how it is printed.
_Row = tuple[str, str, Callable[[Any], str]]


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what libraries print meanwhile to stderr, where progress goes: stdout is for the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def working() -> Iterator[Callable[[str, int, int], None]]:
    """`quiet_stdout`, with progress bars; gives a function of (stage, done, total) that moves them."""
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from transformers.utils import logging

    logging.disable_progress_bar()
    tasks: dict[str, TaskID] = {}
    bars = Progress(console=Console(stderr=True))

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            bars.start()  # not before: an error in the options should be all that is printed
            tasks[stage] = bars.add_task(stage)
        bars.update(tasks[stage], completed=done, total=total)

    try:
        with quiet_stdout():
            yield progress
        for task in bars.tasks:  # a text may end early
            bars.update(task.id, completed=task.total)
    finally:
        if tasks:
            bars.stop()


def emit(result: Any, as_json: bool, printer: Callable[[Any], None]) -> None:
    """Print a result: as JSON, or with its printer."""
    if as_json:
        typer.echo(json.dumps(result, indent=2, allow_nan=False))
    else:
        printer(result)


def print_generation(result: dict[str, Any], label: str) -> None:
    """The text, and the measures of `spkv.hf.generation.Generation`."""
    typer.echo(result["text"] + "\n")
    title = f"{result['prompt_tokens']:,} tokens of prompt, {result['new_tokens']:,} new"
    _print_table(title, ["", label], [[name, show(result[key])] for name, key, show in _MEASURES])


def print_demo(result: dict[str, Any]) -> None:
    """One table, the two continuations, and where the pictures are."""
    dense, pruned = result["dense"], result["spkv"]
    rows = [[name, show(dense[key]), show(pruned[key])] for name, key, show in (_LOSS, *_MEASURES)]
    if dense["loss"]:
        rows[0][2] += f" ({pruned['loss'] / dense['loss'] - 1:+.2%})"
    title = f"{result['model']} on {result['tokens']:,} tokens ({result['text']}), threshold {result['threshold']:g}"
    _print_table(title, ["", "dense", "self-pruned"], rows)
    typer.echo(
        "\nDense is the model as published. Adaptation also teaches the kind of text that it reads; what pruning alone"
    )
    typer.echo("costs shows beside a model trained alike without it, or with every pair kept (`spkv eval`).")
    for label, side in (("dense", dense), ("self-pruned", pruned)):
        typer.echo(f"\nThe text continued, {label}:\n{side['continuation'].strip()}")
    typer.echo(f"\nDensity by layer and head:  {result['density_png']}")
    typer.echo(f"Every token, shaded:        {result['token_page']}")


def print_evaluation(rows: list[dict[str, Any]]) -> None:
    """The rows of `spkv.evals.evaluate`: a table for each task and length."""
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        same = [row for row in rows if (row["task"], row["length"]) == (task, length)]
        # The loss of the continuation alone is told where there is a policy that has no other.
        partial = any(row["loss"] is None for row in same)
        measures = [
            name
            for name in ("score", "loss", *(["continuation_loss"] if partial else []))
            if any(row[name] is not None for row in same)
        ]
        dense = next((row for row in same if row["policy"] == "dense"), None)
        contexts = any(map(matched_in_context, same))
        _print_table(
            f"{task}: {same[0]['examples']:,} of {length:,} tokens" + ("; (against dense)" if dense else ""),
            [
                "policy",
                *(name.replace("_", " ") for name in measures),
                "density",
                *(["kept of the context"] * contexts),
                "kept_fraction",
                "KV MB",
                "seconds",
            ],
            [
                [
                    policy_label(row),
                    *(beside(name, row, dense) for name in measures),
                    _format(row["density"], ".3f"),
                    *([format_kept_fraction(row["context_kept_fraction"])] * contexts),
                    format_kept_fraction(row["kept_fraction"]),
                    _format(row["kv_bytes"] and row["kv_bytes"] / 1e6, ",.1f"),
                    _format(row["seconds"], ".1f"),
                ]
                for row in same
            ],
        )


def print_values(result: dict[str, Any]) -> None:
    """A line for every entry that is a number or a string."""
    known = {key: show for _, key, show in _MEASURES}
    rows = []
    for key, value in result.items():
        if isinstance(value, (int, float, str)):
            plain = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if isinstance(value, float) else value
            rows.append([key, known[key](value) if key in known else plain])
    _print_table("", ["", ""], rows)


def _print_table(title: str, header: list[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", show_header=any(header))
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # What is printed is data: brackets in it are no markup.
    Console(markup=False, highlight=False).print(table)


def _format(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


_LOSS: _Row = ("loss on the text", "loss", lambda value: _format(value, ".4f"))
_MEASURES: tuple[_Row, ...] = (
    ("density", "density", lambda value: _format(value, ".3f")),
    ("kept_fraction", "kept_fraction", format_kept_fraction),
    ("KV bytes", "kv_bytes", lambda value: _format(value, ",")),
    ("prefill, s", "prefill_seconds", lambda value: _format(value, ".2f")),
    ("decode, tokens/s", "decode_tokens_per_second", lambda value: _format(value, ".1f")),
)
