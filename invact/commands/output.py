"""What a command says: on standard output the report alone, all else on standard error."""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

import typer

if TYPE_CHECKING:
    from rich.console import Console


def command() -> str:
    """As it was typed."""
    return shlex.join(["invact", *sys.argv[1:]])


def fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(code=2)


def end_interrupted(message: str) -> NoReturn:
    """As a shell expects it after Ctrl-C."""
    typer.echo(message, err=True)
    raise typer.Exit(code=130) from None


@contextlib.contextmanager
def library_chatter_on_stderr() -> Iterator[None]:
    """Standard output is the report's alone; of what libraries log and warn, only errors are shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def progress(total: int | None) -> Iterator[Callable[[str], None]]:
    """A bar on standard error if that is a terminal; yields what to call after every step, with what it was.

    Without a total the bar only shows that it goes on.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        training = bar.add_task("preparing", total=total)
        yield lambda what: bar.update(training, advance=1, description=what)


class Printable(Protocol):
    """A report, whichever command's."""

    def print(self, console: Console) -> None: ...


def print_report(report: Printable) -> None:
    from rich.console import Console

    report.print(Console(width=None if sys.stdout.isatty() else 120))


def check_page_can_be_made(path: Path | None) -> None:
    """Before the work, not after it."""
    if path is None:
        return
    from invact.page import MissingPageLibraryError, require_page_libraries

    try:
        require_page_libraries()
    except MissingPageLibraryError as error:
        fail(str(error))
    check_writable(path, "--html")


def check_writable(path: Path | None, option: str) -> None:
    """Before the work, not after it."""
    if path is None:
        return
    there_before = path.exists()
    try:
        path.open("a").close()
        if not there_before:
            path.unlink()
    except OSError as error:
        fail(f"{path} can not be written: {error.strerror}. Pass another file to {option}.")


def write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
    typer.echo(f"Wrote {path}.", err=True)
