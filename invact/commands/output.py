"""What a command says: on standard output the report alone, all else on standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

PIPED_WIDTH = 120
PROGRESS_EVERY = 5.0  # seconds, where standard error is no terminal


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


class Progress(Protocol):
    """How far a command has come, shown on standard error."""

    def advance(self, what: str) -> None:
        """One step was taken."""

    def say(self, sentence: str) -> None:
        """For who watches, before the next step."""


@contextlib.contextmanager
def progress(total: int | None) -> Iterator[Progress]:
    """A bar if standard error is a terminal, else a line every `PROGRESS_EVERY` seconds.

    Without a total it only shows that it goes on.
    """
    if not sys.stderr.isatty():
        yield _Lines(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar, total)


class _Bar:
    def __init__(self, bar: RichProgress, total: int | None) -> None:
        self._bar = bar
        self._task = bar.add_task("preparing", total=total)

    def advance(self, what: str) -> None:
        self._bar.update(self._task, advance=1, description=what)

    def say(self, sentence: str) -> None:
        self._bar.console.print(sentence, highlight=False, markup=False)


class _Lines:
    def __init__(self, total: int | None) -> None:
        self._total = total
        self._done = 0
        self._began = self._first = self._said = time.monotonic()

    def advance(self, what: str) -> None:
        self._done += 1
        now = time.monotonic()
        if self._done == 1:
            self._first = now  # what came before was preparation as well
        if now - self._said >= PROGRESS_EVERY:
            self._said = now
            self.say(self._in_words(what, now))

    def say(self, sentence: str) -> None:
        typer.echo(sentence, err=True)

    def _in_words(self, what: str, now: float) -> str:
        if self._total is None:
            return f"{self._done} turns in {duration_in_words(now - self._began)}: {what}"
        done = f"{self._done} of {self._total} steps"
        if self._done > 1:
            left = (now - self._first) / (self._done - 1) * (self._total - self._done)
            done += f", about {duration_in_words(left)} left"
        return f"{done}: {what}"


def duration_in_words(seconds: float) -> str:
    """As "40 seconds", "12 minutes" or "2.5 hours"."""
    if seconds < 99.5:
        return _counted(round(seconds), "second")
    if seconds < 99.5 * 60:
        return _counted(round(seconds / 60), "minute")
    return f"{seconds / 3600:.1f} hours"


def _counted(number: int, unit: str) -> str:
    return f"{number} {unit if number == 1 else unit + 's'}"


class Printable(Protocol):
    """A report, whichever command's."""

    def print(self, console: Console) -> None: ...


def print_report(report: Printable, *paragraphs: str) -> None:
    """As wide as the terminal; into a file or a pipe as wide as the variable COLUMNS says, or 120."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _piped_width())
    report.print(console)
    for paragraph in paragraphs:
        console.print(paragraph, highlight=False, markup=False)


def _piped_width() -> int:
    given = os.environ.get("COLUMNS", "")
    return int(given) if given.isdecimal() and int(given) else PIPED_WIDTH


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
