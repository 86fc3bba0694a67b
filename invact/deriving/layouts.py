"""How a tensor lies in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from invact.pytorch.fake_tensors import FakeTensor

PLAIN = (Tensor, FakeTensor)


def has_strides(tensor: Tensor) -> bool:
    """Whether it is one block of memory: neither sparse nor nested."""
    return tensor.layout is torch.strided and not tensor.is_nested


def laid_out(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The tensor with other strides: matrix products in backward round differently when they read it differently."""
    if tensor.stride() == stride:
        return tensor
    made = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    once = tuple(slice(None) if step else slice(1) for step in stride)  # of what is expanded
    made[once].copy_(tensor[once])
    return made


def is_plain(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and has_strides(tensor)
