"""Every curve there is, by name; those with parameters, as they are by default."""

from __future__ import annotations

from . import monotone
from .curve import Curve
from .two_sided import TWO_SIDED

FIXED_CURVES: tuple[Curve, ...] = (*TWO_SIDED, *monotone.FIXED)
"""Those without parameters."""

GUESSES = monotone.GUESSES
"""Of those with parameters, functions that find these from values of f; None where it can be no such curve."""

CURVES: dict[str, Curve] = {
    curve.name: curve
    for curve in (
        *FIXED_CURVES,
        monotone.elu(),
        monotone.celu(),
        monotone.leaky_relu(),
        monotone.hardtanh(),
        monotone.softplus(),
    )
}
