"""Codes in a few bits, in Triton: found and packed in one kernel, read in one with the gradient's product.

All tensors are contiguous and flat. Codes lie as `few_bits.packing` has them. Bounds and values are read from tables of
a few numbers, so that nothing is built anew for another curve. Left to PyTorch: fp64.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc,no-untyped-call"
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..few_bits.device_tables import bounds_on, values_on
from ..few_bits.packing import bits_of, nbytes
from ..few_bits.step_functions import Steps
from .launch import Constants, launch, row_offsets


@triton.jit
def pack_codes_kernel(
    x_ptr,
    bounds_ptr,
    codes_ptr,
    n,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    CHIP: tl.constexpr,
):
    rows, offsets = row_offsets(ROWS, WIDE)
    inside = offsets < n
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    code = tl.zeros_like(offsets).to(tl.int32)
    for i in tl.static_range(0, (1 << BITS) - 1):
        code += tl.where(x < tl.load(bounds_ptr + i), 0, 1)  # a NaN is beyond them all
    code = tl.where(inside, code, 0)
    word = tl.sum(code << (tl.arange(0, 8) * BITS)[None, :], axis=1)
    for i in tl.static_range(0, BITS):
        tl.store(codes_ptr + rows * BITS + i, (word >> (8 * i)).to(tl.uint8), mask=rows * 8 < n)


@triton.jit
def scaled_kernel(
    dy_ptr,
    codes_ptr,
    values_ptr,
    dx_ptr,
    n,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    CHIP: tl.constexpr,
):
    rows, offsets = row_offsets(ROWS, WIDE)
    inside = offsets < n
    dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    word = tl.zeros_like(rows).to(tl.int32)
    for i in tl.static_range(0, BITS):
        word |= tl.load(codes_ptr + rows * BITS + i, mask=rows * 8 < n, other=0).to(tl.int32) << (8 * i)
    code = (word[:, None] >> (tl.arange(0, 8) * BITS)[None, :]) & ((1 << BITS) - 1)
    dx = dy * tl.load(values_ptr + code)
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


OF_BITS: dict[int, Constants] = {bits: {"BITS": bits} for bits in (1, 2, 3, 4)}


def packed_codes(x: Tensor, steps: Steps) -> Tensor:
    """On which step each x lies, as bytes."""
    n, bits = x.numel(), bits_of(steps)
    codes = torch.empty(nbytes(n, bits), dtype=torch.uint8, device=x.device)
    if n:
        launch(pack_codes_kernel, OF_BITS[bits], (x, bounds_on(steps, x.device), codes), n)
    return codes


def scaled(dy: Tensor, codes: Tensor, steps: Steps) -> Tensor:
    """dy times the value of each element's step, in fp32, rounded once."""
    n, values = dy.numel(), values_on(steps, dy.device, torch.float32)
    dx = torch.empty_like(dy)
    if n:
        launch(scaled_kernel, OF_BITS[bits_of(steps)], (dy, codes, values, dx), n)
    return dx
