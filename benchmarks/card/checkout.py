"""Makes invact importable from a plain checkout, where nothing is installed."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make_importable() -> None:
    """`kernels/` and `patchers/` at the root become `invact.kernels` and `invact.patchers`.

    The root itself leaves the path again: transformers asks for a top-level package `kernels`, which is not ours.
    """
    sys.path.insert(0, str(ROOT))
    import invact

    sys.path.remove(str(ROOT))
    if str(ROOT) not in invact.__path__:
        invact.__path__.append(str(ROOT))
