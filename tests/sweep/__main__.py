"""Patches a small configuration of every model class of the three libraries and holds invact to its promises.

python tests/sweep [--library transformers|timm|open_clip] [--match GLOB ...] [--resume] [--table docs/models.md]
"""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path

from running import Child

LIBRARIES = ("timm", "open_clip", "transformers")


def main() -> None:
    arguments = _arguments()
    done = _read(arguments.results) if arguments.resume or arguments.table_only else {}
    settled = {key for key, found in done.items() if found["status"] == "passed" or not arguments.retry}
    if not arguments.table_only:
        if not arguments.resume:
            arguments.results.write_text("")
        work = [
            (library, name)
            for library in ([arguments.library] if arguments.library else LIBRARIES)
            for name in import_module(f"{library}_models").names()
            if any(fnmatchcase(name, glob) for glob in arguments.match) and f"{library}:{name}" not in settled
        ]
        with Child(arguments.timeout) as child, arguments.results.open("a") as results:
            for number, (library, name) in enumerate(work, 1):
                found = child.result(library, name)
                done[f"{library}:{name}"] = found
                results.write(json.dumps(found) + "\n")
                results.flush()
                print(
                    f"{number}/{len(work)} {found['seconds']:5.1f}s {library}:{name}: {_in_a_line(found)}", flush=True
                )
    if arguments.table:
        from table import as_table

        arguments.table.write_text(as_table(list(done.values())))


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
    return parser.parse_args()


def _read(results: Path) -> dict[str, dict]:
    lines = results.read_text().splitlines() if results.exists() else []
    return {f"{found['library']}:{found['name']}": found for found in map(json.loads, lines)}


def _in_a_line(found: dict) -> str:
    if found["status"] == "passed":
        return f"passed, {found['inverted']} of {found['sites']}, gradients {found['gradient_error']:.0e}"
    return f"{found['status']}: {found['why']}"


if __name__ == "__main__":
    main()
