"""What a trial has come to: what each way of training keeps, takes and learns, as an object, JSON and a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from invact.amounts import format_bytes
from invact.layers import Layer
from invact.machine import installed_versions
from invact.report import Report
from invact.tables import Column, print_table

BASELINE = "baseline"


@dataclass
class Run:
    """One way of training.

    Attributes:
        activation_bytes: what autograd keeps between forward and backward of a real step, with the loss.
        peak_bytes: of GPU memory during a step, this way's weights and optimiser states included; None without one.
        seconds_per_step: the median; the first step, which warms up and is counted, is left out.
        losses: by step, of the first seed.
        losses_by_seed: the same for every seed.
        largest_difference: of a loss from the baseline's at the same step and seed.
        largest_batch: that fits the given memory, predicted; None if no memory was given, or under torch.compile.
    """

    name: str
    activation_bytes: int
    peak_bytes: int | None
    seconds_per_step: float
    losses: list[float]
    losses_by_seed: list[list[float]]
    largest_difference: float = 0.0
    largest_batch: int | None = None


@dataclass
class Trial:
    """What the ways have come to.

    Attributes:
        runs: the baseline first.
        spread: the largest difference between the baseline's losses of two seeds at the same step; None with one seed.
        report: the plan that the way "invact" trained with.
        layers: what is kept by layer, before patching and after.
        memory_bytes: that `Run.largest_batch` is to fit, or None.
        interrupted: whether it was ended before the last step; what there is, is reported.
    """

    title: str
    setting: str
    runs: list[Run]
    spread: float | None
    report: Report
    layers: list[Layer]
    memory_bytes: int | None = None
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=installed_versions)

    def run(self, name: str) -> Run:
        return next(run for run in self.runs if run.name == name)

    @property
    def verdict(self) -> str:
        """What invact changed, in one sentence."""
        stock, patched = self.run(BASELINE), self.run("invact")
        saving = 1 - patched.activation_bytes / stock.activation_bytes
        slower = patched.seconds_per_step / stock.seconds_per_step
        return (
            f"invact keeps {saving:.1%} fewer bytes for backward ({format_bytes(patched.activation_bytes)} instead of "
            f"{format_bytes(stock.activation_bytes)}) at {slower:.2f} times the time per step, and "
            f"{self._losses_in_words(patched)}."
        )

    def _losses_in_words(self, run: Run) -> str:
        differs = f"its losses differ from the baseline's by at most {run.largest_difference:.2g}"
        if self.spread is None:
            return f"{differs} (train several seeds to judge that by)"
        compared = "less" if run.largest_difference <= self.spread else "MORE"
        return f"{differs}, {compared} than the {self.spread:.2g} between seeds"

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain dicts, lists, strings and numbers."""
        return {**asdict(self), "report": self.report.to_dict(), "verdict": self.verdict}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def print(self, console: Console) -> None:
        """Prints a table with one row per way, then the verdict."""
        console.print(self.title, style="bold", highlight=False)
        console.print(self.setting, style="dim", highlight=False)
        header, *rows = self.rows()
        print_table(console, [Column(name, right=number > 0) for number, name in enumerate(header)], rows)
        console.print(self.verdict, highlight=False)
        for note in self.notes:
            console.print(f"Note: {note}", highlight=False, markup=False)

    def rows(self) -> list[list[str]]:
        """The table of the ways as text, its header first; columns that say nothing here are left out."""
        stock = self.run(BASELINE)
        columns: dict[str, Callable[[Run], str]] = {
            "way": lambda run: run.name,
            "kept for backward": lambda run: format_bytes(run.activation_bytes),
            "of baseline": lambda run: f"{run.activation_bytes / stock.activation_bytes:.1%}",
            "peak": lambda run: format_bytes(run.peak_bytes or 0),
            "s/step": lambda run: f"{run.seconds_per_step:.4f}",
            "last loss": lambda run: f"{run.losses[-1]:.4f}",
            "largest difference": lambda run: f"{run.largest_difference:.2g}",
            "largest batch": lambda run: "-" if run.largest_batch is None else str(run.largest_batch),
        }
        if stock.peak_bytes is None:
            del columns["peak"]
        if self.memory_bytes is None:
            del columns["largest batch"]
        return [list(columns), *([text(run) for text in columns.values()] for run in self.runs)]
