"""The pair of kernels in Triton, for CUDA and ROCm in eager mode; on CPU tensors when TRITON_INTERPRET=1.

The formulas of `pieces.Fit` and `pytorch`, in one pass each: forward reads x and writes y and the bits, backward reads
dy, y and the bits and writes dx. A program works on rows of eight elements: a row is one byte of bits, and in 16 bits
one access of 16 bytes. All tensors are flat and contiguous, and fp64 is left to the PyTorch pair.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc,no-untyped-call"
# ruff: noqa: N803
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_polynomials
from .curves import CURVES, Curve
from .pytorch import half_ulp, left_end, minimum_in_two

ROWS = 256 if torch.version.hip else 128  # of eight elements, per program: a row for each thread of four warps

near_polynomial = triton_polynomials.near
right_polynomial = triton_polynomials.right
tail_polynomial = triton_polynomials.tail


@triton.jit
def exponential(x):
    """exp to about one unit in the last place, where tl.exp loses some twenty for large x."""
    x = tl.minimum(tl.maximum(x, -110.0), 100.0)
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - k * 0.693359375) + k * 2.12194440054690583e-4  # Cody and Waite: k * 0.693359375 is exact
    p = tl.zeros_like(r) + 1.9841269841269841e-4
    p = p * r + 1.3888888888888889e-3
    p = p * r + 8.3333333333333333e-3
    p = p * r + 4.1666666666666666e-2
    p = p * r + 1.6666666666666666e-1
    p = p * r + 0.5
    p = 1.0 + (r + r * r * p)
    half = tl.floor(k * 0.5)  # in two steps: 2^128 alone would be infinite
    return p * tl.exp2(half) * tl.exp2(k - half)


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


@triton.jit
def activation(x, CURVE: tl.constexpr):
    """f, step by step as PyTorch's CUDA operators work it out."""
    if CURVE == "gelu":
        y = x * 0.5 * (1.0 + tl.math.erf(x * 0.70710678118654752440))
    elif CURVE == "gelu_tanh":
        y = 0.5 * x * (1.0 + tanh(0.79788456080286535588 * (x + 0.044715 * (x * x * x))))
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
def row_offsets(ROWS: tl.constexpr, WIDE: tl.constexpr):
    """The program's rows, and its elements as (ROWS, 8)."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    rows = program * ROWS + tl.arange(0, ROWS)
    return rows, rows[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def forward_kernel(
    x_ptr,
    y_ptr,
    side_ptr,
    n,
    LEFT_END: tl.constexpr,
    CURVE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    rows, offsets = row_offsets(ROWS, WIDE)
    inside = offsets < n
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, activation(x, CURVE).to(y_ptr.dtype.element_ty), mask=inside)
    right = tl.where(x < LEFT_END, 0, 1)  # a NaN is on the right
    bits = tl.sum(tl.where(inside, right, 0) << tl.arange(0, 8)[None, :], axis=1)
    tl.store(side_ptr + rows, bits.to(tl.uint8), mask=rows * 8 < n)


@triton.jit
def backward_kernel(
    dy_ptr,
    y_ptr,
    side_ptr,
    dx_ptr,
    n,
    Y_MIN: tl.constexpr,
    Y_MIN_LOW: tl.constexpr,
    HALF_ULP: tl.constexpr,
    NEAR_HIGH: tl.constexpr,
    RIGHT_HIGH: tl.constexpr,
    TAIL_START: tl.constexpr,
    TAIL_OFFSET: tl.constexpr,
    TAIL_LOW: tl.constexpr,
    CURVE: tl.constexpr,
    SHORT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    rows, offsets = row_offsets(ROWS, WIDE)
    inside = offsets < n
    y = tl.load(y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    bits = tl.load(side_ptr + rows, mask=rows * 8 < n, other=0).to(tl.int32)
    right = ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) == 1

    height = (y - Y_MIN) - Y_MIN_LOW
    root = 0.5 * (tl.sqrt(tl.maximum(height + HALF_ULP, HALF_ULP / 64)) + tl.sqrt(tl.maximum(height - HALF_ULP, 0.0)))
    r = tl.where(right, root, -root)
    outer = tl.where(r > RIGHT_HIGH, 1.0, r * right_polynomial(r, CURVE, SHORT))
    slope = tl.where(r > NEAR_HIGH, outer, r * near_polynomial(r, CURVE, SHORT))
    if CURVE == "hardswish":
        slope = tl.where(right | (y < TAIL_START), slope, 0.0)
    else:
        s = tl.sqrt(tl.maximum(-tl.log(y * (1.0 / Y_MIN)), 0.0))
        w = tl.maximum(1.0 / (s + TAIL_OFFSET), TAIL_LOW)
        slope = tl.where(right | (y < TAIL_START), slope, y * tail_polynomial(w, CURVE, SHORT))
        slope += y - y  # 0, but NaN at infinity, where stock's formulas say NaN too
    tl.store(dx_ptr + offsets, (dy * slope).to(dx_ptr.dtype.element_ty), mask=inside)


def forward(x: Tensor, curve: Curve) -> tuple[Tensor, Tensor]:
    """``y = f(x)`` and the packed sides."""
    n = x.numel()
    y = torch.empty_like(x)
    side = torch.empty(-(-n // 8), dtype=torch.uint8, device=x.device)
    if n:
        with on(x):
            forward_kernel[grid(n)](
                x, y, side, n, LEFT_END=left_end(curve, x.dtype), CURVE=curve.name, ROWS=ROWS, WIDE=wide(n)
            )
    return y, side


def backward(dy: Tensor, y: Tensor, side: Tensor, curve: Curve) -> Tensor:
    """``dy * f'(x)``, from y and the packed sides alone."""
    n = y.numel()
    dx = torch.empty_like(y)
    if n:
        with on(y):
            backward_kernel[grid(n)](dy, y, side, dx, n, **constants(curve.name, y.dtype), ROWS=ROWS, WIDE=wide(n))
    return dx


def grid(n: int) -> tuple[int]:
    return (triton.cdiv(n, 8 * ROWS),)


def wide(n: int) -> bool:
    """Whether offsets need 64 bits."""
    return n > 2**31 - 8 * ROWS


def on(tensor: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor)


@functools.cache
def constants(name: str, dtype: torch.dtype) -> dict[str, float | str | bool]:
    """What the backward kernel knows of a curve besides its polynomials."""
    curve = CURVES[name]
    fit = curve.fit_for(dtype)
    high, low = minimum_in_two(curve, torch.float32)
    return {
        "Y_MIN": high,
        "Y_MIN_LOW": low,
        "HALF_ULP": half_ulp(curve, dtype),
        "NEAR_HIGH": fit.near.high,
        "RIGHT_HIGH": fit.right.high,
        "TAIL_START": fit.tail_start,
        "TAIL_OFFSET": fit.tail_offset,
        "TAIL_LOW": fit.tail.low if fit.tail else 0.0,
        "CURVE": name,
        "SHORT": dtype.itemsize == 2,
    }
