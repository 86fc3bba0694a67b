"""What a bench has measured, as an object, as JSON and as tables."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

from invact.bench.machine import installed_versions, machine, machine_in_words
from invact.bench.records import KernelTimes, StepTimes
from invact.bench.tables import print_kernels, print_steps


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@dataclass
class Bench:
    """Everything that one run has measured.

    Attributes:
        command: as it was typed.
        machine: see `invact.bench.machine.machine`.
        kernels, steps: as far as the run has come.
        left_out: who did not take part, and why.
        interrupted: whether it was ended before the last round.
        date: in UTC, ISO 8601.
    """

    command: str
    machine: dict[str, Any]
    kernels: list[KernelTimes] = field(default_factory=list)
    steps: list[StepTimes] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    interrupted: bool = False
    versions: dict[str, str] = field(default_factory=installed_versions)
    date: str = field(default_factory=_now)

    @classmethod
    def on(cls, device: torch.device, command: str) -> Bench:
        return cls(command, machine(device))

    def leave_out(self, what: str, why: object) -> None:
        reason = f"{type(why).__name__}: {why}" if isinstance(why, Exception) else str(why)
        note = f"{what}: {reason.strip().partition(chr(10))[0]}"
        if note not in self.left_out:
            self.left_out.append(note)

    def drop_unfinished(self) -> None:
        """Forgets what has not had one whole round."""
        self.kernels = [times for times in self.kernels if times.race.rounds]
        self.steps = [times for times in self.steps if times.race.rounds]

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain dicts, lists, strings and numbers; seconds and bytes."""
        return {
            "command": self.command,
            "date": self.date,
            "machine": self.machine,
            "versions": self.versions,
            "kernels": [times.to_dict() for times in self.kernels],
            "steps": [times.to_dict() for times in self.steps],
            "left_out": self.left_out,
            "interrupted": self.interrupted,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def print(self, console: Console) -> None:
        """Prints a table for every curve in every dtype and for every model's step; see `invact.bench.tables`."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        console.print(f"{self.date} · {machine_in_words(self.machine)}", style="bold", highlight=False)
        console.print(versions, style="dim", highlight=False)
        print_kernels(self.kernels, console)
        print_steps(self.steps, console)
        for note in self.left_out:
            console.print(f"Left out: {note}", highlight=False, markup=False)
