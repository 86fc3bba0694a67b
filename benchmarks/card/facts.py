"""Part "card": which card, driver and versions the figures are of, and the date."""

from __future__ import annotations

import datetime
import importlib.metadata
import subprocess
from contextlib import suppress

import torch
from record import Record

import invact
from invact.bench.machine import installed_versions, machine


def measure(item: str, record: Record, tiny: bool, prepared: None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record[item] = {
        "machine": machine(device),
        "driver": _driver(),
        "versions": {"invact": invact.__version__} | installed_versions() | _versions_besides(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "tiny": tiny,
    }


def _versions_besides() -> dict[str, str]:
    found = {}
    for package in ("peft", "liger_kernel"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
