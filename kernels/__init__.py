"""Curves, the coefficients of their inverses, and the kernels. Knows no module and no model."""

from .catalogue import CURVES, FIXED_CURVES, GUESSES
from .curve import Curve, check_side_bits
from .dispatch import backward, forward, second, storage_order

__all__ = [
    "CURVES",
    "FIXED_CURVES",
    "GUESSES",
    "Curve",
    "backward",
    "check_side_bits",
    "forward",
    "second",
    "storage_order",
]
