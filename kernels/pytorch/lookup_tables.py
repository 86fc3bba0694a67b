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

from ..curves.curve import Curve
from ..curves.two_sided import TwoSided
from ..curves.two_sided_slopes import minimum_in_two
from ..own_thread import in_own_thread
from ..rounding import half_ulp

KEPT_TABLES = 64  # a model has few curves, but a program may go through many parameters


def short_slope(y: Tensor, side: Tensor | None, curve: Curve) -> Tensor:
    """`Curve.slope` for 16-bit y, in fp32."""
    index = pattern(y)
    if side is not None:
        index.add_(side, alpha=1 << 16)
    return slope_table(curve, y.dtype).index_select(0, index)


@functools.lru_cache(KEPT_TABLES)
def slope_table(curve: Curve, dtype: torch.dtype) -> Tensor:
    """f' for every bit pattern of a 16-bit y, in the order of the patterns as unsigned integers, side after side."""

    def slopes() -> Tensor:
        y = every_value(dtype).double()
        if not curve.has_side:
            return curve.slope(y, None, dtype).float()
        y = y.repeat(2)
        return curve.slope(y, integers(0, len(y)) >= 1 << 16, dtype).float()

    return in_own_thread(slopes)


def pattern(values: Tensor) -> Tensor:
    """Where in a table of all 16-bit values these stand."""
    return values.view(torch.uint16).to(torch.int32)


def every_value(dtype: torch.dtype) -> Tensor:
    return integers(0, 1 << 16).to(torch.int16).view(dtype)


def integers(start: int, end: int) -> Tensor:
    """int32 on the CPU, whatever the default device is."""
    return torch.arange(start, end, dtype=torch.int32, device="cpu")


SKIPPED_BITS = 14
LEAST = 2.0**-126  # the smallest fp32 number that is not denormal: a program may have denormals taken as 0


MOST = 1e30  # f' is 1 from far less on, and an infinite y, which a large x may give, is no entry of a table


def fp32_slope(y: Tensor, right: Tensor, curve: TwoSided) -> Tensor:
    """`Curve.slope` for fp32 y, of a curve with a tail."""
    values, steps = fp32_tables(curve)
    raised = (y - bottom(curve)).clamp_(half_ulp(curve.y_min, torch.float32), MOST)
    # y of the left may be +0 and more, which must not look like a y of the right
    bits = raised.div_(torch.where(right, 1.0, y.clamp(max=-LEAST))).view(torch.int32)
    index = (bits >> SKIPPED_BITS).add_(values.numel() // 2)
    between = bits.bitwise_and_((1 << SKIPPED_BITS) - 1).float()
    return values.index_select(0, index).addcmul_(steps.index_select(0, index), between)


@functools.lru_cache(KEPT_TABLES)
def fp32_tables(curve: TwoSided) -> tuple[Tensor, Tensor]:
    """f' at every number that `fp32_slope` can look up, and what to add for each of the bits that it skips."""

    def values_and_steps() -> tuple[Tensor, Tensor]:
        count = 1 << (32 - SKIPPED_BITS)
        leading = integers(-count // 2, count // 2)
        values, following = (
            slope_at(((leading << SKIPPED_BITS) + end).view(torch.float32).double(), curve)
            for end in (0, (1 << SKIPPED_BITS) - 1)
        )
        steps = (following - values) / ((1 << SKIPPED_BITS) - 1)
        return values.float(), steps.nan_to_num(0.0, 0.0, 0.0).float()

    return in_own_thread(values_and_steps)


def slope_at(looked_up: Tensor, curve: TwoSided) -> Tensor:
    """f' by what `fp32_slope` looks up."""
    right = ~looked_up.signbit()
    y = torch.where(right, bottom(curve) + looked_up, bottom(curve) / (1 - looked_up))
    # what `fp32_slope` makes of 0 is 0 again: a denormal gradient would slow down all that follows
    y = torch.where(~right & (y >= -2 * LEAST), 0.0, y)
    return curve.slope(y, right, torch.float32)


def bottom(curve: TwoSided) -> float:
    """Two fp32 numbers below the one that the minimum rounds to: from the next on f' does not change any more."""
    return minimum_in_two(curve.fit, torch.float32)[0] - 4 * half_ulp(curve.y_min, torch.float32)
