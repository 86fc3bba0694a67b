"""The pair of kernels in Triton, for CUDA and ROCm in eager mode; on CPU tensors when TRITON_INTERPRET=1.

The formulas of `curves.two_sided_slopes`, in one pass each: forward reads x and writes y and the sides, backward reads
dy, y and the sides and writes dx, in rows of eight elements as `launch` has them. All tensors are contiguous, of any
shape. Left to the PyTorch pair: fp64, and forward of monotone curves, which is the stock operator.

In 16 bits, the usual case, there are some 20 instructions per element forward and 35 backward: so few that
the memory of a large card is what they wait for.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc,no-untyped-call"
# ruff: noqa: N803
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..curves.curve import Curve
from ..curves.monotone import Monotone
from ..curves.two_sided import TwoSided
from ..curves.two_sided_slopes import minimum_in_two, saturation
from ..rounding import half_ulp, rounded_up
from . import polynomials
from .launch import KEPT_CONSTANTS, Constants, launch, row_offsets
from .math import (
    exponential,
    normal_cdf,
    quick_exp2,
    quick_log2,
    quick_normal_cdf,
    quick_reciprocal,
)
from .monotone import monotone_slope

near_polynomial = polynomials.near
right_polynomial = polynomials.right
tail_polynomial = polynomials.tail
quick_slope = polynomials.quick_slope


@triton.jit
def activation(x, CURVE: tl.constexpr):
    """f, as PyTorch's CUDA operators have it; where these lose digits, far on the left, nearer to the true value."""
    if CURVE == "gelu":
        y = x * normal_cdf(x)
    elif CURVE == "gelu_tanh":
        y = tl.math.div_rn(x, 1.0 + exponential(-(x * (1.5957691216057308 + 0.07135481627260025 * (x * x)))))
    elif CURVE == "quick_gelu":
        y = x * tl.math.div_rn(tl.zeros_like(x) + 1.0, 1.0 + exponential(-1.702 * x))
    elif CURVE == "silu":
        y = tl.math.div_rn(x, 1.0 + exponential(-x))
    elif CURVE == "mish":
        power = exponential(tl.minimum(x, 40.0))  # tanh(log1p(e)) is n / (n + 2) with n = e (e + 2)
        n = power * (power + 2.0)
        y = x * tl.math.div_rn(n, n + 2.0)
    elif CURVE == "hardswish":
        y = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) * 0.16666666666666666
    return y


@triton.jit
def quick_activation(x, CURVE: tl.constexpr, CHIP: tl.constexpr):
    """f with the digits that 16 bits need."""
    if CURVE == "gelu":
        y = x * quick_normal_cdf(x, CHIP)
    elif CURVE == "gelu_tanh":
        y = quick_sigmoid_product(x, x * (-2.302208198144325 + -0.1029432395800235 * (x * x)), CHIP)
    elif CURVE == "quick_gelu":
        y = quick_sigmoid_product(x, x * -2.4554669595930156, CHIP)
    elif CURVE == "silu":
        y = quick_sigmoid_product(x, x * -1.4426950408889634, CHIP)
    elif CURVE == "mish":
        power = quick_exp2(tl.minimum(x, 20.0) * 1.4426950408889634, CHIP)
        n = power * (power + 2.0)
        y = x * (n * quick_reciprocal(n + 2.0, CHIP))
    else:
        y = activation(x, CURVE)
    return y


@triton.jit
def quick_sigmoid_product(x, power, CHIP: tl.constexpr):
    """``x / (1 + 2^power)``; the divisor is divided by 2^32, so that its reciprocal is not too small for the chip's."""
    divisor = quick_exp2(power - 32.0, CHIP) + 2.3283064365386963e-10
    return x * (quick_reciprocal(divisor, CHIP) * 2.3283064365386963e-10)


@triton.jit
def roots_of_stretch(y, Y_MIN: tl.constexpr, Y_MIN_LOW: tl.constexpr, HALF_ULP: tl.constexpr):
    height = (y - Y_MIN) - Y_MIN_LOW
    return tl.sqrt(tl.maximum(height - HALF_ULP, 0.0)), tl.sqrt(tl.maximum(height + HALF_ULP, HALF_ULP / 64))


@triton.jit
def forward_kernel(
    x_ptr,
    y_ptr,
    side_ptr,
    n,
    LEFT_END: tl.constexpr,
    CURVE: tl.constexpr,
    SHORT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    CHIP: tl.constexpr,
):
    rows, offsets = row_offsets(ROWS, WIDE)
    inside = offsets < n
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = quick_activation(x, CURVE, CHIP) if SHORT else activation(x, CURVE)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
    right = tl.where(x < LEFT_END, 0, 1)  # a NaN is on the right
    byte = tl.sum(tl.where(inside, right, 0) << tl.arange(0, 8)[None, :], axis=1)
    tl.store(side_ptr + rows, byte.to(side_ptr.dtype.element_ty), mask=rows * 8 < n)


