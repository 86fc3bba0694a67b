"""Work out the derivative of every two-sided curve as polynomials of its output, and write them down.

Everything follows from the formulas in `definitions`: the minimum, the derivative and the polynomials are worked out
with 40 digits. The table printed gives the error reached, in exact arithmetic and with the polynomial worked out in
fp32.

    python -m invact.kernels.polynomials.generate            # print the errors, write the three generated files
    python -m invact.kernels.polynomials.generate --check    # print the errors, compare with what is checked in
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from . import code_writer
from .chebyshev import SHORT_TOLERANCE, TOLERANCE, Inverse, fitted
from .definitions import DEFINITIONS, EXACT
from .least_squares import TOLERANCES, quick_fit
from .pieces import Fit, Piece, QuickFit

HERE = Path(__file__).parent
COEFFICIENTS, QUICK_COEFFICIENTS = HERE / "coefficients.py", HERE / "quick_coefficients.py"
FOR_TRITON = HERE.parent / "triton" / "polynomials.py"


def main() -> int:
    parser = argparse.ArgumentParser(prog=code_writer.COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with what is checked in; write nothing")
    check = parser.parse_args().check
    fits, short_fits, table = dict(EXACT), dict(EXACT), []
    quick_fits: code_writer.QuickFits = {}
    for name in DEFINITIONS:
        fits[name], lines = fitted(name, TOLERANCE)
        short_fits[name], short_lines = fitted(name, SHORT_TOLERANCE)
        table += lines + short_lines
        curve = Inverse(name)
        quick_fits[name] = {dtype: quick_fit(curve.f, curve.slope, curve.x_min, dtype) for dtype in TOLERANCES}
        print(*lines, *short_lines, sep="\n", flush=True)
    if check:
        return differences(fits, short_fits, quick_fits)
    COEFFICIENTS.write_text(code_writer.coefficients(fits, short_fits, table))
    QUICK_COEFFICIENTS.write_text(code_writer.quick_coefficients(quick_fits))
    FOR_TRITON.write_text(code_writer.triton_polynomials(fits, short_fits, quick_fits))
    return 0


def differences(fits: dict[str, Fit], short_fits: dict[str, Fit], quick_fits: code_writer.QuickFits) -> int:
    """How many curves and files differ from what is checked in; says which and what to do."""
    from . import coefficients, quick_coefficients

    differing = []
    for ours, theirs in ((fits, coefficients.FITS), (short_fits, coefficients.SHORT_FITS)):
        differing += [name for name, fit in ours.items() if name not in theirs or not same(fit, theirs[name])]
    for name, by_dtype in quick_fits.items():
        checked_in = quick_coefficients.QUICK_FITS.get(name, {})
        if any(dtype not in checked_in or not alike(fit, checked_in[dtype]) for dtype, fit in by_dtype.items()):
            differing.append(f"the quick fit of {name}")
    differing += unlike_their_source(coefficients.FITS, coefficients.SHORT_FITS, quick_coefficients.QUICK_FITS)
    if differing:
        print(f"{', '.join(differing)}: not what is checked in. Run: {code_writer.COMMAND}", file=sys.stderr)
    return len(differing)


def unlike_their_source(
    fits: dict[str, Fit], short_fits: dict[str, Fit], quick_fits: code_writer.QuickFits
) -> list[str]:
    """The generated files that are not, letter by letter, what is written of the numbers in them."""
    start, end = code_writer.coefficients(fits, short_fits, ["|"]).split("    |\n")  # the table of errors is between
    text = COEFFICIENTS.read_text()
    expected = {
        QUICK_COEFFICIENTS: code_writer.quick_coefficients(quick_fits),
        FOR_TRITON: code_writer.triton_polynomials(fits, short_fits, quick_fits),
    }
    unlike = [] if text.startswith(start) and text.endswith(end) else [COEFFICIENTS]
    unlike += [path for path, source in expected.items() if path.read_text() != source]
    return [f"{path.parent.name}/{path.name}" for path in unlike]


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


if __name__ == "__main__":
    raise SystemExit(main())
