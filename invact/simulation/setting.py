"""What a probe simulates: the device, autocast and attention of the training that is planned for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import nn

from invact.pytorch.version_check import RELEASE


@dataclass(frozen=True)
class Setting:
    """What a probe simulates: `autocast` is a dtype or None, `attention` is "fused" or "math"."""

    device: torch.device
    autocast: torch.dtype | None = None
    attention: str = "fused"


def stand_in(device: torch.device) -> torch.device:
    """The device of the fake tensors that stand for those on `device`.

    Before PyTorch 2.15 (seen in 2.6, 2.9 and the CPU build of 2.13; those between were not tried) autograd on
    fake CUDA tensors ends the process where there is no GPU: there fake CPU tensors take their place.
    """
    if device.type != "cuda" or torch.cuda.is_available():
        return device
    return device if torch.version.cuda is not None and RELEASE >= (2, 15) else torch.device("cpu")


def device_of(model: nn.Module) -> torch.device:
    """Where the model is; a model on meta is planned for a GPU."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    if tensor is None:
        return torch.device("cpu")
    return torch.device("cuda") if tensor.is_meta else tensor.device
