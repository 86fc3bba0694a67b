"""The command line: its commands, and the options of `invact` itself.

Only typer is imported here: torch and the model libraries wait until a command needs them.
"""

from __future__ import annotations

from typing import Annotated

import typer

from invact import __version__
from invact.commands.bench import bench
from invact.commands.patch import patch
from invact.commands.trial import trial

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train in less memory: what autograd keeps for backward, a patched model keeps once.",
)
for command in (patch, trial, bench):
    app.command()(command)


def main() -> None:
    """Run the command line; what `invact` on the shell calls."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"invact {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Of `invact` without a command."""
