"""One self-contained HTML page about a plan or a trial: charts as inline SVG, nothing to fetch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field

from invact.bench.machine import installed_versions
from invact.fitting.step import Step
from invact.pages.charts import Chart, loss_chart, memory_chart, timeline_chart
from invact.planning.by_layer import Layer
from invact.report.amounts import format_bytes
from invact.report.report import Report
from invact.trial.result import Trial


class MissingPageLibraryError(ImportError):
    """matplotlib or Jinja is not installed."""


def require_page_libraries() -> None:
    """Raise `MissingPageLibraryError`, which names the pip command, where a library is not installed."""
    for library in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(library) is None:
            raise MissingPageLibraryError(
                f"The page is made with {library}, which is not installed. Install it with: pip install 'invact[trial]'"
            )


@dataclass(frozen=True)
class Page:
    """What stands on a page; the template is templates/page.html."""

    title: str
    setting: str
    verdict: str
    charts: list[Chart]
    report: Report
    command: str
    ways: list[list[str]] = field(default_factory=list)  # the table of a trial, its header first
    fit: str = ""
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=installed_versions)

    def html(self) -> str:
        """The page as text."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        environment = Environment(
            loader=PackageLoader("invact.pages"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["bytes"] = format_bytes
        return environment.get_template("page.html").render(page=self)


def plan_page(
    report: Report, layers: Sequence[Layer], command: str, fit: str = "", course: tuple[Step, Step] | None = None
) -> Page:
    """The page of a dry run.

    Args:
        course: a step before patching and after it, or None.
    """
    verdict = (
        f"Patched, training keeps {report.saving:.1%} fewer bytes for backward: "
        f"{format_bytes(report.bytes_after)} instead of {format_bytes(report.bytes_before)}."
    )
    charts = [memory_chart(layers)] if layers else []
    if course:
        charts.append(timeline_chart(*course, report.memory_bytes))
    return Page(report.title, report.setting, verdict, charts, report, command, fit=fit, notes=report.notes)


def trial_page(trial: Trial, command: str) -> Page:
    """The page of a trial."""
    return Page(
        trial.title,
        trial.setting,
        trial.verdict,
        [memory_chart(trial.layers), loss_chart(trial)],
        trial.report,
        command,
        ways=trial.rows(),
        notes=[*trial.report.notes, *trial.notes],
        versions=trial.versions,
    )
