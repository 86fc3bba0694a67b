"""Measures some items of one part in a process of its own.

python benchmarks/card/child.py MODULE FILE [--tiny] ITEM...

What is to be imported, built and planned for the first item is, before the word to begin comes as a line of stdin:
another child measures in the meantime.
"""

from __future__ import annotations

import sys
import traceback
from functools import cache
from importlib import import_module
from pathlib import Path

from checkout import make_importable
from record import Record


def main() -> int:
    module_name, file, *items = sys.argv[1:]
    tiny = "--tiny" in items
    make_importable()
    module = import_module(module_name)
    prepare = getattr(module, "prepare", lambda item, tiny: None)
    failed = 0
    for item in [item for item in items if item != "--tiny"]:
        try:
            prepared = prepare(item, tiny)
            if not _may_begin():
                return 0  # who started this one has ended
            module.measure(item, Record(Path(file)), tiny, prepared)
        except Exception:
            failed += 1
            traceback.print_exc()
    return failed


@cache
def _may_begin() -> bool:
    """Waits for the word, once."""
    return bool(sys.stdin.readline())


if __name__ == "__main__":
    sys.exit(main())
