"""f' read off tables, for the CPU: every operator there is a pass of its own over memory, and the formulas take many.

A 16-bit type has 65,536 values, so a table of all is exact. For fp32 a table of a two-sided curve has a straight line
between two entries. What is looked up is the height above the minimum, a little raised so that it is positive; on the
left it is divided by y, which makes it negative and stretches the tail. The leading bits of that number are the index:
the entries lie close wherever f' bends. The line is off by 1e-6 at most, where x > 1.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .curve import Curve
from .rounding import half_ulp
from .slopes import minimum_in_two
from .two_sided import TwoSided

KEPT_TABLES = 64  # a model has few curves, but a program may go through many parameters


def short_codes(x: Tensor, curve: Curve) -> Tensor:
    """`Curve.codes` for 16-bit x."""
    return code_table(curve, x.dtype).index_select(0, pattern(x))


@functools.lru_cache(KEPT_TABLES)
def code_table(curve: Curve, dtype: torch.dtype) -> Tensor:
    """The code of every bit pattern of a 16-bit x, in the order of the patterns as unsigned integers."""
    x = every_value(dtype)
    return curve.codes(x, curve.f(x))


def short_slope(y: Tensor, code: Tensor | None, curve: Curve) -> Tensor:
    """`Curve.slope` for 16-bit y, in fp32."""
    index = pattern(y)
    if code is not None:
        index.add_(code, alpha=1 << 16)
    return slope_table(curve, y.dtype).index_select(0, index)


@functools.lru_cache(KEPT_TABLES)
def slope_table(curve: Curve, dtype: torch.dtype) -> Tensor:
    """f' for every bit pattern of a 16-bit y, in the order of the patterns as unsigned integers, code after code."""
    y = every_value(dtype).double().repeat(1 << curve.side_bits)
    code = (torch.arange(len(y)) >> 16).to(torch.uint8) if curve.side_bits else None
    return curve.slope(y, code.bool() if curve.side_bits == 1 and code is not None else code, dtype).float()


def pattern(values: Tensor) -> Tensor:
    """Where in a table of all 16-bit values these stand."""
    return values.view(torch.uint16).to(torch.int32)


def every_value(dtype: torch.dtype) -> Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


SKIPPED_BITS = 14


def fp32_slope(y: Tensor, right: Tensor, curve: TwoSided) -> Tensor:
    """`Curve.slope` for fp32 y, of a curve with one bit and a tail."""
    values, steps = fp32_tables(curve)
    high, low = minimum_in_two(curve.fit, torch.float32)
    half = half_ulp(curve.y_min, torch.float32)
    raised = (y - high).sub_(low - 2 * half).clamp_(min=half)
    bits = raised.div_(torch.where(right, 1.0, y)).view(torch.int32)
    index = (bits >> SKIPPED_BITS).add_(values.numel() // 2)
    between = bits.bitwise_and_((1 << SKIPPED_BITS) - 1).float()
    return values.index_select(0, index).addcmul_(steps.index_select(0, index), between)


@functools.cache
def fp32_tables(curve: TwoSided) -> tuple[Tensor, Tensor]:
    """f' at every number that `fp32_slope` can look up, and what to add for each of the bits that it skips."""
    count = 1 << (32 - SKIPPED_BITS)
    leading = torch.arange(-count // 2, count // 2, dtype=torch.int32)
    values, following = (
        slope_at(((leading << SKIPPED_BITS) + end).view(torch.float32).double(), curve)
        for end in (0, (1 << SKIPPED_BITS) - 1)
    )
    steps = (following - values) / ((1 << SKIPPED_BITS) - 1)
    return values.float(), steps.nan_to_num(0.0, 0.0, 0.0).float()


def slope_at(looked_up: Tensor, curve: TwoSided) -> Tensor:
    """f' by what `fp32_slope` looks up."""
    right = ~looked_up.signbit()
    bottom = curve.y_min - 2 * half_ulp(curve.y_min, torch.float32)
    y = torch.where(right, bottom + looked_up, bottom / (1 - looked_up))
    return curve.slope(y, right, torch.float32)
