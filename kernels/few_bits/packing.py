"""Codes of k bits packed into bytes, in plain PyTorch.

Eight codes of k bits are k bytes, the first in the lowest bits; the last group is filled up with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .step_functions import Steps


def bits_of(steps: Steps) -> int:
    return len(steps.values).bit_length() - 1


def nbytes(count: int, bits: int) -> int:
    """Of the packed codes of so many elements."""
    return -(-count // 8) * bits


def packed(codes: Tensor, bits: int) -> Tensor:
    """Flat uint8 codes, as bytes."""
    if torch.compiler.is_compiling() or codes.numel() % 8:
        codes = torch.nn.functional.pad(codes, (0, -codes.numel() % 8))
    if torch.compiler.is_compiling():
        places = torch.arange(0, 8 * bits, bits, device=codes.device)
        word = (codes.view(-1, 8).long() << places).sum(1, keepdim=True)
        return (word >> torch.arange(0, 8 * bits, 8, device=codes.device) & 255).to(torch.uint8).view(-1)
    # Eight codes are the eight bytes of one integer: neighbours close up, then pairs of them, then fours.
    word = codes.view(torch.int64)
    for width in (8, 16, 32):
        word = (word | word >> (width - width // 8 * bits)) & _lanes(width, bits)
    return word.view(torch.uint8).view(-1, 8)[:, :bits].clone(memory_format=torch.contiguous_format).view(-1)


def unpacked(packed: Tensor, count: int, bits: int) -> Tensor:
    """The first `count` codes, as uint8."""
    if torch.compiler.is_compiling():
        ends = torch.arange(0, 8 * bits, 8, device=packed.device)
        word = (packed.view(-1, bits).long() << ends).sum(1, keepdim=True)
        places = torch.arange(0, 8 * bits, bits, device=packed.device)
        return (word >> places & (1 << bits) - 1).to(torch.uint8).view(-1)[:count]
    word = torch.nn.functional.pad(packed.view(-1, bits), (0, 8 - bits)).view(-1).view(torch.int64)
    for width in (32, 16, 8):
        closed = width // 8 * bits  # bits of the codes that stand in one lane
        word = (word | word << (width - closed)) & _spread_lanes(width, bits)
    return word.view(torch.uint8)[:count]


def _lanes(width: int, bits: int) -> int:
    """Of an integer of 64 bits, those that hold codes when the neighbours in lanes of this width have closed up."""
    return sum(((1 << width // 4 * bits) - 1) << lane for lane in range(0, 64, 2 * width))


def _spread_lanes(width: int, bits: int) -> int:
    """The same when they stand in lanes of this width again."""
    return sum(((1 << width // 8 * bits) - 1) << lane for lane in range(0, 64, width))
