"""Masks in bits, in Triton: packed, unpacked, and in one pass with the product that drops by them.

All tensors are contiguous, the masks flat. Bits lie as `pytorch.packing` has them. Left to PyTorch: a product in fp64.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc,no-untyped-call"
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Constants, launch, row_offsets

ROWS_A_THREAD = 2  # of eight bools, which are 16 bytes


@triton.jit
def pack_kernel(
    mask_ptr,
    bits_ptr,
    n,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    CHIP: tl.constexpr,
):
    """Eight bools are the eight bytes of one integer; the product brings byte i's lowest bit to bit 56 + i.

    The last n % 8 of them are read one by one, by the first program: there need be no memory behind them.
    """
    rows, _ = row_offsets(ROWS, WIDE)
    inside = rows < n // 8
    eight = tl.load(mask_ptr.to(tl.pointer_type(tl.int64), bitcast=True) + rows, mask=inside, other=0)
    tl.store(bits_ptr + rows, (eight * 0x0102040810204080 >> 56).to(tl.uint8), mask=inside)
    if REST:  # noqa: SIM102 - older Tritons cannot join what is known with what is not
        if tl.program_id(0) == 0:
            last = mask_ptr.to(tl.pointer_type(tl.uint8), bitcast=True) + n // 8 * 8
            byte = tl.load(last).to(tl.int32)
            for i in tl.static_range(1, 7):
                byte |= tl.load(last + i, mask=i < n % 8, other=0).to(tl.int32) << i
            tl.store(bits_ptr + n // 8, byte.to(tl.uint8))


@triton.jit
def unpack_kernel(bits_ptr, mask_ptr, n, ROWS: tl.constexpr, WIDE: tl.constexpr, CHIP: tl.constexpr):
    """Eight copies of a byte in one integer, of which the i-th keeps its bit i, which then goes to the lowest place.

    n is a multiple of 8.
    """
    rows, _ = row_offsets(ROWS, WIDE)
    inside = rows < n // 8
    byte = tl.load(bits_ptr + rows, mask=inside, other=0).to(tl.int64)
    spread = byte * 0x0101010101010101 & -0x7FBFDFEFF7FBFDFF
    # What is not 0 in a byte carries into its highest bit, and no further; of byte 7 it may be there already.
    high = ((spread & 0x7F7F7F7F7F7F7F7F) + 0x7F7F7F7F7F7F7F7F) | spread
    eight = high >> 7 & 0x0101010101010101
    tl.store(mask_ptr.to(tl.pointer_type(tl.int64), bitcast=True) + rows, eight, mask=inside)


@triton.jit
def dropped_kernel(x_ptr, bits_ptr, y_ptr, n, scale, ROWS: tl.constexpr, WIDE: tl.constexpr, CHIP: tl.constexpr):
    rows, offsets = row_offsets(ROWS, WIDE)
    inside = offsets < n
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    byte = tl.load(bits_ptr + rows, mask=rows * 8 < n, other=0).to(tl.int32)
    kept = (byte[:, None] >> tl.arange(0, 8)[None, :]) & 1
    y = x * kept.to(tl.float32) * scale  # in this order, and a product also where nothing is left, as in stock
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


NONE: Constants = {}
REST: dict[bool, Constants] = {rest: {"REST": rest} for rest in (False, True)}


def packed(mask: Tensor) -> Tensor:
    """Flat bools, as bytes."""
    if mask.data_ptr() % 8:  # another library's memory; what PyTorch allocates starts at a multiple of 512
        mask = mask.clone()
    n = mask.numel()
    bits = torch.empty(-(-n // 8), dtype=torch.uint8, device=mask.device)
    if n:
        launch(pack_kernel, REST[n % 8 != 0], (mask, bits), n, rows_a_thread=ROWS_A_THREAD)
    return bits


def unpacked(bits: Tensor, count: int) -> Tensor:
    """The first `count` bools."""
    n = 8 * bits.numel()
    mask = torch.empty(n, dtype=torch.bool, device=bits.device)
    if n:
        launch(unpack_kernel, NONE, (bits, mask), n, rows_a_thread=ROWS_A_THREAD)
    return mask[:count]


def dropped(x: Tensor, bits: Tensor, scale: float) -> Tensor:
    """``x * mask * scale`` in fp32, rounded once, as CUDA's dropout has it; x is dense, and the bits lie as it does."""
    y = torch.empty_like(x)
    if n := x.numel():
        launch(dropped_kernel, NONE, (x, bits, y), n, numbers=(scale,))
    return y
