"""Codes of one, two or four bits packed into bytes, in plain PyTorch.

A flat tensor of codes becomes a flat tensor of bytes, the first element in the lowest bits. Eight elements always take
whole bytes, as many as a code has bits; the last of them are filled up with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed(codes: Tensor, bits: int = 1) -> Tensor:
    """Flat codes, bool for one bit and uint8 for more, as bytes."""
    if torch.compiler.is_compiling() or codes.numel() % 8:
        codes = torch.nn.functional.pad(codes, (0, -codes.numel() % 8))
    if bits == 1 and not torch.compiler.is_compiling():
        # Eight bools are the eight bytes of one integer; the product brings byte i's lowest bit to bit 56 + i.
        return (codes.view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)
    rows = codes.view(-1, 8 // bits).to(torch.uint8)
    return (rows << shifts(bits, codes.device)).sum(1, dtype=torch.uint8)


def unpacked(side: Tensor, count: int, bits: int = 1) -> Tensor:
    """The first `count` codes: bool for one bit, uint8 for more."""
    if bits == 1 and not torch.compiler.is_compiling():
        # Eight copies of the byte in one integer, of which the i-th keeps its bit i.
        spread = side.to(torch.int64) * 0x0101010101010101 & -0x7FBFDFEFF7FBFDFF
        return (spread.view(torch.uint8) != 0)[:count]
    codes = (side.unsqueeze(1) >> shifts(bits, side.device) & (1 << bits) - 1).view(-1)[:count]
    return codes.bool() if bits == 1 else codes


def shifts(bits: int, device: torch.device) -> Tensor:
    """Where in a byte each of its codes begins."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
