"""Fit the derivative of every two-sided curve as a function of its output: ``python -m invact.kernels.fit``.

Everything follows from the definitions in `DEFINITIONS`: the minimum, the derivative and the polynomials are worked
out with 80 digits. What a piece is, `pieces.Fit` says. Each polynomial is the Chebyshev expansion of its function, cut
where the error in f' falls below `TOLERANCE`; the table printed gives the error reached, in exact arithmetic and
with the polynomial worked out in fp32.

    python -m invact.kernels.fit            # fit, print the errors, write coefficients.py
    python -m invact.kernels.fit --check    # fit, print the errors, compare with coefficients.py

"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .pieces import Fit, Piece

try:
    import mpmath as mp
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "Fitting the coefficients needs mpmath, which is not installed; the coefficients themselves are checked in "
        "and need nothing. Install it with: pip install 'invact[test]'"
    ) from missing

mp.mp.dps = 80

Number = Any  # an mpmath number: mpmath has no types
Function = Callable[[Number], Number]

TOLERANCE = 3e-7  # absolute error of f'; the floor of fp32 is some 1e-6 (relative L2)
TAIL_TOLERANCE = 1e-5  # relative error of f' where y runs out to -0
NEAR_END = 1.0  # r where `near` hands over to `right`
TAIL_END = mp.mpf("10.2")  # s of the smallest denormal fp32 number
TERMS = 48  # of the Chebyshev expansions, before they are cut
SAMPLES = 400  # points between which the error is looked for, per piece

DEFINITIONS: dict[str, Function] = {
    "gelu": lambda x: x * mp.erfc(-x / mp.sqrt(2)) / 2,
    # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)), and the right-hand side keeps its digits on the far left
    "gelu_tanh": lambda x: x / (1 + mp.exp(-2 * mp.sqrt(2 / mp.pi) * (x + mp.mpf("0.044715") * x**3))),
    "quick_gelu": lambda x: x / (1 + mp.exp(-mp.mpf("1.702") * x)),
    "silu": lambda x: x / (1 + mp.exp(-x)),
    "mish": lambda x: x * mp.tanh(mp.log(1 + mp.exp(x))),
}

# The c of 1 / (s + c): a curve that falls like a Gaussian is straightest with a large one, one that falls like an
# exponential with a small one.
TAIL_OFFSETS = {"gelu": 8.0, "gelu_tanh": 4.0, "quick_gelu": 1.0, "silu": 1.0, "mish": 1.0}


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

    def saturation(self) -> Number:
        """The x beyond which f' is 1 to within a third of the tolerance."""
        return bisect(lambda x: -abs(self.slope(x) - 1), mp.mpf(4), mp.mpf(40), -mp.mpf(TOLERANCE) / 3)


def bisect(rising: Function, low: Number, high: Number, target: Number) -> Number:
    """The x between low and high where the rising function reaches the target."""
    for _ in range(200):
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
    u = v * kind(piece.scale) + kind(piece.shift)
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


def fitted(name: str) -> tuple[Fit, list[str]]:
    """The fit of one curve, and a line per piece that tells the error reached."""
    curve = Inverse(name)
    split = bisect(lambda x: -curve.f(x), mp.mpf(-20), curve.x_min, -curve.y_min / 2)
    handover = bisect(curve.root, curve.x_min, mp.mpf(10), mp.mpf(NEAR_END))
    end = curve.saturation()
    start = bisect(curve.tail_variable, mp.mpf(-130), split, 1 / (TAIL_END + curve.offset))

    def piece(label: str, rising: Function, value: Function, factor: Function, left: Number, right: Number) -> Piece:
        samples = Samples(rising, factor, curve.slope, left, right)

        def good(candidate: Piece) -> bool:
            error = samples.error(candidate)
            relative = label != "tail" or bool((error <= TAIL_TOLERANCE * np.abs(samples.slope)).all())
            return bool(error.max() <= TOLERANCE) and relative

        found = shortest(
            chebyshev_expansion(rising, value, left, right), float(rising(left)), float(rising(right)), good
        )
        lines.append(
            f"{name:10}  {label:5}  x in [{float(left):8.3f}, {float(right):7.3f}]  {len(found.coefficients):2} terms"
            f"  error {samples.error(found).max():.1e}  in fp32 {samples.error(found, np.float32).max():.1e}"
        )
        return found

    lines: list[str] = []
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


def written(name: str, fit: Fit, lines: list[str]) -> str:
    """One curve's entry in coefficients.py."""
    comment = "".join(f"    # {line}\n" for line in lines)
    fields = ""
    for field, value in zip(fit._fields, fit, strict=True):
        if isinstance(value, Piece):
            terms = "".join(f"                {term!r},\n" for term in value.coefficients)
            ends = f"            {value.low!r},\n            {value.high!r},\n"
            value_text = f"Piece(\n{ends}            (\n{terms}            ),\n        )"
        else:
            value_text = repr(value)
        fields += f"        {field}={value_text},\n"
    return f'{comment}    "{name}": Fit(\n{fields}    ),\n'


def numbers(fit: Fit) -> list[float]:
    """Every number of a fit, in order."""
    flat: list[float] = []
    for value in fit:
        if isinstance(value, Piece):
            flat += [value.low, value.high, *value.coefficients]
        elif value is not None:
            flat.append(value)
    return flat


def same(ours: Fit, theirs: Fit) -> bool:
    """Whether two fits agree up to the last bits, which may depend on the version of mpmath."""
    ours_flat, theirs_flat = numbers(ours), numbers(theirs)
    return len(ours_flat) == len(theirs_flat) and np.allclose(ours_flat, theirs_flat, rtol=1e-13, atol=1e-30)


HEADER = '''"""The fitted derivatives. Written by ``python -m invact.kernels.fit``: change that, not this."""

from .pieces import Fit, Piece

FITS: dict[str, Fit] = {
'''


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m invact.kernels.fit", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with what is checked in; write nothing")
    check = parser.parse_args().check
    entries, differing = [], []
    for name in DEFINITIONS:
        fit, lines = fitted(name)
        print(*lines, sep="\n", flush=True)
        entries.append(written(name, fit, lines))
        if check:
            from .coefficients import FITS

            if name not in FITS or not same(fit, FITS[name]):
                differing.append(name)
    if not check:
        Path(__file__).with_name("coefficients.py").write_text(HEADER + "".join(entries) + "}\n")
    if differing:
        print(f"coefficients.py differs for {', '.join(differing)}; run: python -m invact.kernels.fit", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
