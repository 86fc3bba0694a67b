"""The parameters of a curve found from values of f, for every family; None where it can be no such curve."""

from __future__ import annotations

import math
from collections.abc import Callable

from .monotone import Monotone
from .monotone_families import SMOOTH_THRESHOLD, celu, elu, hardtanh, leaky_relu, softplus

Values = Callable[[float], float]
"""f at one point, in float64."""


FAR = 1e6
"""Where a curve that levels out has done so."""


def guessed_elu(f: Values) -> Monotone | None:
    return elu(-f(-FAR)) if f(-FAR) < 0 else None


def guessed_celu(f: Values) -> Monotone | None:
    return celu(-f(-FAR)) if f(-FAR) < 0 else None


def guessed_leaky_relu(f: Values) -> Monotone | None:
    slope = -f(-1.0)
    return leaky_relu(slope) if slope > 0 and slope != 1 else None  # with 1 it is no activation at all


def guessed_hardtanh(f: Values) -> Monotone | None:
    low, high = f(-FAR), f(FAR)
    return hardtanh(low, high) if -FAR < low < high < FAR else None


def guessed_softplus(f: Values) -> Monotone | None:
    if not 0 < f(0.0) < math.inf:
        return None
    beta = math.log(2) / f(0.0)
    low, high = 0.0, SMOOTH_THRESHOLD / beta
    if f(math.nextafter(high, 0)) != math.nextafter(high, 0):
        return softplus(_without_rounding(beta))
    if f(1e-300) == 1e-300:
        return softplus(_without_rounding(beta), 0.0)
    while high - low > 1e-13 * high:  # where does y become x?
        middle = (low + high) / 2
        low, high = (low, middle) if f(middle) == middle else (middle, high)
    return softplus(_without_rounding(beta), _without_rounding(beta * high))


def _without_rounding(value: float) -> float:
    """0.7 rather than 0.7000000000000001, which arithmetic made of it; 1/3 stays."""
    short = float(f"{value:.10g}")
    return short if math.isclose(short, value, rel_tol=1e-12) else value
