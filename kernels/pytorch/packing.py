"""Bits packed into bytes, in plain PyTorch.

A flat tensor of bools becomes a flat tensor of bytes, the first element in the lowest bit; the last byte is filled up
with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed(bits: Tensor) -> Tensor:
    """Flat bools, as bytes."""
    if torch.compiler.is_compiling() or bits.numel() % 8:
        bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8))
    if not torch.compiler.is_compiling():
        # Eight bools are the eight bytes of one integer; the product brings byte i's lowest bit to bit 56 + i.
        return (bits.view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)
    return (bits.view(-1, 8).to(torch.uint8) << places(bits.device)).sum(1, dtype=torch.uint8)


def unpacked(side: Tensor, count: int) -> Tensor:
    """The first `count` bools."""
    if not torch.compiler.is_compiling():
        # Eight copies of the byte in one integer, of which the i-th keeps its bit i.
        spread = side.to(torch.int64) * 0x0101010101010101 & -0x7FBFDFEFF7FBFDFF
        return (spread.view(torch.uint8) != 0)[:count]
    return (side.unsqueeze(1) >> places(side.device) & 1).view(-1)[:count].bool()


def places(device: torch.device) -> Tensor:
    """Where in a byte each of its bits stands."""
    return torch.arange(0, 8, dtype=torch.uint8, device=device)
