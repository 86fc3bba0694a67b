"""Part "tests": the tests marked `gpu`, with how each ended.

The one of more than 2^31 elements has a process of its own: a wrong address in it would end all that come after.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkout import ROOT
from record import Record

LARGE = "2_31"
SUBJECTS = ("", "_training", "_deriving", "_norms", "_very_large")
ON_A_CARD = tuple(f"test_on_a_card{subject}.py" for subject in SUBJECTS)
FILES = (*ON_A_CARD, "test_training_loops.py", "test_bench.py")


def measure(item: str, record: Record, tiny: bool, prepared: None) -> None:
    """Item "tests" or "large". Without a card only those that then run on the CPU."""
    files = FILES if torch.cuda.is_available() and item != "large" else ON_A_CARD
    options = ["-o", "addopts=", "--import-mode=importlib", "-m", "gpu", "-p", "no:cacheprovider", "-q", "--no-header"]
    options += ["--continue-on-collection-errors", "-p", "no:xdist", "--rootdir", str(ROOT), "--tb=short"]
    chosen = LARGE if item == "large" else f"not {LARGE}"
    if tiny:
        chosen += " and not compiled and (not every_16_bit or silu) and not float16"
    paths = [str(ROOT / "tests" / file) for file in files]
    code = pytest.main([*options, "-k", chosen, *paths], plugins=[_Outcomes(record, item)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r}: nothing was tested, or not all.")


class _Outcomes:
    """Writes down how every test ended, as it ends."""

    def __init__(self, record: Record, item: str) -> None:
        self.record, self.item = record, item
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: dict[str, str] = {}
        self.figures: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not (report.failed or report.skipped):
            return
        name = report.nodeid.rpartition("::")[2]
        self.counts[report.outcome] += 1
        self.seconds[name] = report.duration
        self.figures |= {f"{name}: {key}": value for key, value in report.user_properties}
        if report.failed:
            self.failures[name] = "\n".join(report.longreprtext.strip().splitlines()[-12:])
        self._write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failures[report.nodeid] = "\n".join(report.longreprtext.strip().splitlines()[-12:])
            self._write()

    def _write(self) -> None:
        slowest = sorted(self.seconds.items(), key=lambda pair: -pair[1])[:10]
        self.record[self.item] = {
            **self.counts,
            "failures": self.failures,
            "figures": self.figures,
            "slowest": dict(slowest),
        }
