"""One door to masks in bits: packed, unpacked, and read in one pass with the product that drops by them.

In Triton each is one kernel. In plain PyTorch packing is three and unpacking four, and a product unpacks first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import TRITON_DTYPES, may_run_triton
from .imitated import imitates
from .pytorch import packing


def packed(mask: Tensor) -> Tensor:
    """Flat dense bools as bytes, the first in the lowest bit."""
    if may_run_triton(mask):
        from .triton import masks as triton_masks

        return triton_masks.packed(mask)
    if imitates("cuda", mask):
        return mask.new_empty(-(-mask.numel() // 8), dtype=torch.uint8)
    return packing.packed(mask)


def unpacked(bits: Tensor, count: int) -> Tensor:
    """The first `count` bools."""
    if may_run_triton(bits):
        from .triton import masks as triton_masks

        return triton_masks.unpacked(bits, count)
    if imitates("cuda", bits):
        return bits.new_empty(count, dtype=torch.bool)
    return packing.unpacked(bits, count)


def dropped(x: Tensor, bits: Tensor, stride: tuple[int, ...], scale: float) -> Tensor:
    """``x * mask * scale``, in every bit what `native_dropout` gives on a GPU: worked out in fp32 and rounded once.

    Args:
        x: of any floating dtype.
        bits: of a dense mask of x's shape, in the order of its memory.
        stride: of the mask.
        scale: a number of fp32, of fp64 for x of fp64.

    Returns:
        Of x's shape and dtype; laid out as x, if x lies as the mask does.
    """
    if x.stride() == stride and x.dtype in TRITON_DTYPES and may_run_triton(x) and may_run_triton(bits):
        from .triton import masks as triton_masks

        return triton_masks.dropped(x, bits, scale)
    if x.stride() == stride and imitates("cuda", x):
        return torch.empty_like(x)
    mask = unpacked(bits, x.numel()).as_strided(x.shape, stride)
    return torch.ops.aten.native_dropout_backward(x, mask, scale)  # type: ignore[no-any-return]
