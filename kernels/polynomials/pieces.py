"""The shape of a fitted derivative: three polynomials on three stretches of one curve."""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """A polynomial on ``[low, high]``, in ``u = (v - (low + high)/2) / ((high - low)/2)``.

    ``coefficients`` start with the constant term.
    """

    low: float
    high: float
    coefficients: tuple[float, ...]


def scale_and_shift(piece: Piece) -> tuple[float, float]:
    """``u = v * scale + shift``. A function: torch.compile (seen in 2.6) cannot follow a NamedTuple's properties."""
    width = piece.high - piece.low
    return 2.0 / width, -(piece.high + piece.low) / width


class Fit(NamedTuple):
    """How ``f'`` comes from ``y = f(x)`` and the side of the minimum that x was on.

    Let ``r = sqrt(y - y_min)``, negative on the left of the minimum. Then ``f'`` is a smooth function of r *across*
    the minimum, and ``f'/r`` is one too; far to the left, where y runs out to -0, ``f'/y`` is a smooth function of
    ``s = sqrt(log(y_min / y))``. So

    * ``near``:  ``f' = r * near(r)``   on the left up to ``y = tail_start``, on the right up to ``r = near.high``;
    * ``right``: ``f' = r * right(r)``  from there to ``y = right.high^2 + y_min``; from there on f' is 1;
    * ``tail``:  ``f' = y * tail(1 / (s + tail_offset))`` on the left from ``y = tail_start`` to 0; no tail: f' is 0.
    """

    x_min: float
    y_min: float
    y_min_low: float  # the minimum is y_min + y_min_low to twice double precision
    tail_start: float
    tail_offset: float
    near: Piece
    right: Piece
    tail: Piece | None


class QuickFit(NamedTuple):
    """The same for 16-bit outputs, in fewer operations: one polynomial on either side of the minimum.

    Both are in ``v = sqrt(max(w, least))``. On the right w is ``y - y_min``. On the left, where y runs out to -0, w is
    ``|y_min| log(y_min / y)``, which next to the minimum is the same.

    * right: ``w = y - bottom`` and ``f' = right(min(v * scale + shift, 1))``, which at 1 is 1;
    * left: ``w = log2(-y) * log_scale + log_shift`` and ``f' = y * left(v)``.

    Coefficients start with the constant term.
    """

    bottom: float
    log_scale: float
    log_shift: float
    least: float
    scale: float
    shift: float
    right: tuple[float, ...]
    left: tuple[float, ...]
