"""Fit the derivative of every two-sided curve as a function of its output: ``python -m invact.kernels.fit``.

Everything follows from the definitions in `DEFINITIONS`: the minimum, the derivative and the polynomials are worked
out with 40 digits. What a piece is, `pieces.Fit` says. Each polynomial is the Chebyshev expansion of its function, cut
where the error in f' falls below `TOLERANCE`; the table printed gives the error reached, in exact arithmetic and
with the polynomial worked out in fp32.

    python -m invact.kernels.fit            # fit, print the errors, write the coefficients and triton_polynomials.py
    python -m invact.kernels.fit --check    # fit, print the errors, compare with coefficients.py
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .pieces import Fit, Piece, QuickFit, scale_and_shift

try:
    import mpmath as mp
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "Fitting the coefficients needs mpmath, which is not installed; the coefficients themselves are checked in "
        "and need nothing. Install it with: pip install 'invact[test]'"
    ) from missing

from .quick_fit import TOLERANCES, quick_fit

mp.mp.dps = 40

Number = Any  # an mpmath number: mpmath has no types
Function = Callable[[Number], Number]
QuickFits = dict[str, dict[str, QuickFit]]  # by curve and dtype

TOLERANCE = 3e-7  # absolute error of f' for fp32 and fp64; the floor of fp32 is some 1e-6 (relative L2)
SHORT_TOLERANCE = 2e-5  # for 16-bit outputs, whose floor is 4e-4 at the least: a GPU has no time for more terms
TAIL_SHARE = 100  # where y runs out to -0, f' is also right to so many times the tolerance of itself
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
    "mish": lambda x: x * mp.tanh(mp.log1p(mp.exp(x))),
}

# The c of 1 / (s + c): a curve that falls like a Gaussian is straightest with a large one, one that falls like an
# exponential with a small one.
TAIL_OFFSETS = {"gelu": 8.0, "gelu_tanh": 4.0, "quick_gelu": 1.0, "silu": 1.0, "mish": 1.0}

# Hardswish is r^2 - 3/8 with r = (x + 3/2) / sqrt(6), so f' = 2 r / sqrt(6): one term, exact. On the left f' falls to 0
# where y does and stays there; on the right it jumps from 3/2 to 1 at y = 3, and the rounded root must not miss that.
HARDSWISH_SLOPE = 2 / math.sqrt(6)
EXACT = {
    "hardswish": Fit(
        x_min=-1.5,
        y_min=-0.375,
        y_min_low=0.0,
        tail_start=0.0,
        tail_offset=1.0,
        near=Piece(-math.sqrt(0.375), 1.0, (HARDSWISH_SLOPE,)),
        right=Piece(1.0, math.sqrt(3.375), (HARDSWISH_SLOPE,)),
        tail=None,
    )
}


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


def written(fits: dict[str, Fit]) -> str:
    """The entries of coefficients.py."""
    source = ""
    for name, fit in fits.items():
        source += f'    "{name}": Fit(\n'
        for field, value in zip(fit._fields, fit, strict=True):
            if isinstance(value, Piece):
                terms = "".join(f"                {term!r},\n" for term in value.coefficients)
                ends = f"            {value.low!r},\n            {value.high!r},\n"
                source += f"        {field}=Piece(\n{ends}            (\n{terms}            ),\n        ),\n"
            else:
                source += f"        {field}={value!r},\n"
        source += "    ),\n"
    return source


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


def alike(ours: QuickFit, theirs: QuickFit) -> bool:
    """Whether two fits agree as far as least squares do from one library to another."""
    ours_flat, theirs_flat = (np.concatenate([np.atleast_1d(value) for value in fit]) for fit in (ours, theirs))
    return len(ours_flat) == len(theirs_flat) and np.allclose(ours_flat, theirs_flat, rtol=1e-6, atol=1e-9)


GENERATED = "Written by ``python -m invact.kernels.fit``: change that, not this."

HEADER = f'''"""The fitted derivatives. {GENERATED}

The error reached, per piece; the shorter of two is for 16-bit outputs:

'''

QUICK_HEADER = f'''"""The fits of `quick_fit`. {GENERATED}"""

from .pieces import QuickFit

