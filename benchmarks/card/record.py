"""One JSON file for each part, written anew with every result, so that a part that is ended leaves what it had."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class Record:
    """A JSON object in a file: set a key, and it is on the disk.

    Example:
        >>> record = Record(Path("steps.json"))
        >>> record["bert"] = {"seconds": 0.1}
        >>> record.read()["bert"]["seconds"]
        0.1
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        return found

    def __setitem__(self, key: str, value: Any) -> None:
        self._write(self.read() | {key: _plain(value)})

    def leave_out(self, key: str) -> None:
        """What an earlier run said of it."""
        whole = self.read()
        if whole.pop(key, None) is not None:
            self._write(whole)

    def _write(self, whole: dict[str, Any]) -> None:
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(whole, indent=1))
        os.replace(beside, self.path)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become words; figures keep six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
