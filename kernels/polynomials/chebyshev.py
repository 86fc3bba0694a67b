"""Three polynomials for f' of one curve, each the Chebyshev expansion of its function, cut at a tolerance.

What the pieces are, `pieces.Fit` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .definitions import DEFINITIONS, TAIL_OFFSETS
from .forty_digits import Function, Number, mp
from .pieces import Fit, Piece, scale_and_shift

TOLERANCE = 3e-7  # absolute error of f' for fp32 and fp64; the floor of fp32 is some 1e-6 (relative L2)
SHORT_TOLERANCE = 2e-5  # for 16-bit outputs, whose floor is 4e-4 at the least: a GPU has no time for more terms
TAIL_SHARE = 100  # where y runs out to -0, f' is also right to so many times the tolerance of itself
NEAR_END = 1.0  # r where `near` hands over to `right`
TAIL_END = mp.mpf("10.2")  # s of the smallest denormal fp32 number
TERMS = 48  # of the Chebyshev expansions, before they are cut
SAMPLES = 400  # points between which the error is looked for, per piece


class Inverse:
    """One curve seen from its output."""

    def __init__(self, name: str) -> None:
        self.f = DEFINITIONS[name]
        self.x_min = mp.findroot(self.slope, -1)
        self.y_min = self.f(self.x_min)
        self.offset = mp.mpf(TAIL_OFFSETS[name])

    def slope(self, x: Number) -> Number:
        return mp.diff(self.f, x)

    def root(self, x: Number) -> Number:
        """r: the square root of the height above the minimum, negative on the left."""
        return mp.sign(x - self.x_min) * mp.sqrt(abs(self.f(x) - self.y_min))

    def tail_variable(self, x: Number) -> Number:
        """``1 / (s + c)``, which rises from left to right."""
        return 1 / (mp.sqrt(mp.log(self.y_min / self.f(x))) + self.offset)

    def slope_over_root(self, x: Number) -> Number:
        return self.slope(x) / self.root(x)

    def slope_over_output(self, x: Number) -> Number:
        return self.slope(x) / self.f(x)

    def saturation(self, tolerance: float) -> Number:
        """The x beyond which f' is 1 to within a third of the tolerance."""
        return bisect(lambda x: -abs(self.slope(x) - 1), mp.mpf(3), mp.mpf(40), -mp.mpf(tolerance) / 3)


def bisect(rising: Function, low: Number, high: Number, target: Number) -> Number:
    """The x between low and high where the rising function reaches the target."""
    for _ in range(130):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return (low + high) / 2


def chebyshev_expansion(rising: Function, value: Function, left: Number, right: Number) -> list[Number]:
    """The Chebyshev coefficients of `value` as a function of the `rising` variable, for x between left and right."""
    low, high = rising(left), rising(right)
    angles = [mp.pi * (2 * i + 1) / (2 * TERMS) for i in range(TERMS)]
    nodes = [(low + high) / 2 + mp.cos(angle) * (high - low) / 2 for angle in angles]
    values = [value(bisect(rising, left, right, node)) for node in nodes]
    sums = [mp.fsum(v * mp.cos(k * a) for v, a in zip(values, angles, strict=True)) for k in range(TERMS)]
    return [sums[0] / TERMS] + [2 * total / TERMS for total in sums[1:]]


def powers(expansion: list[Number]) -> tuple[float, ...]:
    """The same polynomial in powers of u, the constant term first."""
    total = [mp.mpf(0)] * len(expansion)
    previous, current = [mp.mpf(1)], [mp.mpf(0), mp.mpf(1)]
    for coefficient in expansion:
        for k, part in enumerate(previous):
            total[k] += coefficient * part
        following = [mp.mpf(0)] + [2 * part for part in current]
        for k, part in enumerate(previous):
            following[k] -= part
        previous, current = current, following
    return tuple(float(coefficient) for coefficient in total)


def evaluate(piece: Piece, v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The polynomial by Horner's rule, in the precision of v."""
    kind = v.dtype.type
    scale, shift = scale_and_shift(piece)
    u = v * kind(scale) + kind(shift)
    total: np.ndarray[Any, Any] = np.zeros_like(u)
    for coefficient in reversed(piece.coefficients):
        total = total * u + kind(coefficient)
    return total


class Samples:
    """Points of one piece: variable, factor and true slope, to judge a polynomial by."""

    def __init__(self, rising: Function, factor: Function, slope: Function, left: Number, right: Number) -> None:
        xs = [left + (right - left) * i / SAMPLES for i in range(SAMPLES + 1)]
        self.variable = np.array([float(rising(x)) for x in xs])
        self.factor = np.array([float(factor(x)) for x in xs])
        self.slope = np.array([float(slope(x)) for x in xs])

    def error(self, piece: Piece, dtype: type = np.float64) -> np.ndarray[Any, Any]:
        values = self.factor.astype(dtype) * evaluate(piece, self.variable.astype(dtype))
        differences: np.ndarray[Any, Any] = np.abs(values.astype(np.float64) - self.slope)
        return differences


def shortest(expansion: list[Number], low: float, high: float, good: Callable[[Piece], bool]) -> Piece:
    """The piece with the fewest terms that is good enough."""
    for terms in range(4, TERMS):
        piece = Piece(low, high, powers(expansion[:terms]))
        if good(piece):
            return piece
    raise ArithmeticError(f"No polynomial of fewer than {TERMS} terms reaches the tolerance; split the piece.")


def fitted(name: str, tolerance: float) -> tuple[Fit, list[str]]:
    """The fit of one curve, and a line per piece that tells the error reached."""
    curve = Inverse(name)
    split = bisect(lambda x: -curve.f(x), mp.mpf(-20), curve.x_min, -curve.y_min / 2)
    handover = bisect(curve.root, curve.x_min, mp.mpf(10), mp.mpf(NEAR_END))
    end = curve.saturation(tolerance)
    start = bisect(curve.tail_variable, mp.mpf(-130), split, 1 / (TAIL_END + curve.offset))
    lines: list[str] = []

    def piece(label: str, rising: Function, value: Function, factor: Function, left: Number, right: Number) -> Piece:
        samples = Samples(rising, factor, curve.slope, left, right)

        def good(candidate: Piece) -> bool:
            error = samples.error(candidate)
            relative = tolerance * TAIL_SHARE * np.abs(samples.slope)
            return bool(error.max() <= tolerance and (label != "tail" or (error <= relative).all()))

        expansion = chebyshev_expansion(rising, value, left, right)
        found = shortest(expansion, float(rising(left)), float(rising(right)), good)
        exact, fp32 = (samples.error(found, dtype).max() for dtype in (np.float64, np.float32))
        stretch = f"x in [{float(left):8.3f}, {float(right):7.3f}]  {len(found.coefficients):2} terms"
        lines.append(f"{name:10}  {label:5}  {stretch}  error {exact:.1e}  in fp32 {fp32:.1e}")
        return found

    fit = Fit(
        x_min=float(curve.x_min),
        y_min=float(curve.y_min),
        y_min_low=float(curve.y_min - mp.mpf(float(curve.y_min))),
        tail_start=float(curve.y_min / 2),
        tail_offset=float(curve.offset),
        near=piece("near", curve.root, curve.slope_over_root, curve.root, split, handover),
        right=piece("right", curve.root, curve.slope_over_root, curve.root, handover, end),
        tail=piece("tail", curve.tail_variable, curve.slope_over_output, curve.f, start, split),
    )
    return fit, lines
