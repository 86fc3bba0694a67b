"""Numbers of a dtype, worked out by Python: torch.compile can follow it."""

from __future__ import annotations

import math

import torch


def significant_bits(dtype: torch.dtype) -> int:
    return 2 - math.frexp(torch.finfo(dtype).eps)[1]


def rounded(value: float, dtype: torch.dtype) -> float:
    """The number of the dtype next to `value`, as if it had no largest number."""
    if value in (math.inf, -math.inf):  # torch.compile cannot follow math.isinf
        return value
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # a denormal
    unit = max(math.ldexp(1.0, math.frexp(value)[1] - significant_bits(dtype)), smallest)
    return round(value / unit) * unit


def rounded_up(value: float, dtype: torch.dtype) -> float:
    """The first number of the dtype that is not less than `value`."""
    fraction, exponent = math.frexp(value)
    bits = significant_bits(dtype)
    return math.ldexp(math.ceil(math.ldexp(fraction, bits)), exponent - bits)


def half_ulp(value: float, dtype: torch.dtype) -> float:
    """How far rounding to the dtype moves a number near `value`, at most."""
    return math.ldexp(0.5, math.frexp(value)[1] - significant_bits(dtype))
