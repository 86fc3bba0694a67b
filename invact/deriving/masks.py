"""Masks, kept in bits."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from invact.deriving.handles import Handle, Kept
from invact.kernels.masks import packed, unpacked
from invact.pytorch.tensors import StorageWeakRef


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


def bits_of(mask: Tensor, hooks: tuple[Any, Any] | None, shared: bool) -> Bits | None:
    """Of a dense mask; where it may be `shared`, one for all who keep it."""
    dense = mask.is_contiguous() or mask.is_contiguous(memory_format=torch.channels_last)
    if not dense or mask.untyped_storage().nbytes() != mask.numel():
        return None
    if not shared:
        return Bits(mask, mask._version, hooks)
    outside = None if hooks is None else hooks[1]
    storage = StorageWeakRef(mask.untyped_storage())
    key = storage.cdata
    known = _MASKS.get(key)
    if known is not None:
        handle = known[1]()
        same = handle is not None and not known[0].expired() and handle.outside is outside
        if handle is not None and same and handle.version == mask._version and handle.fits(mask):
            handle.bits.asked_once_more()
            return handle
    handle = Bits(mask, mask._version, hooks)

    def forget(reference: weakref.ref[Bits]) -> None:
        if key in _MASKS and _MASKS[key][1] is reference:  # else another mask lies there by now
            del _MASKS[key]

    _MASKS[key] = storage, weakref.ref(handle, forget)
    return handle


# By the identity of its storage, the bits of a mask that several keep; it has no node on which to note them.
_MASKS: dict[int, tuple[StorageWeakRef, weakref.ref[Bits]]] = {}
