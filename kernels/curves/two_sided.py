"""The curves that fall to one minimum and rise again: y and a bit that tells the side of the minimum give f'.

A new one is one entry here, and one in `polynomials.definitions`, from which
``python -m invact.kernels.polynomials.generate`` makes its coefficients; CONTRIBUTING.md names what else it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..polynomials.coefficients import FITS, SHORT_FITS
from ..polynomials.pieces import Fit
from ..rounding import rounded_up, widened
from . import two_sided_slopes
from .curve import Curve


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TwoSided(Curve):
    """A curve with one minimum; an element's bit is 1 where x was on the right of it.

    Attributes:
        fit: f' of (y, side), and where the minimum is.
        short_fit: the same with fewer terms, for outputs of 16 bits.
    """

    fit: Fit
    short_fit: Fit
    has_side: bool = True

    def sides(self, x: Tensor) -> Tensor:
        # Comparing with x_min itself would round it.
        return ~(x < rounded_up(self.x_min, x.dtype))

    def slope(self, y: Tensor, side: Tensor | None, rounded_to: torch.dtype) -> Tensor:
        assert side is not None
        values = two_sided_slopes.slope(y, side, self.fit_for(rounded_to), rounded_to)
        if self.fit.tail is None:
            return values
        # NaN where y is, and 1 where a large x has made y infinite
        return torch.where(y == torch.inf, 1.0, values + (y - y))

    def slope_rise(self, y: Tensor, side: Tensor | None, rounded_to: torch.dtype) -> Tensor:
        assert side is not None
        return two_sided_slopes.slope_rise(y, side, self.fit_for(rounded_to), rounded_to)

    def fit_for(self, dtype: torch.dtype) -> Fit:
        """The fit for an output of this dtype."""
        return self.short_fit if dtype.itemsize == 2 else self.fit

    @property
    def x_min(self) -> float:
        """Where the minimum is. An x is on the right side unless it is less than this, NaN included."""
        return self.fit.x_min

    @property
    def y_min(self) -> float:
        """The minimum, to double precision; `fit.y_min_low` holds the digits that follow."""
        return self.fit.y_min


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """In fp32 for 16-bit types, rounded once: stock PyTorch has no such operator to agree with."""
    wide = widened(x)
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def gelu_derivative(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(x * -math.sqrt(0.5)) + x * density


def sigmoid_product_derivative(x: Tensor, z: Tensor, dz: Tensor | float) -> Tensor:
    """The derivative of ``x * sigmoid(z(x))``."""
    return torch.sigmoid(z) * (1 + x * dz * torch.sigmoid(-z))


def gelu_tanh_derivative(x: Tensor) -> Tensor:
    scale = 2 * math.sqrt(2 / math.pi)  # (1 + tanh(z / 2)) / 2 is sigmoid(z)
    bounded = x.clamp(-1e3, 1e3)  # f' is 0 or 1 out there, and the cube must not overflow
    square = bounded * bounded
    return sigmoid_product_derivative(
        bounded, scale * bounded * (1 + 0.044715 * square), scale * (1 + 3 * 0.044715 * square)
    )


def quick_gelu_derivative(x: Tensor) -> Tensor:
    return sigmoid_product_derivative(x, 1.702 * x, 1.702)


def silu_derivative(x: Tensor) -> Tensor:
    return sigmoid_product_derivative(x, x, 1.0)


def mish_derivative(x: Tensor) -> Tensor:
    power = torch.exp(x.clamp(max=80.0))  # tanh(softplus(x)) is n / (n + 2) with n = exp(x) (exp(x) + 2)
    n = power * (power + 2)
    return n / (n + 2) + 4 * (n + 1) / (n + 2) * (x * torch.sigmoid(x) / (n + 2))


def hardswish_derivative(x: Tensor) -> Tensor:
    inside = (2 * x + 3) / 6
    return torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, inside))


def _fitted(*, name: str, f: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor]) -> TwoSided:
    """The curve with the fits that `coefficients` has for it."""
    return TwoSided(name=name, f=f, derivative=derivative, fit=FITS[name], short_fit=SHORT_FITS[name])


TWO_SIDED = (
    _fitted(
        # Hendrycks & Gimpel, Gaussian Error Linear Units, arXiv 1606.08415: x Phi(x)
        name="gelu",
        f=F.gelu,
        derivative=gelu_derivative,
    ),
    _fitted(
        # arXiv 1606.08415: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
        name="gelu_tanh",
        f=gelu_tanh,
        derivative=gelu_tanh_derivative,
    ),
    _fitted(
        # arXiv 1606.08415, as OpenAI's CLIP (2021) uses it: x sigmoid(1.702 x)
        name="quick_gelu",
        f=quick_gelu,
        derivative=quick_gelu_derivative,
    ),
    _fitted(
        # arXiv 1606.08415; Elfwing et al., arXiv 1702.03118; Swish, arXiv 1710.05941: x sigmoid(x)
        name="silu",
        f=F.silu,
        derivative=silu_derivative,
    ),
    _fitted(
        # Misra, Mish, arXiv 1908.08681: x tanh(softplus(x))
        name="mish",
        f=F.mish,
        derivative=mish_derivative,
    ),
    _fitted(
        # Howard et al., Searching for MobileNetV3, arXiv 1905.02244: x relu6(x + 3) / 6
        name="hardswish",
        f=F.hardswish,
        derivative=hardswish_derivative,
    ),
)
