"""The command line, `spkv`: options in, one call, a table or JSON out.

Results go to stdout and nothing else does; progress and errors go to stderr. A user's error is one line, exit code 2.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import typer

from spkv.cli.commands import TRACEBACK, app

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `arguments` default to the process's own."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="spkv")
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if os.environ.get(TRACEBACK):
            raise
        typer.echo(f"spkv: error: {' '.join(str(error).split())}", err=True)
        raise SystemExit(2) from error
