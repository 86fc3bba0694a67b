"""Part "card": which card, driver and versions the figures are of, and the date."""

from __future__ import annotations

import datetime
import subprocess

import torch
from record import Record

from invact.machine import installed_versions, machine


def measure(item: str, record: Record, tiny: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record[item] = {
        "machine": machine(device),
        "driver": _driver(),
        "versions": installed_versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "tiny": tiny,
    }


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
