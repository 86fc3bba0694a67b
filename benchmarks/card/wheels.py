"""Pure Python packages that were brought along as wheels, for a machine that has no registry."""

from __future__ import annotations

import zipfile
from pathlib import Path


def unpacked(wheels: Path, into: Path) -> Path:
    """Unpacks every wheel of a folder and returns the folder to be put on the path.

    Raises:
        ValueError: there is none, or one is not for every machine.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise ValueError(f"There is no wheel in {wheels}. Fetch them with pip download --no-deps.")
    for wheel in found:
        if not wheel.stem.endswith("-none-any"):
            raise ValueError(f"{wheel.name} holds compiled code. Only wheels that end with none-any can be unpacked.")
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(into)
    return into
