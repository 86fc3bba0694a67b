"""What every activation has in common: a name, f, f', and how much besides its output is kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Curve:
    """One activation ``y = f(x)`` whose derivative can be told from y and a few bits.

    Attributes:
        name: as in `torch.nn.functional`, or as the literature calls it.
        f: the stock operator; any floating dtype, any shape.
        derivative: f' of x, accurate to the last digits of x's dtype; meant for float64.
        source: where the formula is from.
        parameters: what the curve was made with, such as ``(("alpha", 0.7),)``, where that is not the default.
        side_bits: bits kept for each element besides y: 0, 1, 2 or 4.
        needs_exact_output: f' jumps to 0 at an output that many x share, so that y must not be off by a rounding.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    source: str
    parameters: tuple[tuple[str, float], ...] = ()
    side_bits: int = 0
    needs_exact_output: bool = False

    def __str__(self) -> str:
        """The name, and the parameters that are not the default ones: "elu(alpha=0.7)"."""
        if not self.parameters:
            return self.name
        return f"{self.name}({', '.join(f'{name}={value:g}' for name, value in self.parameters)})"

    __repr__ = __str__

    def side_nbytes(self, count: int) -> int:
        """Bytes kept besides y for so many elements: `side_bits` bytes for eight of them."""
        return -(-count // 8) * self.side_bits

    def with_side_bits(self, bits: int) -> Curve:
        """The curve, told with so many bits where x was; one that needs none stays as it is."""
        check_side_bits(bits)
        return self

    def codes(self, x: Tensor, y: Tensor) -> Tensor:
        """What is told of x besides y: bool for one bit, uint8 for more. Not asked where `side_bits` is 0."""
        raise NotImplementedError

    def slope(self, y: Tensor, code: Tensor | None, rounded_to: torch.dtype) -> Tensor:
        """f' from y and the code, in y's precision, where y was rounded to a dtype that may be shorter."""
        raise NotImplementedError

    def slope_rise(self, y: Tensor, code: Tensor | None, rounded_to: torch.dtype) -> Tensor:
        """The derivative of `slope` by y."""
        raise NotImplementedError


def check_side_bits(bits: int) -> None:
    """Raises ValueError for a number of bits that there is no code for."""
    if bits not in (1, 2, 4):
        raise ValueError(
            f"side_bits={bits!r} is not possible: the codes of several elements must fill a byte. Pass 1 (the "
            "default), 2 or 4, which makes gradients in bf16 as exact as stock's."
        )
