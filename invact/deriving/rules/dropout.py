"""Dropout, by the mask that is kept, which is read in bits where it lies in bits."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from invact.deriving.handles import Derived
from invact.deriving.masks import Bits
from invact.deriving.rules.operands import derived, produced, saved
from invact.deriving.rules.registry import Find, Node, register
from invact.kernels.masks import dropped, unpacked
from invact.kernels.rounding import rounded

aten = torch.ops.aten


@register("NativeDropoutBackward0")
def dropout(node: Node, number: int, find: Find) -> Derived | None:
    """A mask in bits is read as it is, in one pass with the product."""
    if number:
        return None
    left = 1 - node._saved_p
    x, mask = produced(node, 0, find), saved(node, "result1")
    if isinstance(mask, Bits):
        return derived(functools.partial(_dropped_by_bits, mask.stride, left), x, mask.bits)
    return derived(lambda x, mask: _dropped(x, mask, left), x, mask)


def _dropped_by_bits(stride: tuple[int, ...], left: float, x: Tensor, bits: Tensor) -> Tensor:
    if x.is_cuda:
        return dropped(x, bits, stride, dropout_scale(left, x.dtype))
    return _dropped(x, unpacked(bits, x.numel()).as_strided(x.shape, stride), left)


def _dropped(x: Tensor, mask: Tensor, left: float) -> Tensor:
    if not x.is_cuda:
        return x * (mask.to(x.dtype) * (1 / left if left else 0.0))
    return aten.native_dropout_backward(x, mask, dropout_scale(left, x.dtype))  # type: ignore[no-any-return]


def dropout_scale(left: float, dtype: torch.dtype) -> float:
    """The kernel rounds what is left to the type that it reckons in, before it divides by it."""
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    return rounded(1 / rounded(left, kind), kind) if left else 0.0
