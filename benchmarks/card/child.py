"""Measures some items of one part in a process of its own.

python benchmarks/card/child.py MODULE FILE [--tiny] ITEM...

Everything is imported before the word to begin comes, as a line of stdin: another child measures in the meantime.
"""

from __future__ import annotations

import sys
import traceback
from importlib import import_module
from pathlib import Path

from checkout import make_importable
from record import Record


def main() -> int:
    module_name, file, *items = sys.argv[1:]
    tiny = "--tiny" in items
    make_importable()
    module = import_module(module_name)
    if not sys.stdin.readline():
        return 0  # who started this one has ended
    failed = 0
    for item in items:
        if item == "--tiny":
            continue
        try:
            module.measure(item, Record(Path(file)), tiny)
        except Exception:
            failed += 1
            traceback.print_exc()
    return failed


if __name__ == "__main__":
    sys.exit(main())
