"""Numbers of a dtype, worked out by Python, which torch.compile can follow; and the dtype to work in."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def widened(values: Tensor) -> Tensor:
    """In fp32 if they are of 16 bits, else as they are."""
    return values.float() if values.dtype.itemsize < 4 else values


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance between two numbers of the dtype next to `value`, denormals not considered."""
    significant_bits = 2 - math.frexp(torch.finfo(dtype).eps)[1]
    return math.ldexp(1.0, math.frexp(value)[1] - significant_bits)


def half_ulp(value: float, dtype: torch.dtype) -> float:
    """How far rounding to the dtype moves a number near `value`, at most."""
    return ulp(value, dtype) / 2


def rounded(value: float, dtype: torch.dtype) -> float:
    """The number of the dtype next to `value`, as if it had no largest number."""
    if value in (math.inf, -math.inf):  # torch.compile cannot follow math.isinf
        return value
    unit = max(ulp(value, dtype), _least_denormal(dtype))
    return round(value / unit) * unit


def rounded_up(value: float, dtype: torch.dtype) -> float:
    """The first number of the dtype that is not less than `value`."""
    if value in (math.inf, -math.inf):
        return value
    unit = max(ulp(value, dtype), _least_denormal(dtype))
    return math.ceil(value / unit) * unit


def _least_denormal(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps
