"""Patches a small configuration of every model class of the three libraries and holds invact to its promises.

python tests/sweep [--library transformers|timm|open_clip] [--match GLOB ...] [--minutes M] [--resume] [--table PAGE]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import time
from collections import Counter
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path

from running import Child

LIBRARIES = ("timm", "open_clip", "transformers")


def main() -> None:
    arguments = _arguments()
    done = _read(arguments.results) if arguments.resume or arguments.table_only else {}
    everything = [
        (library, name)
        for library in ([arguments.library] if arguments.library else LIBRARIES)
        for name in import_module(f"{library}_models").names()
    ]
    if not arguments.table_only:
        if not arguments.resume:
            arguments.results.write_text("")
        settled = {key for key, found in done.items() if found["status"] == "passed" or not arguments.retry}
        matching = [found for found in everything if any(fnmatchcase(found[1], glob) for glob in arguments.match)]
        _sweep([found for found in _most_different_first(matching) if ":".join(found) not in settled], done, arguments)
    if arguments.table:
        from table import as_table

        there = [done[":".join(found)] for found in everything if ":".join(found) in done]
        arguments.table.write_text(as_table(there, Counter(library for library, _ in everything)))


def _most_different_first(work: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """One class of every family before a second of any; the families in the same disorder each time.

    What a run that ends early has seen is a sample of all there is.
    """
    shuffled = random.Random(0).sample(sorted(work), len(work))
    seen: Counter[tuple[str, str]] = Counter()
    rounds: dict[tuple[str, str], int] = {}
    for library, name in shuffled:
        family = library, name.partition("/")[0]
        rounds[library, name] = seen[family]
        seen[family] += 1
    return sorted(shuffled, key=lambda found: rounds[found])  # stable


def _sweep(work: list[tuple[str, str]], done: dict[str, dict], arguments: argparse.Namespace) -> None:
    """Checks one class after another, writes each to the results and to `done`, and ends when the time is up."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    end = time.monotonic() + 60 * arguments.minutes
    with Child(arguments.timeout) as child, arguments.results.open("a") as results:
        for number, (library, name) in enumerate(work, 1):
            if time.monotonic() > end:
                break
            found = {**child.result(library, name), "commit": commit.stdout.strip()}
            done[f"{library}:{name}"] = found
            results.write(json.dumps(found) + "\n")
            results.flush()
            print(f"{number}/{len(work)} {found['seconds']:5.1f}s {library}:{name}: {_in_a_line(found)}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES)
    parser.add_argument("--match", nargs="+", default=["*"], help="globs over names such as bert/BertModel")
    parser.add_argument("--resume", action="store_true", help="leave out what the results already hold")
    parser.add_argument("--retry", action="store_true", help="with --resume: run again what did not pass")
    parser.add_argument("--results", type=Path, default=Path("sweep.jsonl"), help="one JSON line for each class")
    parser.add_argument("--table", type=Path, help="write the results as a table")
    parser.add_argument("--table-only", action="store_true", help="run nothing: the table from the results")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for each class")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no class after so long")
    return parser.parse_args()


def _read(results: Path) -> dict[str, dict]:
    lines = results.read_text().splitlines() if results.exists() else []
    return {f"{found['library']}:{found['name']}": found for found in map(json.loads, lines)}


def _in_a_line(found: dict) -> str:
    if found["status"] == "passed":
        saved = 1 - found["kept_after"] / max(found["kept_before"], 1)
        what = f"{found['inverted']} of {found['sites']} inverted, {found['derived']} derived, {saved:.1%} saved"
        return f"passed, {what}, gradients {found['gradient_error']:.0e}"
    return f"{found['status']}: {found['why']}"


if __name__ == "__main__":
    main()
