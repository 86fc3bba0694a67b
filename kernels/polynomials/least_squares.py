"""Fit f' of 16-bit outputs for kernels that have time for some thirty instructions per element.

A polynomial for each side of the minimum, where `pieces.Fit` has three: what they are, `pieces.QuickFit` says.

y rounded to 16 bits hides where x was next to the minimum. `curves.two_sided_slopes` takes the mean of the two roots
between which it must have been; here two constants, `least` and the shift in `bottom`, come near to that mean with one
root.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .forty_digits import Number, mp
from .pieces import QuickFit

Array = np.ndarray[Any, Any]

TOLERANCES = {"bfloat16": 5e-4, "float16": 1.5e-4}  # absolute, of f': 1 minus half of it still rounds to 1
SIGNIFICANT_BITS = {"bfloat16": 8, "float16": 11}
OF_ITSELF, NEGLIGIBLE = 0.01, 5e-11  # far on the left f' is also right to so much of itself, until it is nothing
SMALLEST = 2.0**-126
SAMPLES = 400
ROUNDS = 80  # of reweighting: least squares become the least largest error


def quick_fit(f: Callable[[Number], Number], slope: Callable[[Number], Number], x_min: Number, dtype: str) -> QuickFit:
    """The fit of one curve with so many significant bits."""
    tolerance, y_min = TOLERANCES[dtype], f(x_min)
    shift, least = mean_root(float(y_min), SIGNIFICANT_BITS[dtype])
    end = bisected(lambda x: abs(slope(x) - 1) < tolerance * 0.6, mp.mpf(3), mp.mpf(40))
    far = bisected(lambda x: f(x) <= -SMALLEST, mp.mpf(-120), x_min)
    turns = [(1 - mp.cos(mp.pi * i / SAMPLES)) / 2 for i in range(SAMPLES + 1)]

    xs = [x_min + (end - x_min) * t for t in turns]
    root = np.array([float(mp.sqrt(abs(f(x) - y_min))) for x in xs])
    right = np.array([float(slope(x)) for x in xs])
    high = float(root.max())
    rights = shortest(2 * root / high - 1, right, np.full_like(right, tolerance))

    xs = [x_min + (far - x_min) * t ** mp.mpf("1.5") for t in turns]
    y = np.array([float(f(x)) for x in xs])
    over_y = np.array([float(slope(x) / f(x)) for x in xs])
    v = np.sqrt(np.array([float(abs(y_min * mp.log(y_min / f(x)))) for x in xs]))
    allowed = np.minimum(tolerance, OF_ITSELF * np.abs(over_y * y) + NEGLIGIBLE) / np.abs(y)
    wide = float(v.max())
    lefts = shortest(2 * v / wide - 1, over_y, allowed)

    return QuickFit(
        bottom=float(y_min) + shift,
        log_scale=float(y_min * mp.log(2)),
        log_shift=float(-y_min * mp.log(-y_min)) - shift,
        least=least,
        scale=2 / high,
        shift=-1.0,
        right=rights,
        left=in_terms_of(lefts, 2 / wide, -1.0),
    )


def mean_root(y_min: float, significant_bits: int) -> tuple[float, float]:
    """What to take off ``y - y_min``, and what to raise it to at least, so that its root is the mean of what it may be.

    Of the y next to the minimum, each weighs as much as the stretch of x is long that rounds to it.
    """
    unit = math.ldexp(1.0, math.frexp(y_min)[1] - significant_bits)
    half = unit / 2
    heights = round(y_min / unit) * unit - y_min + unit * np.arange(12)
    upper, lower = np.sqrt(np.maximum(heights + half, half / 64)), np.sqrt(np.maximum(heights - half, 0))
    least = float(max((upper[0] / 2) ** 2, half / 64))

    def error(shift: float) -> float:
        roots = np.sqrt(np.maximum(heights - shift, least))
        return float((((upper + lower) / 2 - roots) ** 2 * (upper - lower)).sum())

    return min((half * k / 40 for k in range(41)), key=error), least


def bisected(true_above: Callable[[Number], bool], low: Number, high: Number) -> Number:
    """The x from which on it is true."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if true_above(middle) else (middle, high)
    return high


def shortest(u: Array, values: Array, allowed: Array) -> tuple[float, ...]:
    """The polynomial of u with the fewest terms that errs by no more than is allowed anywhere."""
    for degree in range(2, 20):
        terms = np.polynomial.chebyshev.chebvander(u, degree)
        weights = np.ones_like(u)
        for _ in range(ROUNDS):
            scale = np.sqrt(weights) / allowed
            expansion = np.linalg.lstsq(terms * scale[:, None], values * scale, rcond=None)[0]
            error = np.abs(terms @ expansion - values) / allowed
            if error.max() <= 1:
                return tuple(map(float, np.polynomial.chebyshev.cheb2poly(expansion)))
            weights *= error / error.max() + 1e-3
            weights /= weights.max()
    raise ArithmeticError("No polynomial of fewer than 20 terms reaches the tolerance.")


def in_terms_of(coefficients: tuple[float, ...], scale: float, shift: float) -> tuple[float, ...]:
    """The polynomial of ``v * scale + shift`` as one of v."""
    total = np.polynomial.Polynomial(coefficients)(np.polynomial.Polynomial([shift, scale]))
    return tuple(map(float, total.coef))
