"""What a command says: on standard output the report alone, all else on standard error."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shlex
import sys
import threading
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


@contextlib.contextmanager
def garbage_left_alone() -> Iterator[None]:
    """A dry run makes millions of short-lived objects and ends: to look for cycles among them takes a tenth of it."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Progress(Protocol):
    """How far a command has come, shown on standard error."""

    def advance(self, what: str) -> None:
        """One step was taken."""

    def expect(self, steps: int) -> None:
        """So many are left: fewer than was said where a way of training can not be had."""

    def say(self, sentence: str) -> None:
        """For who watches, before the next step."""


@contextlib.contextmanager
def progress(total: int | None) -> Iterator[Progress]:
    """A bar if standard error is a terminal, else a line every `PROGRESS_EVERY` seconds.

    Without a total it only shows that it goes on.
    """
    if not sys.stderr.isatty():
        with _Lines(total) as lines:
            yield lines
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

    def expect(self, steps: int) -> None:
        done = next(task.completed for task in self._bar.tasks if task.id == self._task)
        self._bar.update(self._task, total=done + steps)

    def say(self, sentence: str) -> None:
        self._bar.console.print(sentence, highlight=False, markup=False)


class _Lines:
    """Said by a thread of its own, since a single step of a large model may take minutes."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._done = 0
        self._what = "preparing"
        self._began = self._first = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._say_now_and_then, daemon=True)

    def __enter__(self) -> _Lines:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def advance(self, what: str) -> None:
        self._done += 1
        self._what = what
        if self._done == 1:
            self._first = time.monotonic()  # what came before was preparation as well

    def expect(self, steps: int) -> None:
        self._total = self._done + steps

    def say(self, sentence: str) -> None:
        typer.echo(sentence, err=True)

    def _say_now_and_then(self) -> None:
        while not self._ended.wait(PROGRESS_EVERY):
            self.say(self._in_words(time.monotonic()))

    def _in_words(self, now: float) -> str:
        took = f"{duration_in_words(now - self._began)} so far"
        if self._total is None:
            return f"{self._done} turns, {took}: {self._what}"
        if self._done == self._total:
            return f"All {self._total} steps, {took}: comparing"
        if self._done > 1:
            left = (now - self._first) / (self._done - 1) * (self._total - self._done)
            took += f", about {duration_in_words(left)} left"
        return f"{self._done} of {self._total} steps, {took}: {self._what}"


def duration_in_words(seconds: float) -> str:
    """As "40 seconds", "12 minutes" or "2.5 hours"."""
    from invact.report.amounts import counted

    if seconds < 99.5:
        return counted(round(seconds), "second")
    if seconds < 99.5 * 60:
        return counted(round(seconds / 60), "minute")
    return f"{seconds / 3600:.1f} hours"


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
    from invact.pages.page import MissingPageLibraryError, require_page_libraries

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
