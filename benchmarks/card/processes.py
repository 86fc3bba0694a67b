"""Processes that measure, each with a time limit: started early, to build and plan, and told to begin in their turn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from record import Record

HERE = Path(__file__).resolve().parent


class Child:
    """A process that measures some items of a part; see `child`."""

    def __init__(
        self, module: str, items: list[str], record: Record, limit: float, tiny: bool, environment: dict[str, str]
    ) -> None:
        self.module, self.items, self.record, self.limit, self.tiny = module, items, record, limit, tiny
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process

    def start(self) -> None:
        """Lets it import, build and plan; it measures nothing yet."""
        if self.process is None:
            command = [sys.executable, str(HERE / "child.py"), self.module, str(self.record.path.resolve())]
            self.process = subprocess.Popen(
                [*command, *(["--tiny"] if self.tiny else []), *self.items],
                stdin=subprocess.PIPE,
                stdout=self.said,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,  # the compiler's workers end with it
            )

    def measure(self, seconds_left: float) -> None:
        """Gives the word and waits; what goes wrong is put on record."""
        assert self.process is not None
        start = time.perf_counter()
        limit = min(self.limit, seconds_left)
        try:
            if limit <= 0:
                raise subprocess.TimeoutExpired("", 0)
            self.process.communicate(b"\n", timeout=limit)
            wrong = f"ended with {self.process.returncode}" if self.process.returncode else ""
        except subprocess.TimeoutExpired:
            wrong = f"stopped after {limit:.0f} s" if limit > 0 else "not begun, there was no time left"
        self._end()
        name = " ".join(self.items)
        self.record.leave_out(f"error {name}")
        if wrong:
            self.record[f"error {name}"] = f"{wrong}\n{self._tail()}".rstrip()
        print(f"{self.module} {name}: {time.perf_counter() - start:.1f} s {wrong}", flush=True)

    def _end(self) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):  # it has ended, and its workers too
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _tail(self) -> str:
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return "\n".join(line[:300] for line in lines[-12:])
