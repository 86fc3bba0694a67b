"""What a trial has come to: what each way of training keeps, takes and learns, as an object, JSON and a table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from invact.bench.machine import installed_versions
from invact.planning.by_layer import Layer
from invact.report.amounts import format_bytes
from invact.report.report import Report
from invact.report.tables import Column, print_table
from invact.trial.verdict import Yardsticks, judge
from invact.trial.way_result import Run
from invact.trial.ways import BASELINE, INVACT


@dataclass
class Trial:
    """What the ways have come to.

    Attributes:
        runs: the baseline first.
        yardsticks: what each way is judged by: the spread between seeds, and the memory.
        report: the plan that the way "invact" trained with.
        layers: what is kept by layer, before patching and after.
        interrupted: whether it was ended before the last step; what there is, is reported.
    """

    title: str
    setting: str
    runs: list[Run]
    yardsticks: Yardsticks
    report: Report
    layers: list[Layer]
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=installed_versions)

    def run(self, name: str) -> Run:
        return next(run for run in self.runs if run.name == name)

    @property
    def spread(self) -> float | None:
        """The largest difference between the baseline's losses of two seeds at the same step; None with one seed."""
        return self.yardsticks.spread

    @property
    def verdict(self) -> str:
        """What invact changed, and which way is the one to use for this workload."""
        baseline, patched = self.run(BASELINE), self.run(INVACT)
        saving = 1 - patched.activation_bytes / baseline.activation_bytes
        slower = patched.seconds_per_step / baseline.seconds_per_step
        return (
            f"invact keeps {saving:.1%} fewer bytes for backward ({format_bytes(patched.activation_bytes)} instead of "
            f"{format_bytes(baseline.activation_bytes)}) at {slower:.2f} times the time per step, and "
            f"{self._losses_in_words(patched)}. {judge(self.runs, self.yardsticks)}"
        )

    def _losses_in_words(self, run: Run) -> str:
        differs = f"its losses differ from the baseline's by at most {run.largest_difference:.2g}"
        if self.spread is None:
            return f"{differs} (train several seeds to judge that by)"
        compared = "less" if run.largest_difference <= self.spread else "MORE"
        return f"{differs}, {compared} than the {self.spread:.2g} between seeds"

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain dicts, lists, strings and numbers."""
        measure, fields = self.yardsticks, asdict(self)
        del fields["yardsticks"]
        return {
            **fields,
            "spread": measure.spread,
            "final_spread": measure.final_spread,
            "memory_bytes": measure.memory_bytes,
            "runs": [{**asdict(run), "within_spread": measure.within_spread(run)} for run in self.runs],
            "report": self.report.to_dict(),
            "verdict": self.verdict,
        }

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
        baseline, measure = self.run(BASELINE), self.yardsticks
        columns: dict[str, Callable[[Run], str]] = {
            "way": _name_in_words,
            "kept for backward": _kept_in_words,
            "of baseline": lambda run: f"{run.bytes_of_all / baseline.bytes_of_all:.1%}",
            "peak": lambda run: format_bytes(run.peak_bytes or 0),
            "peak, predicted": _predicted_in_words,
            "s/step": lambda run: f"{run.seconds_per_step:.4f}",
            "last loss": lambda run: f"{run.losses[-1]:.4f}",
            "largest difference": lambda run: f"{run.largest_difference:.2g}",
            "final loss": lambda run: f"{statistics.fmean(run.final_losses):.4f}",
            "off by": lambda run: f"{measure.final_difference(run):.2g}",
            "within spread": lambda run: "yes" if measure.within_spread(run) else "NO",
            "largest batch": lambda run: "-" if run.largest_batch is None else str(run.largest_batch),
        }
        if baseline.peak_bytes is None:
            del columns["peak"]
        if all(run.predicted_peak_bytes is None for run in self.runs):
            del columns["peak, predicted"]
        if measure.spread is None:
            del columns["within spread"]
        if measure.final_spread is None:
            del columns["final loss"], columns["off by"]
        if measure.memory_bytes is None:
            del columns["largest batch"]
        return [list(columns), *([text(run) for text in columns.values()] for run in self.runs)]


def _name_in_words(run: Run) -> str:
    return f"{run.name} (approximate)" if run.approximate else run.name


def _predicted_in_words(run: Run) -> str:
    return "-" if run.predicted_peak_bytes is None else format_bytes(run.predicted_peak_bytes)


def _kept_in_words(run: Run) -> str:
    kept = format_bytes(run.activation_bytes)
    return kept if run.processes == 1 else f"{run.processes} x {kept}"
