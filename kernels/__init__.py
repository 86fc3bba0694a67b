"""Curves, the coefficients of their inverses, and the kernels. Knows no module and no model."""

from .curves import CURVES, Curve
from .dispatch import backward, forward, second, storage_order

__all__ = ["CURVES", "Curve", "backward", "forward", "second", "storage_order"]
