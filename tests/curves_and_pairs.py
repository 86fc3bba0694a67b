"""Curves and operators of ours beside stock's, and the layouts to try them in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from invact.kernels import CURVES
from invact.kernels.curves import monotone_families

ALL_CURVES = [
    *CURVES.values(),
    monotone_families.elu(0.7),
    monotone_families.celu(2.0),
    monotone_families.hardtanh(-0.3, 0.7),
    monotone_families.softplus(2.0, threshold=5.0),
]
EVERY_CURVE = pytest.mark.parametrize("curve", ALL_CURVES, ids=str)
Operator = Callable[[Tensor], Tensor]
VIEWS: dict[str, Operator] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "permuted": lambda x: x.permute(2, 0, 3, 1),
    "sliced": lambda x: x[:, ::2, :, 1:],
    "expanded": lambda x: x[:1].expand(6, -1, -1, -1),
    "one_row": lambda x: x[0, 0, 0],
    "scalar": lambda x: x[0, 0, 0, 0],
    "empty": lambda x: x[:0],
}


def kept(function: Operator, x: Tensor) -> list[Tensor]:
    """What autograd keeps for the backward of one call."""
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(x)
    return tensors
