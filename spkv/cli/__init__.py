"""The command line, `spkv`: options in, one call, a table or JSON out.

Results go to stdout and nothing else does; progress and errors go to stderr. A user's error is one line, exit code 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from spkv.cache.pages import PoolFullError
from spkv.cli import evaluation, inspection  # noqa: F401  (their commands join the others)
from spkv.cli.commands import TRACEBACK, app

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `arguments` default to the process's own."""
    try:
        app(args=_repeat_options(sys.argv[1:] if arguments is None else arguments), prog_name="spkv")
    except (ValueError, TypeError, OSError, ModuleNotFoundError, FloatingPointError, PoolFullError) as error:
        if os.environ.get(TRACEBACK):
            raise
        typer.echo(f"spkv: error: {' '.join(str(error).split())}", err=True)
        raise SystemExit(2) from error


def _repeat_options(arguments: Sequence[str]) -> list[str]:
    """Turn `--data a b` into `--data a --data b`, so that `--data *.txt` works, which click alone would not take."""
    repeated: list[str] = []
    option = None
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("-"):
            option = argument if argument in ("--data", "--text", "--validation") else None
        elif option is not None and previous != option:
            repeated.append(option)
        repeated.append(argument)
    return repeated
