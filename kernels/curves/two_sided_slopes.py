"""f' of a two-sided curve from its output, in PyTorch operations; what the pieces are, `pieces.Fit` says.

y is what a library gave, and no two give the same: a GELU that ought to be -0 comes as +0 from one processor, an error
function of few digits puts y a few units below the minimum, or above 0 on the left of it. For every finite y and either
side there is a finite f': below the minimum that of the minimum, and above 0 on the left that of 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..polynomials.pieces import Fit, Piece, scale_and_shift
from ..rounding import half_ulp, rounded


def minimum_in_two(fit: Fit, dtype: torch.dtype) -> tuple[float, float]:
    """The minimum as the sum of a number of the dtype, fp32 or fp64, and a small rest."""
    if dtype == torch.float64:
        return fit.y_min, fit.y_min_low
    high = rounded(fit.y_min, dtype)
    return high, fit.y_min - high


def saturation(fit: Fit) -> float:
    """The y from which on f' is 1. Hardswish jumps there, at 3: y tells the side of that exactly, its root does not."""
    return round(fit.right.high**2 + fit.y_min, 12)


def roots_of_stretch(y: Tensor, fit: Fit, rounded_to: torch.dtype) -> tuple[Tensor, Tensor]:
    """Between which two sqrt(y - y_min) lies for all y that round to this one.

    The upper is never zero and neither is the root of a negative number, although the stock operator's own error may
    put y below the minimum by more than rounding does.
    """
    high, low = minimum_in_two(fit, y.dtype)
    half = half_ulp(fit.y_min, rounded_to)
    height = (y - high) - low
    return (height - half).clamp(min=0).sqrt(), (height + half).clamp(min=half / 64).sqrt()


def signed_root(y: Tensor, right: Tensor, fit: Fit, rounded_to: torch.dtype) -> Tensor:
    """r of `pieces.Fit`, negative on the left.

    Rounding y hides where x was, most of all next to the minimum. x is nearly linear in r there, so the middle of what
    is possible is what makes the error of f' smallest.
    """
    lower, upper = roots_of_stretch(y, fit, rounded_to)
    root = (lower + upper) * 0.5
    return torch.where(right, root, -root)


def polynomial(piece: Piece, v: Tensor) -> Tensor:
    scale, shift = scale_and_shift(piece)
    u = v * scale + shift
    total = torch.full_like(u, piece.coefficients[-1])
    for coefficient in reversed(piece.coefficients[:-1]):
        total = total * u + coefficient
    return total


def tail_variables(y: Tensor, fit: Fit, tail: Piece) -> tuple[Tensor, Tensor]:
    """s of `pieces.Fit` and the variable of the tail's polynomial. At y = 0 they end at inf and at the piece's end."""
    s = (-torch.log(below_zero(y) / fit.y_min)).clamp(min=0).sqrt()
    return s, (1 / (s + fit.tail_offset)).clamp(min=tail.low)


def below_zero(y: Tensor) -> Tensor:
    """y of the left tail: 0 where the library's own error has put it above."""
    return y.clamp(max=0)


def slope(y: Tensor, right: Tensor, fit: Fit, rounded_to: torch.dtype) -> Tensor:
    """f' from y and the side that x was on, in y's precision, where y was rounded to a dtype that may be shorter."""
    r = signed_root(y, right, fit, rounded_to)
    outer = torch.where(y >= saturation(fit), 1.0, r * polynomial(fit.right, r))
    values = torch.where(r > fit.near.high, outer, r * polynomial(fit.near, r))
    far = 0.0 if fit.tail is None else below_zero(y) * polynomial(fit.tail, tail_variables(y, fit, fit.tail)[1])
    return torch.where(right, values, torch.where(y < fit.tail_start, values, far))


def slope_rise(y: Tensor, right: Tensor, fit: Fit, rounded_to: torch.dtype) -> Tensor:
    """The derivative of `slope` by y."""
    r = signed_root(y, right, fit, rounded_to)
    outer = torch.where(y >= saturation(fit), 0.0, product_rise(fit.right, r))
    values = torch.where(r > fit.near.high, outer, product_rise(fit.near, r))
    far: Tensor | float = 0.0
    if fit.tail is not None:
        s, w = tail_variables(y, fit, fit.tail)
        far = polynomial(fit.tail, w) + polynomial(rise(fit.tail), w) * w * w / (2 * s)
    return torch.where(right, values, torch.where(y < fit.tail_start, values, far))


def product_rise(piece: Piece, r: Tensor) -> Tensor:
    """The derivative of ``r * piece(r)`` by y, where r^2 is y and a constant."""
    return (polynomial(piece, r) + r * polynomial(rise(piece), r)) / (2 * r)


def rise(piece: Piece) -> Piece:
    """The derivative of a piece, by its own variable."""
    scale, _ = scale_and_shift(piece)
    terms = tuple(k * scale * term for k, term in enumerate(piece.coefficients))[1:]
    return Piece(piece.low, piece.high, terms or (0.0,))
