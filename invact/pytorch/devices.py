"""Of a tensor's device: the stream that its work goes to; and which kind of accelerator there is."""

from __future__ import annotations

import torch
from torch import Tensor

from invact.pytorch.fake_tensors import real


def current_stream(tensor: Tensor) -> int:
    """The stream of a tensor's device that work goes to: on another one a tensor may not be ready."""
    return int(torch._C._cuda_getCurrentRawStream(tensor.get_device())) if tensor.is_cuda and real(tensor) else 0


def accelerator_type() -> str:
    """The kind of accelerator of this PyTorch, "cuda" where it has none."""
    device = torch.accelerator.current_accelerator()
    return "cuda" if device is None else device.type
