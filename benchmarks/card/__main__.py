"""Everything that a card must show, in one command, from a plain checkout.

python benchmarks/card --output DIR [--only PART ...] [--tiny]

Every part runs in processes of its own with a time limit, writes its figures to DIR/<part>.json as it has them, and
goes on without what fails. The last thing printed is a short table. --tiny runs every branch on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from record import Record
from summary import as_text, collected

HERE = Path(__file__).resolve().parent

# In the order of their worth. By part: the module, and its items with the seconds that each may take.
PARTS: dict[str, tuple[str, dict[str, int]]] = {
    "card": ("facts", {"card": 30}),
    "tests": ("gpu_tests", {"tests": 80, "large": 30}),
    "kernels": ("kernel_times", {"alone": 40, "autograd": 40}),
    "host": ("host_times", {"gelu": 20, "bert": 45}),
    "planner": ("planned_batches", {"bert": 45, "gpt2": 45}),
    "profile": ("profiles", {"bert": 30, "mistral": 30}),
    "steps": (
        "step_times",
        {"bert": 45, "gpt2": 45, "mistral": 45, "vit": 40, "clip": 40, "convnext": 40, "lora": 40}
        | {"bert-compiled": 110, "mistral-compiled": 110},
    ),
}
ON_REQUEST = ("bert-compiled", "mistral-compiled")  # only where --items names them, and with --tiny


def main() -> None:
    arguments = _arguments()
    if arguments.collect:
        arguments.collect.write_text(json.dumps(collected(arguments.output), indent=1) + "\n")
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    work = []
    for part in ["card", *(part for part in arguments.only or PARTS if part != "card")]:
        module, items = PARTS[part]
        asked = arguments.items or [item for item in items if arguments.tiny or item not in ON_REQUEST]
        chosen = {item: limit for item, limit in items.items() if item in asked or part == "card"}
        record = Record(arguments.output / f"{part}.json")
        record.path.unlink(missing_ok=True)
        # A process for each item, so that one without memory ends none; where memory is no matter, one for all.
        groups = [list(chosen)] if arguments.tiny else [[item] for item in chosen]
        work += [
            Child(module, group, record, sum(items[i] for i in group), arguments.tiny) for group in groups if group
        ]
    start = time.perf_counter()
    for number, child in enumerate(work):
        child.start()
        for later in work[number + 1 : number + 2]:
            later.start()  # it imports what it needs while this one measures
        left = arguments.seconds - (time.perf_counter() - start)
        child.measure(left)
    Record(arguments.output / "card.json")["seconds"] = time.perf_counter() - start
    print(as_text(arguments.output))


class Child:
    """A process that measures some items of a part; see `child`."""

    def __init__(self, module: str, items: list[str], record: Record, limit: float, tiny: bool) -> None:
        self.module, self.items, self.record, self.limit, self.tiny = module, items, record, limit, tiny
        self.process: subprocess.Popen[bytes] | None = None
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process

    def start(self) -> None:
        """Lets it import; it measures nothing yet."""
        if self.process is None:
            command = [sys.executable, str(HERE / "child.py"), self.module, str(self.record.path.resolve())]
            self.process = subprocess.Popen(
                [*command, *(["--tiny"] if self.tiny else []), *self.items],
                stdin=subprocess.PIPE,
                stdout=self.said,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"} if self.tiny else None,  # a test shares its cores
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
            wrong = f"stopped after {max(0, limit):.0f} s"
        self._end()
        name = " ".join(self.items)
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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--items", nargs="+", metavar="ITEM", help="of the parts, such as bert and gpt2")
    parser.add_argument(
        "--collect",
        type=Path,
        metavar="FILE",
        help="measure nothing: put what stands in DIR into one file, such as docs/results/h200.json",
    )
    parser.add_argument("--tiny", action="store_true", help="as small as it runs, to see that it runs")
    parser.add_argument("--seconds", type=float, default=330, help="for everything together")
    return parser.parse_args()


if __name__ == "__main__":
    main()
