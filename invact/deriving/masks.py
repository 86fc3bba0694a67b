"""Masks, kept in bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from invact.deriving.handles import Handle, Kept
from invact.kernels.masks import packed, unpacked


class PackedMask(Kept):
    """The bytes that hold the bits of a mask."""

    __slots__ = ()


class Bits(Handle):
    """A bool tensor, in bits.

    Args:
        mask: dense, whatever the order of its dimensions.

    Attributes:
        bits: its bytes, in the order of its memory; who can use them as they are reads this handle.
    """

    __slots__ = ("bits", "shape", "stride")

    def __init__(self, mask: Tensor, version: int, hooks: tuple[Any, Any] | None) -> None:
        self.version = version
        self.shape, self.stride = mask.shape, mask.stride()
        flat = mask.as_strided((mask.numel(),), (1,))
        bits = packed(flat)
        self.bits = PackedMask(bits, bits._version, hooks)
        self.outside = self.bits.outside

    def wanted_again(self) -> None:
        self.bits.wanted_again()

    def fits(self, mask: Tensor) -> bool:
        """Whether this is the same mask, given that it has the same memory."""
        return mask.shape == self.shape and mask.stride() == self.stride

    def made(self) -> Tensor:
        return unpacked(self.bits.made(), self.shape.numel()).as_strided(self.shape, self.stride)
