"""Parameters that recipes read: where training is distributed they may be gone, or others, by the time of backward.

FSDP frees the whole parameters of a layer after its forward and gathers them before its own backward; DeepSpeed puts
another tensor into `.data`. Autograd needs a parameter in the backward of the layer that has it, when it is back. But
the norm's output is wanted by the layer after that, in whose backward the norm's weight may not be there.
"""

from __future__ import annotations

import torch.distributed
from torch import Tensor, nn

LARGEST = 65536
"""Elements up to which a parameter is copied for recipes: the vectors that norms, scales and gates have."""


def parameters_may_go() -> bool:
    """Whether somebody may free or exchange parameters between forward and backward."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_parameter(tensor: Tensor) -> bool:
    """Whether it is a parameter or a part of one, as the parameters of FSDP1 are."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def copied(parameter: Tensor) -> Tensor | None:
    """A copy that stays, or None of what is too large for that.

    Example:
        >>> copied(nn.LayerNorm(4).weight), copied(nn.Linear(4, 4).weight)
        (tensor([1., 1., 1., 1.]), None)
    """
    if parameter.numel() > LARGEST or parameter.numel() != max(parameter.shape, default=1):
        return None
    return parameter.detach().clone()
