"""A command at a terminal of its own, interrupted as by Ctrl-C when it has said something."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from typing import NamedTuple


class Interrupted(NamedTuple):
    returncode: int
    printed: str
    """On standard output, which is no terminal."""
    seen: str
    """At the terminal, up to the interruption."""


def interrupted(*arguments: str, after: str) -> Interrupted:
    """What `python -m invact` with these arguments leaves behind if it is interrupted as soon as `after` is seen."""
    terminal, its_end = pty.openpty()
    command = [sys.executable, "-m", "invact", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=its_end, text=True)
    seen = ""
    deadline = time.monotonic() + 300
    while after not in seen and time.monotonic() < deadline:
        seen += os.read(terminal, 4096).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=300)
    return Interrupted(process.returncode, printed, seen)
