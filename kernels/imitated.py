"""What kernels allocate, where simulated tensors stand for those that a training step would have.

A simulated tensor has no memory for a kernel, so plain operators run on it, one by one, each with an output of its own.
Where lifetimes are followed, a Triton kernel has to make its outputs alone, and PyTorch's operators on a CPU have to
work in pieces, as they do on real tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_THREAD = threading.local()


@contextmanager
def imitated_on(device: torch.device) -> Iterator[None]:
    """In the block kernels allocate on simulated tensors what they do on real ones of this device."""
    before = getattr(_THREAD, "device", None)
    _THREAD.device = device.type
    try:
        yield
    finally:
        _THREAD.device = before


def imitates(device: str, tensor: Tensor) -> bool:
    """Whether the tensor stands for one on such a device, and it matters what is allocated."""
    return getattr(_THREAD, "device", None) == device and type(tensor) not in (Tensor, torch.nn.Parameter)
