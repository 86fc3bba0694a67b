"""Functions that Triton lacks, or has with fewer digits."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halved_exponent(x):
    """k and r of ``x = k log(2) + r``, after Cody and Waite, and (exp(r) - 1 - r) / r^2."""
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - k * 0.693359375) + k * 2.12194440054690583e-4  # k * 0.693359375 is exact
    p = tl.zeros_like(r) + 1.9841269841269841e-4
    p = p * r + 1.3888888888888889e-3
    p = p * r + 8.3333333333333333e-3
    p = p * r + 4.1666666666666666e-2
    p = p * r + 1.6666666666666666e-1
    p = p * r + 0.5
    return k, r, p


@triton.jit
def exponential(x):
    """exp to about one unit in the last place, where tl.exp loses some twenty for large x."""
    k, r, p = halved_exponent(tl.minimum(tl.maximum(x, -110.0), 100.0))
    half = tl.floor(k * 0.5)  # in two steps: 2^128 alone would be infinite
    return (1.0 + (r + r * r * p)) * tl.exp2(half) * tl.exp2(k - half)


@triton.jit
def exponential_minus_one(x):
    """expm1 of a number that is not positive, to about two units in the last place; NaN gives some number."""
    k, r, p = halved_exponent(tl.maximum(x, -110.0))
    power = tl.exp2(k)
    return power * (r + r * r * p) + (power - 1.0)


@triton.jit
def tanh(z):
    """tanh to about one unit in the last place; the interpreter has none."""
    size = tl.abs(z)
    large = 1.0 - tl.math.div_rn(tl.zeros_like(size) + 2.0, exponential(2.0 * size) + 1.0)
    # Below 0.625 the Cephes polynomial (tanhf, S. Moshier)
    square = z * z
    p = tl.zeros_like(z) - 5.70498872745e-3
    p = p * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    return tl.where(size < 0.625, z + z * square * p, tl.where(z < 0, -large, large))
