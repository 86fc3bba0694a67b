"""Curves, the coefficients of their inverses, and the kernels. Knows no module and no model."""

from .catalogue import CURVES, FIXED_CURVES, GUESSES
from .curve import Curve
from .dispatch import backward, forward, second, storage_order

__all__ = [
    "CURVES",
    "FIXED_CURVES",
    "GUESSES",
    "Curve",
    "backward",
    "forward",
    "second",
    "storage_order",
]
