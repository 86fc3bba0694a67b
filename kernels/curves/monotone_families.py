"""Families of monotone curves, such as ELU: a function of the parameters gives the curve that has them.

A new one is one function here and one in `guesses`, and both go into `catalogue`; CONTRIBUTING.md names what else it
needs.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rounding import widened
from .monotone import Monotone, clamped, exponential_linear

KEPT_CURVES = 256  # of one kind: the same parameters give the same curve, and with it its tables


@functools.lru_cache(KEPT_CURVES)
def elu(alpha: float = 1.0) -> Monotone:
    """``x`` for x > 0, else ``alpha (exp(x) - 1)``; f' there is ``y + alpha``.

    y loses f' where it nears -alpha: from x = -0.7 on f' is as exact as y, absolutely and not relatively.
    """
    _check_positive("elu", "alpha", alpha, zero_too=True)
    return exponential_linear(
        # Clevert et al., ELU, arXiv 1511.07289
        "elu",
        lambda x: F.elu(x, alpha),
        alpha=alpha,
        parameters=_unless_default(("alpha", alpha, 1.0)),
    )


@functools.lru_cache(KEPT_CURVES)
def celu(alpha: float = 1.0) -> Monotone:
    """``x`` for x > 0, else ``alpha (exp(x / alpha) - 1)``; f' there is ``y / alpha + 1``. Loses what `elu` loses."""
    _check_positive("celu", "alpha", alpha)
    return exponential_linear(
        # Barron, CELU, arXiv 1704.07483
        "celu",
        lambda x: F.celu(x, alpha),
        alpha=alpha,
        input_scale=1 / alpha,
        parameters=_unless_default(("alpha", alpha, 1.0)),
    )


@functools.lru_cache(KEPT_CURVES)
def leaky_relu(negative_slope: float = 0.01) -> Monotone:
    """``x`` for x > 0, else ``negative_slope x``. Nothing is lost: the sign of y is that of x."""
    _check_positive("leaky_relu", "negative_slope", negative_slope, zero_too=True)

    def slope(values: Tensor) -> Tensor:  # of x and y alike
        return torch.where(values > 0, 1.0, torch.full_like(values, negative_slope))

    return Monotone(
        # Maas et al., Rectifier Nonlinearities Improve Neural Network Acoustic Models, 2013
        name="leaky_relu",
        f=lambda x: F.leaky_relu(x, negative_slope),
        derivative=slope,
        of_output=slope,
        rise=torch.zeros_like,
        constants=(negative_slope,),
        parameters=_unless_default(("negative_slope", negative_slope, 0.01)),
    )


@functools.lru_cache(KEPT_CURVES)
def hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> Monotone:
    """x, held between two values; f' is 1 between them. Lost where x is a bound, rounded: f' is 0 there."""
    if not min_val < max_val:
        raise ValueError(
            f"hardtanh was given min_val={min_val} and max_val={max_val}: there is nothing between them. "
            "Pass a max_val larger than min_val."
        )
    min_val, max_val = min_val + 0.0, max_val + 0.0  # -0.0 is 0.0, to the cache above as well
    return clamped("hardtanh", min_val, max_val, _unless_default(("min_val", min_val, -1.0), ("max_val", max_val, 1.0)))


# From here on log1p(exp(z)) is z to the last digit of fp32, so that going over to z makes no jump.
SMOOTH_THRESHOLD = 17.0


@functools.lru_cache(KEPT_CURVES)
def softplus(beta: float = 1.0, threshold: float = 20.0) -> Monotone:
    """``log(1 + exp(beta x)) / beta``, and x itself where ``beta x > threshold``; f' is ``1 - exp(-beta y)``.

    Nothing is lost in fp32 and in 16 bits. With a threshold below 17, y falls back where it becomes x, and one bit per
    element tells on which side of the jump x was. In fp64 the default threshold makes a jump of 2e-9.
    """
    _check_positive("softplus", "beta", beta)

    def is_x_itself(x: Tensor) -> Tensor:
        # In fp32 for 16-bit types, as the stock operator compares: threshold / beta would be rounded.
        return beta * widened(x) > threshold

    def derivative(x: Tensor) -> Tensor:
        return torch.where(is_x_itself(x), 1.0, torch.sigmoid(beta * x))

    jumps = threshold < SMOOTH_THRESHOLD
    return Monotone(
        # Dugas et al., Incorporating Second-Order Functional Knowledge, 2000
        name="softplus",
        f=lambda x: F.softplus(x, beta, threshold),
        derivative=derivative,
        of_output=lambda y: -torch.expm1(-beta * y),
        rise=lambda y: beta * torch.exp(-beta * y),
        constants=(beta,),
        beyond_jump=is_x_itself if jumps else None,
        has_side=jumps,
        parameters=_unless_default(("beta", beta, 1.0), ("threshold", threshold, 20.0)),
    )


def _unless_default(*parameters: tuple[str, float, float]) -> tuple[tuple[str, float], ...]:
    if all(value == default for _, value, default in parameters):
        return ()
    return tuple((name, value) for name, value, _ in parameters)


def _check_positive(curve: str, name: str, value: float, zero_too: bool = False) -> None:
    if not (value > 0 or (zero_too and value == 0)):
        raise ValueError(
            f"{curve} was given {name}={value}: it then turns, and its output does not tell its gradient. "
            f"Pass a positive {name}, or use torch.nn.functional.{curve}."
        )
