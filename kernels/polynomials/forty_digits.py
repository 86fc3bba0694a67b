"""mpmath, set to 40 digits, in which everything here is worked out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Function", "Number", "mp"]

try:
    import mpmath as mp
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "Fitting the coefficients needs mpmath, which is not installed; the coefficients themselves are checked in "
        "and need nothing. Install it with: pip install 'invact[test]'"
    ) from missing

mp.mp.dps = 40

Number = Any  # an mpmath number: mpmath has no types
Function = Callable[[Number], Number]
