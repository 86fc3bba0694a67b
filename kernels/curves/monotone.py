"""The curves that never turn: y alone tells f', so that no bit is kept.

Where f levels out, y is rounded more coarsely than x was, and f' is what y still tells: an ELU at ``x = -8`` in bf16
is -1, and its f' comes out as 0 and not as 0.0003. Each curve says where that is. Everywhere else f' is within two
units in the last place of stock autograd's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rounding import rounded
from .curve import Curve


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Monotone(Curve):
    """A curve whose f' is a function of y.

    Limits: f is pointwise, draws no random number, and takes any floating dtype, shape and strides without changing x.
    In a dtype of few digits f' is what that dtype's y still tells, nothing better: where f levels out it is as exact as
    y absolutely, and not relatively, and where f' jumps at a y that many x share, it is the caller who says so, with
    `needs_exact_output`. `register` looks at float64 alone, and at some numbers, not all.

    Attributes:
        rise: the derivative of f' by y.
        of_output: f' from y, which may be infinite or NaN; None where a subclass has its own `slope`.
        constants: the parameters as `triton.monotone.monotone_slope` takes them.
        beyond_jump: whether y is x itself, if y falls back where it becomes so: then one bit tells which it was.
    """

    rise: Callable[[Tensor], Tensor]
    of_output: Callable[[Tensor], Tensor] | None = None
    constants: tuple[float, ...] = ()
    beyond_jump: Callable[[Tensor], Tensor] | None = None

    def sides(self, x: Tensor) -> Tensor:
        assert self.beyond_jump is not None
        return self.beyond_jump(x)

    def slope(self, y: Tensor, side: Tensor | None, rounded_to: torch.dtype) -> Tensor:
        assert self.of_output is not None
        values = self.of_output(y)
        return values if side is None else torch.where(side, 1.0, values)

    def slope_rise(self, y: Tensor, side: Tensor | None, rounded_to: torch.dtype) -> Tensor:
        values = self.rise(y)
        return values if side is None else torch.where(side, 0.0, values)

    def constants_for(self, dtype: torch.dtype) -> tuple[float, ...]:
        """`constants` for an output of this dtype."""
        return self.constants


class Clamped(Monotone):
    """A curve whose f' is 1 between two outputs: `constants`, each rounded as the outputs are."""

    def slope(self, y: Tensor, side: Tensor | None, rounded_to: torch.dtype) -> Tensor:
        return _one_between(y, *self.constants_for(rounded_to))

    def constants_for(self, dtype: torch.dtype) -> tuple[float, ...]:
        return tuple(rounded(value, dtype) for value in self.constants)


class ExponentialLinear(Monotone):
    """``scale x`` for x > 0, else ``bottom expm1(input_scale x)``; `constants` are bottom, input_scale and scale.

    f' is ``input_scale (y + bottom)`` where y <= 0, and 0 where y is -bottom as far as its dtype can tell.
    """

    def slope(self, y: Tensor, side: Tensor | None, rounded_to: torch.dtype) -> Tensor:
        bottom, input_scale, scale, lowest = self.constants_for(rounded_to)
        falling = torch.where(y <= lowest, 0.0, (y + bottom) * input_scale)
        return torch.where(y <= 0, falling, scale)

    def constants_for(self, dtype: torch.dtype) -> tuple[float, ...]:
        return (*self.constants, rounded(-self.constants[0], dtype))


def exponential_linear(
    name: str,
    f: Callable[[Tensor], Tensor],
    *,
    alpha: float,
    scale: float = 1.0,
    input_scale: float = 1.0,
    parameters: tuple[tuple[str, float], ...] = (),
) -> ExponentialLinear:
    bottom = scale * alpha

    def derivative(x: Tensor) -> Tensor:
        return torch.where(x <= 0, bottom * input_scale * torch.exp(input_scale * x.clamp(max=0)), scale)

    def rise(y: Tensor) -> Tensor:
        return torch.where(y <= 0, input_scale, torch.zeros_like(y))

    return ExponentialLinear(
        name=name,
        f=f,
        derivative=derivative,
        rise=rise,
        constants=(bottom, input_scale, scale),
        parameters=parameters,
    )


def _one_between(values: Tensor, low: float, high: float) -> Tensor:
    return torch.where((values <= low) | (values >= high), 0.0, torch.ones_like(values))


def clamped(name: str, low: float, high: float, parameters: tuple[tuple[str, float], ...] = ()) -> Clamped:
    return Clamped(
        # Collobert, Large Scale Machine Learning, 2004; ReLU6: Krizhevsky, 2010
        name=name,
        f=lambda x: F.hardtanh(x, low, high),
        derivative=lambda x: _one_between(x, low, high),
        rise=torch.zeros_like,
        constants=(low, high),
        parameters=parameters,
        needs_exact_output=True,
    )
