"""What every activation has in common: a name, f, f', and how much besides its output is kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Curve:
    """One activation ``y = f(x)`` whose derivative can be told from y and at most one bit.

    Attributes:
        name: as in `torch.nn.functional`, or as the literature calls it.
        f: the stock operator; any floating dtype, any shape.
        derivative: f' of x, accurate to the last digits of x's dtype; meant for float64.
        parameters: what the curve was made with, such as ``(("alpha", 0.7),)``, where that is not the default.
        has_side: whether one bit is kept for each element besides y: the side of a point that x was on.
        needs_exact_output: f' jumps to 0 at an output that many x share, so that y must not be off by a rounding.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    parameters: tuple[tuple[str, float], ...] = ()
    has_side: bool = False
    needs_exact_output: bool = False

    def __str__(self) -> str:
        """The name, and the parameters that are not the default ones: "elu(alpha=0.7)"."""
        if not self.parameters:
            return self.name
        return f"{self.name}({', '.join(f'{name}={value:g}' for name, value in self.parameters)})"

    __repr__ = __str__

    def side_nbytes(self, count: int) -> int:
        """Bytes kept besides y for so many elements: one for eight of them, or none."""
        return -(-count // 8) if self.has_side else 0

    def sides(self, x: Tensor) -> Tensor:
        """The side that each x is on, as bool. Not asked of a curve without."""
        raise NotImplementedError

    def slope(self, y: Tensor, side: Tensor | None, rounded_to: torch.dtype) -> Tensor:
        """f' from y and the sides, in y's precision, where y was rounded to a dtype that may be shorter."""
        raise NotImplementedError

    def slope_rise(self, y: Tensor, side: Tensor | None, rounded_to: torch.dtype) -> Tensor:
        """The derivative of `slope` by y."""
        raise NotImplementedError