@triton.jit
def slope_of(
    y,
    right,
    NEAR_HIGH: tl.constexpr,
    SATURATION: tl.constexpr,
    TAIL_START: tl.constexpr,
    TAIL_OFFSET: tl.constexpr,
    TAIL_LOW: tl.constexpr,
    Y_MIN: tl.constexpr,
    Y_MIN_LOW: tl.constexpr,
    HALF_ULP: tl.constexpr,
    CURVE: tl.constexpr,
    SHORT: tl.constexpr,
    CHIP: tl.constexpr,
):
    """f' of fp32 y and the side, as `two_sided_slopes.slope` has it."""
    lower, upper = roots_of_stretch(y, Y_MIN, Y_MIN_LOW, HALF_ULP)
    root = (lower + upper) * 0.5
    r = tl.where(right, root, -root)
    outer = tl.where(y >= SATURATION, 1.0, r * right_polynomial(r, CURVE, SHORT))
    slope = tl.where(r > NEAR_HIGH, outer, r * near_polynomial(r, CURVE, SHORT))
    if CURVE == "hardswish":
        slope = tl.where(right | (y < TAIL_START), slope, 0.0)
    else:
        below = tl.minimum(y, 0.0)  # the library's own error may have put it above
        s = tl.sqrt(tl.maximum(quick_log2(below * (1.0 / Y_MIN), CHIP) * -0.6931471805599453, 0.0))
        w = tl.maximum(quick_reciprocal(s + TAIL_OFFSET, CHIP), TAIL_LOW)
        slope = tl.where(right | (y < TAIL_START), slope, below * tail_polynomial(w, CURVE, SHORT))
        slope += y - y  # 0, but NaN at infinity, where stock's formulas say NaN too
    return slope


@triton.jit
def backward_kernel(
    dy_ptr,
    y_ptr,
    side_ptr,
    dx_ptr,
    n,
    NEAR_HIGH: tl.constexpr,
    SATURATION: tl.constexpr,
    TAIL_START: tl.constexpr,
    TAIL_OFFSET: tl.constexpr,
    TAIL_LOW: tl.constexpr,
    Y_MIN: tl.constexpr,
    Y_MIN_LOW: tl.constexpr,
    HALF_ULP: tl.constexpr,
    CURVE: tl.constexpr,
    SHORT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    CHIP: tl.constexpr,
):
    rows, offsets = row_offsets(ROWS, WIDE)
    inside = offsets < n
    y = tl.load(y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    byte = tl.load(side_ptr + rows, mask=rows * 8 < n, other=0).to(tl.int32)
    right = ((byte[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0
    if SHORT and CURVE != "hardswish":
        below = tl.minimum(y, -1.1754943508222875e-38)
        slope = quick_slope(y, below, quick_log2(-below, CHIP), right, CURVE, y_ptr.dtype.element_ty == tl.bfloat16)
        slope += y * 0.0  # NaN at infinity, where stock's formulas say NaN too
    else:
        slope = slope_of(
            y,
            right,
            NEAR_HIGH,
            SATURATION,
            TAIL_START,
            TAIL_OFFSET,
            TAIL_LOW,
            Y_MIN,
            Y_MIN_LOW,
            HALF_ULP,
            CURVE,
            SHORT,
            CHIP,
        )
    tl.store(dx_ptr + offsets, (dy * slope).to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def monotone_backward_kernel(
    dy_ptr,
    y_ptr,
    dx_ptr,
    n,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    CURVE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    CHIP: tl.constexpr,
):
    _, offsets = row_offsets(ROWS, WIDE)
    inside = offsets < n
    y = tl.load(y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    dx = dy * monotone_slope(y, A, B, C, D, CURVE)
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def forward(x: Tensor, curve: TwoSided) -> tuple[Tensor, Tensor]:
    """``y = f(x)`` and the packed sides."""
    n = x.numel()
    y = torch.empty_like(x)
    side = torch.empty(curve.side_nbytes(n), dtype=torch.uint8, device=x.device)
    if n:
        launch(forward_kernel, forward_constants(curve, x.dtype), (x, y, side), n)
    return y, side


def backward(dy: Tensor, y: Tensor, side: Tensor, curve: Curve) -> Tensor:
    """``dy * f'(x)``, from y and the packed sides alone."""
    n = y.numel()
    dx = torch.empty_like(y)
    if n and isinstance(curve, TwoSided):
        launch(backward_kernel, backward_constants(curve, y.dtype), (dy, y, side, dx), n)
    elif n:
        launch(monotone_backward_kernel, monotone_constants(curve, y.dtype), (dy, y, dx), n)
    return dx


# --- constants ----------------------------------------------------------------------------------------


@functools.lru_cache(KEPT_CONSTANTS)
def forward_constants(curve: TwoSided, dtype: torch.dtype) -> Constants:
    """What the forward kernel knows of a curve."""
    return {"LEFT_END": rounded_up(curve.x_min, dtype), "CURVE": curve.name, "SHORT": dtype.itemsize == 2}


@functools.lru_cache(KEPT_CONSTANTS)
def backward_constants(curve: TwoSided, dtype: torch.dtype) -> Constants:
    """What the backward kernel knows of a curve besides its polynomials."""
    fit = curve.fit_for(dtype)
    high, low = minimum_in_two(curve.fit, torch.float32)
    return {
        "NEAR_HIGH": fit.near.high,
        "SATURATION": saturation(fit),
        "TAIL_START": fit.tail_start,
        "TAIL_OFFSET": fit.tail_offset,
        "TAIL_LOW": fit.tail.low if fit.tail else 0.0,
        "Y_MIN": high,
        "Y_MIN_LOW": low,
        "HALF_ULP": half_ulp(curve.y_min, dtype),
        "CURVE": curve.name,
        "SHORT": dtype.itemsize == 2,
    }


@functools.lru_cache(KEPT_CONSTANTS)
def monotone_constants(curve: Monotone, dtype: torch.dtype) -> Constants:
    """What the backward kernel of the monotone curves knows of one."""
    a, b, c, d = (*curve.constants_for(dtype), 0.0, 0.0, 0.0, 0.0)[:4]
    return {"A": a, "B": b, "C": c, "D": d, "CURVE": curve.name}
