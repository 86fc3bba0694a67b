"""The three generated files as Python source: what a fit is, written out."""

from __future__ import annotations

from .pieces import Fit, Piece, QuickFit, scale_and_shift

QuickFits = dict[str, dict[str, QuickFit]]  # by curve and dtype

COMMAND = "python -m invact.kernels.polynomials.generate"
GENERATED = f"Written by ``{COMMAND}``: change that, not this."

HEADER = f'''"""The fitted derivatives. {GENERATED}

The error reached, per piece; the shorter of two is for 16-bit outputs:

'''

QUICK_HEADER = f'''"""The fits of `least_squares`. {GENERATED}"""

from .pieces import QuickFit

QUICK_FITS: dict[str, dict[str, QuickFit]] = {{
'''

TRITON_HEADER = f'''"""The polynomials of `polynomials.coefficients` and `polynomials.quick_coefficients`, for Triton.

{GENERATED}

Triton (seen in 3.2) can index no tuple of constants, so every one is written out.
"""

# mypy: ignore-errors
# ruff: noqa: N803, SIM114
import triton
import triton.language as tl
'''


def written(fits: dict[str, Fit]) -> str:
    """The entries of coefficients.py."""
    source = ""
    for name, fit in fits.items():
        source += f'    "{name}": Fit(\n'
        for field, value in zip(fit._fields, fit, strict=True):
            if isinstance(value, Piece):
                terms = "".join(f"\n                {term!r}," for term in value.coefficients) + "\n            "
                if len(value.coefficients) == 1:  # as ruff has it
                    terms = f"{value.coefficients[0]!r},"
                ends = f"            {value.low!r},\n            {value.high!r},\n"
                source += f"        {field}=Piece(\n{ends}            ({terms}),\n        ),\n"
            else:
                source += f"        {field}={value!r},\n"
        source += "    ),\n"
    return source


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
    """The function of kernels/triton/polynomials.py for 16-bit outputs."""
    source = "\n\n@triton.jit\ndef quick_slope(y, below, logarithm, right, CURVE: tl.constexpr, BF16: tl.constexpr):\n"
    source += '    """f\' by `pieces.QuickFit`; logarithm is log2(-below), below y if that is negative."""\n'
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
    """The source of kernels/triton/polynomials.py: a function for each kind of piece, with a branch for each curve."""
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