QUICK_FITS: dict[str, dict[str, QuickFit]] = {{
'''

TRITON_HEADER = f'''"""The polynomials of `coefficients` and `quick_coefficients`, for Triton.

{GENERATED}

Triton 3.2 can index no tuple of constants, so every one is written out.
"""

# mypy: ignore-errors
# ruff: noqa: N803, SIM114
import triton
import triton.language as tl
'''


def coefficients(fits: dict[str, Fit], short_fits: dict[str, Fit], lines: list[str]) -> str:
    """The source of coefficients.py."""
    table = "".join(f"    {line}\n" for line in lines)
    imports = '"""\n\nfrom .pieces import Fit, Piece\n\n'
    long = f"FITS: dict[str, Fit] = {{\n{written(fits)}}}\n\n"
    short = f"SHORT_FITS: dict[str, Fit] = {{\n{written(short_fits)}}}\n"
    return HEADER + table + imports + long + short


def quick_coefficients(quick_fits: QuickFits) -> str:
    """The source of quick_coefficients.py."""
    source = QUICK_HEADER
    for name, by_dtype in quick_fits.items():
        source += f'    "{name}": {{\n'
        for dtype, fit in by_dtype.items():
            source += f'        "{dtype}": QuickFit(\n'
            for field, value in zip(fit._fields, fit, strict=True):
                if isinstance(value, tuple):
                    terms = "".join(f"                {term!r},\n" for term in value)
                    source += f"            {field}=(\n{terms}            ),\n"
                else:
                    source += f"            {field}={value!r},\n"
            source += "        ),\n"
        source += "    },\n"
    return source + "}\n"


def quick_function(quick_fits: QuickFits) -> str:
    """The function of triton_polynomials.py for 16-bit outputs."""
    source = "\n\n@triton.jit\ndef quick_slope(y, below, logarithm, right, CURVE: tl.constexpr, BF16: tl.constexpr):\n"
    source += '    """f\' by `quick_fit.QuickFit`; logarithm is log2(-below), below y if that is negative."""\n'
    keyword = "if"
    for name, by_dtype in quick_fits.items():
        for dtype, fit in by_dtype.items():
            source += f'    {keyword} CURVE == "{name}"{" and BF16" if dtype == "bfloat16" else ""}:\n'
            source += f"        left = logarithm * {fit.log_scale!r} + {fit.log_shift!r}\n"
            source += f"        w = tl.where(right, y + {-fit.bottom!r}, left)\n"
            source += f"        v = tl.sqrt(tl.maximum(w, {fit.least!r}))\n"
            source += f"        u = tl.minimum(v * {fit.scale!r} + {fit.shift!r}, 1.0)\n"
            for letter, variable, terms in (("p", "u", fit.right), ("q", "v", fit.left)):
                source += f"        {letter} = tl.zeros_like(v) + {terms[-1]!r}\n"
                source += "".join(f"        {letter} = {letter} * {variable} + {term!r}\n" for term in terms[-2::-1])
            keyword = "elif"
    return source + "    return tl.where(right, p, below * q)\n"


def triton_polynomials(fits: dict[str, Fit], short_fits: dict[str, Fit], quick_fits: QuickFits) -> str:
    """The source of triton_polynomials.py: a function for each kind of piece, with a branch for each curve."""
    source = TRITON_HEADER
    for kind in ("near", "right", "tail"):
        source += f"\n\n@triton.jit\ndef {kind}(v, CURVE: tl.constexpr, SHORT: tl.constexpr):\n"
        keyword = "if"
        for name, fit in fits.items():
            for short, chosen in ((True, short_fits[name]), (False, fit)):
                piece: Piece = getattr(chosen, kind) or Piece(0.0, 1.0, (0.0,))
                condition = f'CURVE == "{name}" and SHORT' if short else f'CURVE == "{name}"'
                scale, shift = scale_and_shift(piece)
                source += f"    {keyword} {condition}:\n        u = v * {scale!r} + {shift!r}\n"
                source += f"        p = tl.zeros_like(u) + {piece.coefficients[-1]!r}\n"
                source += "".join(f"        p = p * u + {term!r}\n" for term in reversed(piece.coefficients[:-1]))
                keyword = "elif"
        source += "    return p\n"
    return source + quick_function(quick_fits)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m invact.kernels.fit", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with what is checked in; write nothing")
    check = parser.parse_args().check
    fits, short_fits, table = dict(EXACT), dict(EXACT), []
    quick_fits: QuickFits = {}
    for name in DEFINITIONS:
        fits[name], lines = fitted(name, TOLERANCE)
        short_fits[name], short_lines = fitted(name, SHORT_TOLERANCE)
        table += lines + short_lines
        curve = Inverse(name)
        quick_fits[name] = {dtype: quick_fit(curve.f, curve.slope, curve.x_min, dtype) for dtype in TOLERANCES}
        print(*lines, *short_lines, sep="\n", flush=True)
    folder = Path(__file__).parent
    if check:
        return differences(fits, short_fits, quick_fits, folder)
    (folder / "coefficients.py").write_text(coefficients(fits, short_fits, table))
    (folder / "quick_coefficients.py").write_text(quick_coefficients(quick_fits))
    (folder / "triton_polynomials.py").write_text(triton_polynomials(fits, short_fits, quick_fits))
    return 0


def differences(fits: dict[str, Fit], short_fits: dict[str, Fit], quick_fits: QuickFits, folder: Path) -> int:
    """How many files differ from what is checked in; says which and what to do."""
    from . import coefficients, quick_coefficients

    differing = []
    for ours, theirs in ((fits, coefficients.FITS), (short_fits, coefficients.SHORT_FITS)):
        differing += [name for name, fit in ours.items() if name not in theirs or not same(fit, theirs[name])]
    for name, by_dtype in quick_fits.items():
        checked_in = quick_coefficients.QUICK_FITS.get(name, {})
        if any(dtype not in checked_in or not alike(fit, checked_in[dtype]) for dtype, fit in by_dtype.items()):
            differing.append(f"the quick fit of {name}")
    source = triton_polynomials(coefficients.FITS, coefficients.SHORT_FITS, quick_coefficients.QUICK_FITS)
    if (folder / "triton_polynomials.py").read_text() != source:
        differing.append("triton_polynomials.py")
    if differing:
        print(f"{', '.join(differing)}: not what is checked in. Run: python -m invact.kernels.fit", file=sys.stderr)
    return len(differing)


if __name__ == "__main__":
    raise SystemExit(main())
