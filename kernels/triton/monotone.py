"""f' of the monotone curves from their output, for Triton."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"
# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl

from .math import exponential_minus_one


@triton.jit
def monotone_slope(y, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, CURVE: tl.constexpr):
    """`Monotone.slope` for fp32 y; A to D are `Monotone.constants_for` its dtype."""
    if (CURVE == "elu" or CURVE == "celu") or CURVE == "selu":  # Triton (seen in 3.2) takes no longer chain
        slope = tl.where(y <= 0, tl.where(y <= D, 0.0, (y + A) * B), C)
    elif CURVE == "leaky_relu":
        slope = tl.where(y > 0, 1.0, A)
    elif CURVE == "hardtanh" or CURVE == "relu6":
        slope = tl.where((y <= A) | (y >= B), 0.0, 1.0)
    elif CURVE == "softplus":
        slope = tl.where(y != y, y, -exponential_minus_one(-A * y))
    elif CURVE == "log_sigmoid":
        slope = tl.where(y != y, y, -exponential_minus_one(y))
    elif CURVE == "softsign":
        slope = (1.0 - tl.abs(y)) * (1.0 - tl.abs(y))
    elif CURVE == "hardsigmoid":
        slope = tl.where((y > 0) & (y < 1), 0.16666666666666666, 0.0)
    elif CURVE == "squared_relu":
        slope = tl.where(y <= 0, 0.0, 2.0 * tl.math.sqrt_rn(y))
    elif CURVE == "relu":
        slope = tl.where(y <= 0, 0.0, 1.0)
    elif CURVE == "sigmoid":
        slope = y * (1.0 - y)
    elif CURVE == "tanh":
        slope = 1.0 - y * y
    return slope
