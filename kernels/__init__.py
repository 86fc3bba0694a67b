"""Curves, the coefficients of their inverses, and the kernels. Knows no module and no model.

`curves` says what each computes and how y tells f', `polynomials` works out what it takes; `triton` and `pytorch` run
it. `dispatch`, `masks`, `gated` and `codes` are the doors: each picks the kernel for the tensors that it is given.
"""

from .curves.catalogue import CURVES, FIXED_CURVES, GUESSES
from .curves.curve import Curve
from .curves.monotone import Monotone
from .curves.registering import register, unregister
from .dispatch import backward, forward, storage_order

__all__ = [
    "CURVES",
    "FIXED_CURVES",
    "GUESSES",
    "Curve",
    "Monotone",
    "backward",
    "forward",
    "register",
    "storage_order",
    "unregister",
]
