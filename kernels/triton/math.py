"""Functions that Triton lacks, or has with fewer digits, or with more than 16-bit numbers need.

Those called quick are one instruction of the chip, right to some 22 bits, and take what is smaller than 2^-126 as 0.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"
# ruff: noqa: N803, RET505
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
    k, r, p = halved_exponent(tl.minimum(tl.maximum(x, -110.0), 200.0))
    half = tl.floor(k * 0.5)  # in two steps: 2^128 alone would be infinite
    return (1.0 + (r + r * r * p)) * tl.exp2(half) * tl.exp2(k - half)


@triton.jit
def exponential_minus_one(x):
    """expm1 of a number that is not positive, to about two units in the last place; NaN gives some number."""
    k, r, p = halved_exponent(tl.maximum(x, -110.0))
    power = tl.exp2(k)
    return power * (r + r * r * p) + (power - 1.0)


@triton.jit
def quick_log2(x, CHIP: tl.constexpr):
    if CHIP == "cuda":
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.log2(x)


@triton.jit
def quick_exp2(x, CHIP: tl.constexpr):
    if CHIP == "cuda":
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.exp2(x)


@triton.jit
def quick_reciprocal(x, CHIP: tl.constexpr):
    if CHIP == "cuda":
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1.0 / x


@triton.jit
def quick_normal_cdf(x, CHIP: tl.constexpr):
    """The share of a normal distribution below x, to 1e-5 of itself on either side."""
    size = tl.abs(x)
    w = quick_reciprocal(1.0 + 0.3 * size, CHIP)
    # erfcx(size / sqrt(2)) / 2, to 2e-6 of itself up to 14.5
    p = tl.zeros_like(w) - 0.0845932308
    p = p * w + 0.240572826
    p = p * w - 0.0486445152
    p = p * w + 0.164764576
    p = p * w + 0.106704481
    p = p * w + 0.121274712
    p = p * w - 7.9790269e-05
    beyond = p * quick_exp2(size * size * -0.7213475204444817, CHIP)
    return tl.where(x < 0, beyond, 1.0 - beyond)


@triton.jit
def normal_cdf(x):
    """The share of a normal distribution below x, to some units in the last place on either side."""
    size = tl.minimum(tl.abs(x), 15.0)
    square = size * size
    w = 1.0 / (1.0 + 0.25 * size)
    # erfcx(size / sqrt(2)) / 2, to 4e-9 of itself up to 14.5
    p = tl.zeros_like(w) + 0.0116639918
    p = p * w - 0.0336786123
    p = p * w - 0.0240837463
    p = p * w + 0.14221877
    p = p * w - 0.0964478322
    p = p * w + 0.156430225
    p = p * w + 0.0419479049
    p = p * w + 0.104117778
    p = p * w + 0.0979277688
    p = p * w + 0.0999111731
    p = p * w - 7.41966368e-06
    # exp(-square / 2), with what rounding the square and the constant has taken off
    k = tl.floor(square * -0.7213475108146667 + 0.5)
    rest = tl.fma(square, tl.zeros_like(k) - 0.7213475108146667, -k)
    rest += square * -9.62983e-09 + tl.fma(size, size, -square) * -0.7213475108146667
    beyond = p * tl.exp2(rest) * tl.exp2(k)
    # (cdf - 1/2) / x, to 2e-9 up to 1.42
    q = tl.zeros_like(square) + 4.10010409e-07
    q = q * square - 8.69175972e-06
    q = q * square + 0.000114240422
    q = q * square - 0.00118627688
    q = q * square + 0.00997306535
    q = q * square - 0.0664902741
    q = q * square + 0.398942273
    return tl.where(size < 1.42, 0.5 + x * q, tl.where(x < 0, beyond, 1.0 - beyond))
